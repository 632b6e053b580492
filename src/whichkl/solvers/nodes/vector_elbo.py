"""Vector ELBO: −ELBO on fixed nodes as a function of a vector θ, minimised in a trust region from several starts at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.solvers.nodes.doubling import Doubling, Verdict, near_best
from whichkl.solvers.nodes.refusals import refuse_infinite, refuse_unbounded
from whichkl.solvers.nodes.trust_region import End, minimize
from whichkl.solvers.solver import Optimum, Solution, distinct
from whichkl.targets import Target

_MAX_OPTIMA = 12
"""Largest number of optima that are carried to more nodes."""
_ROUGH = 1e-3
"""Length of the gradient, per coordinate, that suffices to judge the nodes."""
_MAX_SHIFT = 0.05
"""Standard deviations. Largest shift of any mean at which the nodes count as enough."""
_STALLED = 0.03
"""Length of the gradient, per coordinate, at which a kink of the log density may hold it; smooth ones reach the tolerance."""
_MAX_NUMBERS_IN_NODES = 1 << 24
"""Largest number of floats in the nodes: 128 MB."""


class Average(Protocol):
    """−ELBO on nodes as a function of θ (b, p), which begins with the d means and the d log scales."""

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
class _Batch:
    """Several θ on the same nodes: where they begin, their losses on fewer nodes, and where they end."""

    average: Average
    start: Float[Tensor, "b p"]
    loss: Float[Tensor, " b"]
    end: End


@dataclass(frozen=True)
class VectorElbo:
    """A family whose models are vectors θ, and how precisely to fit it.

    Args:
        average: number of nodes -> −ELBO on them.
        read: θ -> its model.
        write: a model -> its θ.
        tolerance: length of the gradient at the end, per coordinate.
        node_tolerance: standard deviations by which twice as many nodes may move a mean, root mean square.
        max_nodes: largest number of nodes.
    """

    average: Callable[[int], Average]
    read: Callable[[Float[Tensor, " p"]], Distribution]
    write: Callable[[Distribution], Float[Tensor, " p"]]
    tolerance: float
    node_tolerance: float
    max_nodes: int

    def solve(self, starts: Float[Tensor, "b p"], first: int) -> Solution:
        """Minimise from every start on `first` nodes, then from the distinct optima on twice as many until they stay.

        Raises:
            TargetError: every start failed, or the best one spreads or shrinks without bound.
        """
        few = self.average(first)
        target, dim, size = few.target, few.target.dim, math.sqrt(starts.shape[1] / 2)
        steps, history = 0, list[float]()

        def minimized(average: Average, start: Tensor, loss: Tensor, tolerance: float) -> _Batch:
            nonlocal steps
            bend = None if average is few else few  # second derivatives come from the first nodes
            end = minimize(average, average.metric, start, tolerance * size, bend, spent=lambda: target.evaluations.is_spent)
            steps += end.steps
            history.extend(end.history)
            return _Batch(average, start, loss, end)

        def begin(ended: _Batch, count: int) -> _Batch | None:
            optima = self._optima(ended.end, _ROUGH)[:_MAX_OPTIMA]
            if not target.evaluations.affords(len(optima) * count):
                return None
            loss = torch.tensor([one.loss for one in optima], dtype=starts.dtype, device=starts.device)
            start = torch.stack([self.write(one.model) for one in optima])
            return minimized(self.average(count), start, loss, _ROUGH)

        most = min(self.max_nodes, _MAX_NUMBERS_IN_NODES // dim)
        begun = minimized(few, starts, torch.full_like(starts[:, 0], math.inf), _ROUGH)
        doubling = Doubling(first, most, dim == 1, _check, begin, lambda batch: batch, self._judge)
        batch, error = doubling.run(begun, begun, first)
        batch = minimized(batch.average, batch.end.theta, batch.loss, self.tolerance)
        node_error = None if dim == 1 or math.isinf(error) else error
        residual = float(batch.end.residual[int(batch.end.value.argmin())])
        nodes, found = len(batch.average.z), self._optima(batch.end, self.tolerance)
        return Solution(found, steps, residual, node_error, nodes, history=tuple(history))

    def _judge(self, begun: _Batch, ended: _Batch, count: int) -> Verdict:
        """Judge by the largest shift of a mean of the best optimum, and by whether every optimum near it stays."""
        end, dim = ended.end, ended.average.z.shape[1]
        shift = ((end.theta - ended.start) / ended.average.metric(end.theta))[:, :dim].abs()
        slack = max(self.node_tolerance, 5e-4 * dim)
        stays = (shift.square().mean(-1).sqrt() <= self.node_tolerance) & (shift.amax(-1) <= _MAX_SHIFT)
        stays &= (end.fall <= slack) & ((end.value - ended.loss).abs() <= slack)
        return Verdict(float(shift[int(end.value.argmin())].max()), bool(stays[near_best(end.value)].all()))

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
    """Return the number of nodes to begin with: 256, on which quadratics are exact up to 64 dimensions; above, 64."""
    return 256 if dim <= 64 else 64


def _check(batch: _Batch) -> None:
    """Refuse a target on which every start failed, or on which the best model spreads or shrinks without bound."""
    end, target = batch.end, batch.average.target
    refuse_infinite(-end.value)
    best, dim = int(end.value.argmin()), target.dim
    residual = float(end.residual[best]) / math.sqrt(end.theta.shape[1] / 2)
    refuse_unbounded(-float(end.value[best]), end.theta[best, None, dim : 2 * dim].exp(), target.names, residual)
