"""Sample-average approximation: reverse KL on fixed nodes, minimised by L-BFGS, for any family that has `nodes`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family, Mixture
from whichkl.families.family import NodeFamily, cast
from whichkl.families.mixture import mixture
from whichkl.objectives import Objective, ReverseKL
from whichkl.solvers.nodes import first_count, gaussian_rule
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.solvers.starts import find_starts
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target


@dataclass(frozen=True)
class SampleAverage(Solver):
    """argmin KL(q‖p) over mixtures: nodes stratified over the components, L-BFGS, several starts.

    A start puts the components on Gaussians of `find_starts` (modes and what covers them), or splits one along its
    longest axis. Nodes are doubled until the ELBO moves by less than `node_tolerance` nats.

    Source: Giordano, Ingram & Broderick (2024) for fixed draws; stratification as in Kobyzev et al., Morningstar et
    al. (2021).
    """

    name: ClassVar[str] = "sample_average"
    objective: ClassVar[type[Objective]] = ReverseKL
    families: ClassVar[tuple[type[Family], ...]] = (Mixture,)

    tolerance: float = 1e-5
    node_tolerance: float = 0.01
    max_nodes: int = 4096

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """Reverse KL to a mixture of Gaussians that doesn't tie their covariances, where log p can be evaluated."""
        is_able = isinstance(family, Mixture) and family.law == "gaussian" and family.covariance != "tied"
        return is_able and super().solves(objective, family, access) and access.can_evaluate

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Minimise from every start on the first nodes, then the distinct optima on twice as many until they stay."""
        if not isinstance(family, Mixture):
            raise TypeError(family)
        count, iterations, error = first_count(target.dim), 0, math.inf
        models: list[Distribution] = _starts(target, family, seed)
        before = math.inf
        while True:
            z, w = (part.to(target.device) for part in gaussian_rule(target.dim, count, seed))
            ends = [minimize_on_nodes(target, family, model, z, w, self.tolerance) for model in models]
            iterations += sum(end.iterations for end in ends)
            found = [Optimum(e.model, e.loss, e.residual <= 1e-3, False) for e in ends if math.isfinite(e.loss)]
            if not found:
                because = "the ELBO is not finite at any start: log_prob is -inf inside the support of the family"
                raise TargetError(cannot("minimise reverse KL here", because, "Pass `support=`, or use forward_kl"))
            optima = distinct([one for one in found if one.converged] or found)
            error, before = abs(optima[0].loss - before), optima[0].loss
            if target.dim == 1 or error <= self.node_tolerance or 2 * count > self.max_nodes:
                break
            count *= 2
            models = [one.model for one in optima]
        residual = min((end.residual for end in ends if end.loss == optima[0].loss), default=math.nan)
        return Solution(optima, iterations, residual, None if target.dim == 1 else error, len(z))


@dataclass(frozen=True)
class End:
    """Where L-BFGS ended: the model, its loss, the size of the gradient in whitened coordinates, the steps."""

    model: Distribution
    loss: float
    residual: float
    iterations: int


def minimize_on_nodes(
    target: Target, family: NodeFamily, start: Distribution, z: Float[Tensor, "m d"], w: Float[Tensor, " m"], tolerance: float
) -> End:
    """Minimise −ELBO on the rule (z, w) from a model, in coordinates where that model has mean 0 and covariance I.

    Args:
        target: p in unconstrained coordinates.
        family: which models are allowed.
        start: where to begin.
        z: points of a rule for N(0, I).
        w: their weights.
        tolerance: largest component of the gradient at the end.
    """
    objective, dim = ReverseKL(), target.dim
    shift, scale = family.whitening(start)
    inverse = torch.linalg.solve_triangular(scale, torch.eye(dim, dtype=scale.dtype, device=scale.device), upper=False)
    here = family.affine(start, -inverse @ shift, inverse)
    volume = scale.diagonal().log().sum()

    def white(y: Tensor) -> tuple[Tensor, Tensor]:
        value, score = target.trial(shift + y @ scale.T)
        return value + volume, score @ scale

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(theta).to(target.device).requires_grad_(True)
        value = objective.loss(family, family.unpack(point, dim), white, z, w)
        if not bool(value.isfinite()):
            return 1e300, np.zeros_like(theta)
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient.cpu().numpy()

    start_theta = family.pack(here).detach().cpu().numpy()
    options = {"maxiter": 300, "gtol": tolerance, "ftol": 1e-13 if dim == 1 else 1e-10, "maxcor": 30}
    result = minimize(loss, start_theta, jac=True, method="L-BFGS-B", options=options)
    if result.fun >= 1e299:
        return End(start, math.inf, math.inf, int(result.nit))
    end = family.unpack(torch.from_numpy(result.x).to(target.device), dim)
    return End(family.affine(end, shift, scale), float(result.fun), float(np.linalg.norm(result.jac)), int(result.nit))


def _starts(target: Target, family: Mixture, seed: int) -> list[Distribution]:
    """Mixtures on the best modes, on every start together, and on each start split along its longest axis."""
    locs, trils = find_starts(target, seed)
    starts = [_split(loc, tril, family) for loc, tril in zip(locs, trils, strict=True)]
    modes = locs[: family.count]
    if len(modes) == family.count and family.count > 1:
        even = torch.full((len(modes),), 1 / len(modes), dtype=locs.dtype)
        starts.insert(0, mixture(even, modes, _shape(trils[: len(modes)], family), family.covariance))
    return [cast(family, start, torch.float64, target.device) for start in starts[:6]]


def _split(loc: Float[Tensor, " d"], tril: Float[Tensor, "d d"], family: Mixture) -> Distribution:
    """Spread K components evenly over ±1 standard deviation of one Gaussian along its longest axis."""
    count = family.count
    _, vector = torch.linalg.eigh(tril @ tril.T)
    axis = vector[:, -1] * torch.linalg.vector_norm(tril.T @ vector[:, -1])
    at = torch.linspace(-1, 1, count, dtype=loc.dtype) if count > 1 else torch.zeros(1, dtype=loc.dtype)
    even = torch.full((count,), 1 / count, dtype=loc.dtype)
    return mixture(even, loc + at[:, None] * axis, _shape(tril.expand(count, -1, -1), family), family.covariance)


def _shape(trils: Float[Tensor, "k d d"], family: Mixture) -> Float[Tensor, "k d d"]:
    """Bring scales to the shape that the family allows."""
    if family.covariance == "full":
        return trils
    return torch.diag_embed(torch.linalg.vector_norm(trils, dim=-1))
