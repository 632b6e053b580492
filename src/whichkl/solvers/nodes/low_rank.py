"""Low rank: reverse KL to a Gaussian of covariance WWᵀ + D, from the mean-field fit and the directions where it is too narrow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.access import Access
from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import diagonal_parts, low_rank, low_rank_parts
from whichkl.solvers.nodes.factorised_elbo import LowRankAverage
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.nodes.mean_field import MeanField, diagonal_average
from whichkl.solvers.nodes.trust_region import hessian_product
from whichkl.solvers.nodes.vector_elbo import VectorElbo, first_nodes
from whichkl.solvers.solver import Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_MAX_STARTS = 4
"""Largest number of optima of mean field from which the descent starts."""
_MAX_DIM_OF_EXACT_NODES = 64
"""Largest number of dimensions in which the first nodes are exact on quadratics, so that the gradient can be a hundredth."""
_MIN_LENGTH, _MAX_LENGTH = 0.1, 100.0
"""Range of the length of a direction at the start, in standard deviations of the mean-field fit."""


@dataclass(frozen=True)
class LowRank(Solver):
    """argmin KL(q‖p) over q = N(m, WWᵀ + D), W of shape (d, k): −ELBO on fixed nodes, x = m + W e + √D z, to its minimum.

    The descent is that of `MeanField`, with an exact entropy, in memory of m × d and d × k numbers. It starts at each optimum of
    mean field. In coordinates where that q is N(0, I), the k least eigenvalues λ of −E_q[∇² log p] belong to the directions in
    which q is too narrow, and each column of W starts as such an eigenvector with length √(1/λ − 1). Lanczos' method finds them
    from differences of gradients. Directions in which the target is nearly flat converge slowly, so the gradient at the end is
    `tolerance` per coordinate; up to 64 dimensions, where nodes are exact on quadratics, a hundredth of it.

    Source: Ong, Nott & Smith (2018) for the family; Giordano, Ingram & Broderick (2024) for fixed draws.
    """

    name = "low_rank"
    direction = "reverse"
    families = (Gaussian,)
    mode_families = families

    tolerance: float = 1e-4
    node_tolerance: float = 0.02
    max_nodes: int = 4096

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the covariance is of low rank."""
        return isinstance(family, Gaussian) and family.covariance == "low_rank"

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes of 1,000 draws of the model, on which a fit is judged, and of the scores there."""
        return 16_000 * dim

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Fit by mean field, add the directions in which it is too narrow, and minimise as mean field does."""
        if not isinstance(family, Gaussian):
            raise TypeError(family)
        dim = target.dim
        rank = family.rank_in(dim)
        before = MeanField(1e-3, 0.1, 256).solve(target, Gaussian("diagonal"), seed)
        starts = [_widened(target, one.model, rank, seed) for one in before.optima[:_MAX_STARTS]]

        def average(count: int) -> LowRankAverage:
            nodes, w = (part.to(target.device) for part in gaussian_rule(dim + rank, count, seed, apart=rank))
            return LowRankAverage(target, rank, nodes[:, :rank].contiguous(), nodes[:, rank:].contiguous(), w)

        def read(theta: Tensor) -> Distribution:
            return low_rank(theta[:dim], theta[2 * dim :].reshape(dim, rank), theta[dim : 2 * dim].mul(2).exp())

        tolerance = self.tolerance / 100 if dim + rank <= _MAX_DIM_OF_EXACT_NODES else self.tolerance
        numbers = (tolerance, self.node_tolerance, self.max_nodes)
        count = max(first_nodes(dim + rank), 1 << (8 * rank - 1).bit_length())
        return VectorElbo(average, read, _write, *numbers).solve(torch.stack(starts), count)


def _widened(target: Target, model: Distribution, rank: int, seed: int) -> Float[Tensor, " p"]:
    """Return θ of a mean-field fit, widened along the directions in which it is narrowest relative to the target."""
    loc, scale = diagonal_parts(model)
    dim = len(loc)
    average = diagonal_average(target, first_nodes(dim), seed)
    theta = torch.cat([loc, scale.log()])[None]
    unit = average.metric(theta)
    slope = unit * average(theta)[1]

    def bend(v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        return hessian_product(average, theta, slope, torch.cat([v, torch.zeros_like(v)])[None], unit)[0, :dim]

    start = torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu").to(loc.device)
    value, vector = _least_eigenvectors(bend, start, rank)
    length = (1 / value.clamp(min=1e-300) - 1).clamp(min=0).sqrt().clamp(_MIN_LENGTH, _MAX_LENGTH)
    return torch.cat([loc, scale.log(), (scale[:, None] * vector * length).flatten()])


def _least_eigenvectors(bend: Callable[[Tensor], Tensor], start: Float[Tensor, " d"], rank: int) -> tuple[Tensor, Tensor]:
    """Return approximate least eigenvalues and eigenvectors of a symmetric map, by 8 k + 24 Lanczos steps."""
    most = min(len(start), 8 * rank + 24)
    basis, images = [start / torch.linalg.vector_norm(start)], []
    while True:
        images.append(bend(basis[-1]))
        left, known = images[-1], torch.stack(basis)
        for _ in range(2):
            left = left - known.T @ (known @ left)
        norm = torch.linalg.vector_norm(left)
        if len(basis) == most or float(norm) < 1e-6:
            break
        basis.append(left / norm)
    projected = known @ torch.stack(images).T
    value, vector = torch.linalg.eigh((projected + projected.T) / 2)
    chosen = torch.arange(rank, device=start.device) % len(value)
    return value[chosen], known.T @ vector[:, chosen]


def _write(model: Distribution) -> Tensor:
    loc, factor, diagonal = low_rank_parts(model)
    return torch.cat([loc, diagonal.log() / 2, factor.flatten()])
