"""Mean field: reverse KL to a Gaussian with a diagonal covariance, by sample averages and Newton's method, up to 10⁴ columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl.access import Access
from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import diagonal_gaussian, diagonal_parts
from whichkl.objectives import Direction
from whichkl.solvers.nodes.factorised_elbo import DiagonalAverage
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.nodes.mean_field_starts import find_scales
from whichkl.solvers.nodes.vector_elbo import VectorElbo, first_nodes
from whichkl.solvers.solver import Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target


@dataclass(frozen=True)
class MeanField(Solver):
    """argmin KL(q‖p) over q = N(m, diag s²): −ELBO on fixed antithetic nodes, a smooth function of (m, log s), to its minimum.

    Newton's method runs in a trust region from several starts at once, in coordinates in which q is N(0, I). Its steps come from
    conjugate gradients on differences of gradients, so that m nodes take m × d floats of memory. It ends by the length of the
    gradient, √(‖b‖² + ½‖a − 1‖²) with b = E[s h] and a = −E[s h z] for h = ∇log p(m + s z), at `tolerance` per coordinate. There
    may be fewer nodes than dimensions, unlike for a full covariance, since every node sees each scale. Nodes are doubled until
    the means of the best optimum move by less than `node_tolerance` standard deviations, none by more than 0.05, and the ELBO
    moves by no more than that many nats (above 40 dimensions 0.0005 per dimension). Until then a gradient of 0.001 per
    coordinate suffices. Second derivatives come from the first nodes alone.

    Source: Giordano, Ingram & Broderick (2024), "Black box variational inference with a deterministic objective".
    """

    name: ClassVar[str] = "mean_field"
    direction: ClassVar[Direction] = "reverse"
    families: ClassVar[tuple[type[Family], ...]] = (Gaussian,)
    mode_families: ClassVar[tuple[type[Family], ...]] = families

    tolerance: float = 1e-7
    node_tolerance: float = 0.02
    max_nodes: int = 4096

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the covariance is diagonal."""
        return isinstance(family, Gaussian) and family.covariance == "diagonal"

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes of 1,000 draws of the model, at which a fit is judged, and of the scores there."""
        return 16_000 * dim

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run all starts on the first nodes, then the distinct optima again on twice as many until they stay."""
        loc, scale = (part.to(target.device) for part in find_scales(target, seed))
        numbers = (self.tolerance, self.node_tolerance, self.max_nodes)
        elbo = VectorElbo(lambda count: diagonal_average(target, count, seed), _read, _write, *numbers)
        return elbo.solve(torch.cat([loc, scale.log()], -1), first_nodes(target.dim))


def diagonal_average(target: Target, count: int, seed: int) -> DiagonalAverage:
    """Return −ELBO on `count` nodes; the same seed gives the same nodes."""
    return DiagonalAverage(target, *(part.to(target.device) for part in gaussian_rule(target.dim, count, seed)))


def _read(theta: Tensor) -> Distribution:
    loc, log_scale = theta.chunk(2)
    return diagonal_gaussian(loc, log_scale.exp())


def _write(model: Distribution) -> Tensor:
    loc, scale = diagonal_parts(model)
    return torch.cat([loc, scale.log()])
