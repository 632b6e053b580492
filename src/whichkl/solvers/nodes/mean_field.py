"""Mean field: reverse KL to Gaussians of diagonal and of low-rank covariance, on fixed nodes, up to 10⁴ columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import diagonal_parts
from whichkl.solvers.ascents import ascend
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.nodes.starts import find_starts, points_to_start, trial_on_cpu
from whichkl.solvers.nodes.vector_elbo import DiagonalAverage, LowRankAverage, first_nodes, minimize_elbo
from whichkl.solvers.solver import Solution, Solver
from whichkl.solvers.trust_region import hessian_product
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_MAX_DIM_OF_LAPLACE = 200
"""Largest number of dimensions in which the starts are Laplace approximations, of d × d numbers."""
_SEARCHES = 4
"""Number of ascents to modes in more dimensions."""
_MAX_CALLS = 500
"""Largest number of calls of the target by these ascents."""
_PROBES = 32
"""Number of random sign vectors that estimate the diagonal of a Hessian."""


_MAX_STARTS = 4
"""Largest number of optima of mean field from which the descent to a low-rank covariance starts."""
_MAX_DIM_OF_EXACT_NODES = 64
"""Largest number of dimensions in which the first nodes are exact on quadratics, so that the gradient can be a hundredth."""
_MIN_LENGTH, _MAX_LENGTH = 0.1, 100.0
"""Range of the length of a direction at the start, in standard deviations of the mean-field fit."""


@dataclass(frozen=True)
class MeanField(Solver):
    """argmin KL(q‖p) over q = N(m, diag s²): −ELBO on fixed antithetic nodes, a smooth function of (m, log s), to its minimum.

    Newton's method runs in a trust region from several starts at once, in coordinates in which q is N(0, I). Its steps come from
    conjugate gradients on differences of gradients, so that m nodes take m × d floats of memory. It ends when the length of the
    gradient, √(‖b‖² + ½‖a − 1‖²) with b = E[s h] and a = −E[s h z] for h = ∇log p(m + s z), is `tolerance` per coordinate. Unlike
    for a full covariance there can be fewer nodes than dimensions, since every node informs each scale. Nodes are doubled until
    the means of the best optimum move by less than `node_tolerance` standard deviations, none by more than 0.05, and the ELBO
    moves by no more than that many nats (above 40 dimensions 0.0005 per dimension). Until then a gradient of 0.001 per
    coordinate suffices. Second derivatives come from the first nodes alone.

    Source: Giordano, Ingram & Broderick (2024), "Black box variational inference with a deterministic objective".
    """

    name = "mean_field"
    direction = "reverse"
    families = (Gaussian,)
    mode_families = families
    covariances = ("diagonal",)

    tolerance: float = 1e-7
    node_tolerance: float = 0.02
    max_nodes: int = 4096

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes of 1,000 draws of the model, on which a fit is judged, and of the scores there."""
        return 16_000 * dim

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run all starts on the first nodes, then the distinct optima again on twice as many until they stay."""
        loc, scale = (part.to(target.device) for part in find_scales(target, seed))
        starts, numbers = torch.cat([loc, scale.log()], -1), (self.tolerance, self.node_tolerance, self.max_nodes)
        return minimize_elbo(lambda count: diagonal_average(target, count, seed), starts, first_nodes(target.dim), *numbers)


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
    covariances = ("low_rank",)

    tolerance: float = 1e-4
    node_tolerance: float = 0.02
    max_nodes: int = 4096

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes of 1,000 draws of the model, on which a fit is judged, and of the scores there."""
        return 16_000 * dim

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Fit by mean field, add the directions in which it is too narrow, and minimise as mean field does."""
        if not isinstance(family, Gaussian):
            raise TypeError(family)
        dim = target.dim
        rank = family.rank_in(dim)
        # A rough mean field is enough to start from: the descent to low rank moves all of it again.
        before = MeanField(1e-3, 0.1, 256).solve(target, Gaussian("diagonal"), seed)
        starts = [_widened(target, one.model, rank, seed) for one in before.optima[:_MAX_STARTS]]

        def average(count: int) -> LowRankAverage:
            nodes, w = (part.to(target.device) for part in gaussian_rule(dim + rank, count, seed, apart=rank))
            return LowRankAverage(target, rank, nodes[:, :rank].contiguous(), nodes[:, rank:].contiguous(), w)

        tolerance = self.tolerance / 100 if dim + rank <= _MAX_DIM_OF_EXACT_NODES else self.tolerance
        # W has rank × d numbers, which few nodes would fit instead of p: at least eight nodes per column of W.
        count = max(first_nodes(dim + rank), 1 << (8 * rank - 1).bit_length())
        return minimize_elbo(average, torch.stack(starts), count, tolerance, self.node_tolerance, self.max_nodes)


def diagonal_average(target: Target, count: int, seed: int) -> DiagonalAverage:
    """Return −ELBO on `count` nodes; the same seed gives the same nodes."""
    return DiagonalAverage(target, *(part.to(target.device) for part in gaussian_rule(target.dim, count, seed)))


def find_scales(target: Target, seed: int) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """Return means and standard deviations of factorised Gaussians to start from.

    Up to 200 dimensions they are the nearest ones, by reverse KL, to the Gaussians of `find_starts`, with scales 1/√diag(Σ⁻¹).
    Above, modes are found by L-BFGS from draws of p if there are any, else from normal draws of scales 0.03, 0.3, 1 and 3. The
    scales at a mode are 1/√diag of the negative Hessian, estimated by v ⊙ Hv with random signs v (Bekas et al., 2007).

    Raises:
        TargetError: the log density is −inf wherever the search began.
    """
    if target.dim <= _MAX_DIM_OF_LAPLACE:
        loc, tril = find_starts(target, seed)
        eye = torch.eye(target.dim, dtype=tril.dtype, device="cpu").expand_as(tril)
        inverse = torch.linalg.solve_triangular(tril, eye, upper=False)
        return loc, torch.linalg.vector_norm(inverse, dim=-2).reciprocal()

    def normal() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        scales = torch.tensor([0.03, 0.3, 1.0, 3.0], dtype=torch.float64, device="cpu")
        return scales[:, None] * torch.randn(_SEARCHES, target.dim, generator=generator, dtype=torch.float64, device="cpu")

    points, value = points_to_start(target, seed, _SEARCHES, normal, "0.03 to 3")
    points = points[value.isfinite()]
    target.value_and_score(points[:2].to(target.device))
    peaks = ascend(trial_on_cpu(target), points, tolerance=1e-6 * target.dim, max_calls=_MAX_CALLS)
    settled = peaks.x.isfinite().all(-1) & peaks.value.isfinite() & (peaks.decrement < 1e-3 * target.dim)
    locs: list[Tensor] = []
    scales: list[Tensor] = []
    for i in peaks.value.argsort(descending=True).tolist():
        near = [float(((peaks.x[i] - loc) / scale).square().mean().sqrt()) for loc, scale in zip(locs, scales, strict=True)]
        if bool(settled[i]) and min(near, default=math.inf) > 0.1:
            locs.append(peaks.x[i])
            scales.append(_spread(target, peaks.x[i], seed))
    if not locs:  # a density without modes, or one on which no ascent has ended
        locs, scales = [points.mean(0)], [torch.ones(target.dim, dtype=torch.float64, device="cpu")]
    return torch.stack(locs), torch.stack(scales)


def _spread(target: Target, mode: Float[Tensor, " d"], seed: int) -> Float[Tensor, " d"]:
    """Return 1/√diag(−∇² log p) at a mode; an estimate that isn't positive is replaced by the median of the others."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_PROBES, len(mode)), generator=generator, device="cpu").to(torch.float64).mul(2).sub(1)
    # Central differences of scores: the error is least near the cube root of float64's rounding.
    size = 1e-5 * (1 + float(mode.abs().median()))
    _, ahead = target.trial((mode + size * signs).to(target.device))
    _, behind = target.trial((mode - size * signs).to(target.device))
    # E[v ⊙ Hv] = diag H for random signs v: off-diagonal entries average out.
    bend = (signs * (behind - ahead).cpu() / (2 * size)).mean(0)
    known = bend[bend > 0]
    middle = float(known.median()) if len(known) else 1.0
    return torch.where(bend > 0.01 * middle, bend, middle).rsqrt()


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
    # Along an eigenvector the target's variance is 1/λ and mean field's is 1: W adds the rest.
    length = (1 / value.clamp(min=1e-300) - 1).clamp(min=0).sqrt().clamp(_MIN_LENGTH, _MAX_LENGTH)
    return torch.cat([loc, scale.log(), (scale[:, None] * vector * length).flatten()])


def _least_eigenvectors(bend: Callable[[Tensor], Tensor], start: Float[Tensor, " d"], rank: int) -> tuple[Tensor, Tensor]:
    """Return approximate least eigenvalues and eigenvectors of a symmetric map, by 8 k + 24 Lanczos steps."""
    most = min(len(start), 8 * rank + 24)
    basis, images = [start / torch.linalg.vector_norm(start)], []
    while True:
        images.append(bend(basis[-1]))
        left, known = images[-1], torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors that grow from step to step
            left = left - known.T @ (known @ left)
        norm = torch.linalg.vector_norm(left)
        if len(basis) == most or float(norm) < 1e-6:
            break
        basis.append(left / norm)
    projected = known @ torch.stack(images).T
    value, vector = torch.linalg.eigh((projected + projected.T) / 2)
    chosen = torch.arange(rank, device=start.device) % len(value)
    return value[chosen], known.T @ vector[:, chosen]
