"""Doubling: minima of a sample average on nodes that are doubled until they stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families import Family
from whichkl.solvers.nodes.refusals import refuse_infinite, refuse_unbounded
from whichkl.solvers.nodes.trust_region import End, minimize
from whichkl.solvers.solver import Optimum, Solution, distinct
from whichkl.targets import Target

_CLOSE, _KEPT = 3.0, 12
_ROUGH = 1e-3
"""Length of the gradient, a coordinate, that tells whether more nodes are needed."""
_FARTHEST = 0.05
_STALLED = 0.03
"""Length of the gradient, a coordinate, at which a kink in the log density may keep it; smooth ones reach the tolerance."""
_ROOM = 1 << 24
"""Numbers in the nodes at most: 128 MB."""


class Average(Protocol):
    """−ELBO on nodes as a function of θ (b, p), the first d numbers of which are the mean and the next d log scales."""

    @property
    def target(self) -> Target:
        """What is fitted."""

    @property
    def z(self) -> Tensor:
        """The nodes, (m, d)."""

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and gradients."""

    def metric(self, theta: Tensor) -> Tensor:
        """Return by how much each coordinate moves in a step of length 1."""


@dataclass(frozen=True)
class Doubling:
    """How a sample average of a family is made, read and written, and when its nodes are enough."""

    family: Family
    average: Callable[[int], Average]
    """Number of nodes ↦ −ELBO on them."""
    read: Callable[[Float[Tensor, " p"]], Distribution]
    write: Callable[[Distribution], Float[Tensor, " p"]]
    tolerance: float
    node_tolerance: float
    max_nodes: int

    def solve(self, theta: Float[Tensor, "b p"], count: int) -> Solution:
        """Minimise from every start on `count` nodes, then the distinct optima on twice as many until they stay.

        Raises:
            TargetError: every start failed, or the best spreads or shrinks without bound.
        """
        few = average = self.average(count)
        dim, first = average.target.dim, count
        size, steps, error, settled = math.sqrt(theta.shape[1] / 2), 0, math.inf, dim == 1
        history: tuple[float, ...] = ()
        loss = torch.full_like(theta[:, 0], math.inf)
        counts = average.target.evaluations

        def spent() -> bool:
            return counts.is_spent

        while True:
            bend = few if count > first else None
            end = minimize(average, average.metric, theta, _ROUGH * size, bend, spent=spent)
            steps += end.steps
            history += end.history
            _refuse_unbounded(end, average.target)
            if math.isfinite(error):
                error, settled = self._moved(end, theta, loss, average)
            if settled or 2 * count > min(self.max_nodes, _ROOM // dim):
                break
            optima = self._optima(end, _ROUGH)[:_KEPT]
            if not counts.affords(len(optima) * 2 * count):
                break
            count, error = 2 * count, 1e300
            loss = torch.tensor([one.loss for one in optima], dtype=theta.dtype, device=theta.device)
            theta = torch.stack([self.write(one.model) for one in optima])
            average = self.average(count)
        end = minimize(average, average.metric, end.theta, self.tolerance * size, bend, spent=spent)
        node_error = None if dim == 1 or error >= 1e300 else error
        residual = float(end.residual[int(end.value.argmin())])
        optima, history = self._optima(end, self.tolerance), history + end.history
        return Solution(optima, steps + end.steps, residual, node_error, len(average.z), history=history)

    def _moved(self, end: End, theta: Tensor, loss: Tensor, average: Average) -> tuple[float, bool]:
        """Return the largest shift of a mean of the best optimum, and whether those within 3 nats of it stay."""
        dim, best = average.z.shape[1], int(end.value.argmin())
        shift = ((end.theta - theta) / average.metric(end.theta))[:, :dim].abs()
        slack = max(self.node_tolerance, 5e-4 * dim)
        stays = (shift.square().mean(-1).sqrt() <= self.node_tolerance) & (shift.amax(-1) <= _FARTHEST)
        stays &= (end.fall <= slack) & ((end.value - loss).abs() <= slack)
        return float(shift[best].max()), bool(stays[end.value <= end.value[best] + _CLOSE].all())

    def _optima(self, end: End, tolerance: float) -> tuple[Optimum, ...]:
        size = end.residual / math.sqrt(end.theta.shape[1] / 2)
        good = (size <= tolerance) | (end.stalled & (size <= _STALLED))
        found = [
            Optimum(self.read(theta), float(value), bool(ok), False)
            for theta, value, ok in zip(end.theta, end.value, good, strict=True)
            if math.isfinite(float(value))
        ]
        return distinct([one for one in found if one.converged] or found)


def first_nodes(dim: int) -> int:
    """The number of nodes to begin with: 256, on which quadratics are exact up to 64 dimensions; above, 64."""
    return 256 if dim <= 64 else 64


def _refuse_unbounded(end: End, target: Target) -> None:
    """Refuse a target on which every start failed, or the best one spreads or shrinks without bound.

    Raises:
        TargetError: as said.
    """
    refuse_infinite(-end.value)
    best, dim = int(end.value.argmin()), target.dim
    residual = float(end.residual[best]) / math.sqrt(end.theta.shape[1] / 2)
    refuse_unbounded(-float(end.value[best]), end.theta[best, None, dim : 2 * dim].exp(), target.names, residual)
