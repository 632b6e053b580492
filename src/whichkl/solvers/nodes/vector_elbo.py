"""Vector ELBO: −ELBO of factorised and low-rank Gaussians on fixed nodes as a function of a vector θ, and its minimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families.gaussian import diagonal_gaussian, diagonal_parts, low_rank, low_rank_parts
from whichkl.solvers.nodes.doubling import Verdict, double_nodes, near_best, refuse_infinite, refuse_unbounded
from whichkl.solvers.solver import Optimum, Solution, distinct
from whichkl.solvers.trust_region import End, minimize
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
_MAX_NUMBERS_PER_CALL = 1 << 20
"""Largest number of floats in the points of one call of the target: 8 MB, so that its own arrays stay small, too."""


@dataclass(frozen=True)
class DiagonalAverage:
    """−ELBO of N(m, diag s²), with θ = (m, log s), on nodes z of weights w that have mean 0 and unit variances.

    F(θ) = −Σ wᵢ log p(m + s zᵢ) − Σ log s − ½ d (1 + log 2π), in nats up to log Z; with hᵢ = ∇log p there,
    ∂F/∂m = −Σ wᵢ hᵢ and ∂F/∂log s = −s Σ wᵢ hᵢ zᵢ − 1.
    """

    target: Target
    z: Float[Tensor, "m d"]
    w: Float[Tensor, " m"]

    def __call__(self, theta: Float[Tensor, "b p"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "b p"]]:
        """Return values and gradients; +inf and 0 where a node has no density."""
        loc, log_scale = theta.chunk(2, dim=-1)
        scale = log_scale.exp()
        # The entropy is exact; only E[log p] is an average over nodes.
        value = -log_scale.sum(-1) - loc.shape[1] * (1 + math.log(2 * math.pi)) / 2
        pull, stretch = torch.zeros_like(loc), torch.zeros_like(loc)
        for row, z, w in _blocks(len(theta), self.z, self.w):
            log_p, h = self.target.trial((loc[row, None] + scale[row, None] * z).reshape(-1, z.shape[1]))
            log_p, h = log_p.reshape(-1, len(z)), h.reshape(-1, *z.shape)
            value[row] -= log_p @ w
            h = w[:, None] * h
            pull[row] += h.sum(1)
            stretch[row] += (h * z).sum(1)
        return _cleaned(value, torch.cat([-pull, -scale * stretch - 1], -1))

    def metric(self, theta: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        """Return one standard deviation for means, 1/√2 for log scales: the Hessian is I at the fit of a factorised target."""
        scale = theta[:, self.z.shape[1] :].exp()
        return torch.cat([scale, torch.full_like(scale, math.sqrt(0.5))], -1)

    def read(self, theta: Float[Tensor, " p"]) -> Distribution:
        """Return the model of θ."""
        loc, log_scale = theta.chunk(2)
        return diagonal_gaussian(loc, log_scale.exp())

    def write(self, model: Distribution) -> Float[Tensor, " p"]:
        """Return the θ of a model."""
        loc, scale = diagonal_parts(model)
        return torch.cat([loc, scale.log()])


@dataclass(frozen=True)
class LowRankAverage:
    """−ELBO of N(m, WWᵀ + D), with θ = (m, ½ log D, W by rows), on nodes (e, z) of k + d numbers, x = m + W e + √D z.

    The entropy is exact: ½ log|D| + ½ log|C| + ½ d (1 + log 2π), C = I + Wᵀ D⁻¹ W (matrix determinant lemma), with the
    gradients D⁻¹ W C⁻¹ in W and 1 − diag(D⁻¹ W C⁻¹ Wᵀ) in ½ log D.
    """

    target: Target
    rank: int
    e: Float[Tensor, "m k"]
    z: Float[Tensor, "m d"]
    w: Float[Tensor, " m"]

    def __call__(self, theta: Float[Tensor, "b p"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "b p"]]:
        """Return values and gradients; +inf and 0 where a node has no density."""
        dim = self.z.shape[1]
        loc, half, factor = self.split(theta)
        scale = half.exp()
        white = factor / scale[..., None]
        small = torch.eye(self.rank, dtype=theta.dtype, device=theta.device) + white.mT @ white
        root = torch.linalg.cholesky(small)
        # D^−½ W C⁻¹, from which both gradients of the entropy follow: only a k × k matrix is factored.
        white = torch.cholesky_solve(white.mT, root).mT
        value = -half.sum(-1) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - dim * (1 + math.log(2 * math.pi)) / 2
        kept = 1 - (white * (factor / scale[..., None])).sum(-1)
        pull, stretch, turn = torch.zeros_like(loc), -kept, -white / scale[..., None]
        for row, nodes, w in _blocks(len(theta), torch.cat([self.e, self.z], -1), self.w):
            e, z = nodes.split([self.rank, dim], dim=-1)
            x = loc[row, None] + e @ factor[row].mT + scale[row, None] * z
            log_p, h = self.target.trial(x.reshape(-1, dim))
            log_p, h = log_p.reshape(-1, len(z)), w[:, None] * h.reshape(-1, *z.shape)
            value[row] -= log_p @ w
            pull[row] -= h.sum(1)
            stretch[row] -= scale[row] * (h * z).sum(1)
            turn[row] -= h.mT @ e
        return _cleaned(value, torch.cat([pull, stretch, turn.flatten(1)], -1))

    def metric(self, theta: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        """Return one standard deviation for m, 1/√2 for ½ log D, and √D for W."""
        _, half, factor = self.split(theta)
        spread = (half.mul(2).exp() + factor.square().sum(-1)).sqrt()
        turn = half.exp()[..., None].expand_as(factor).flatten(1)
        return torch.cat([spread, torch.full_like(half, math.sqrt(0.5)), turn], -1)

    def split(self, theta: Float[Tensor, "b p"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return m (b, d), ½ log D (b, d) and W (b, d, k)."""
        dim = self.z.shape[1]
        return theta[:, :dim], theta[:, dim : 2 * dim], theta[:, 2 * dim :].reshape(-1, dim, self.rank)

    def read(self, theta: Float[Tensor, " p"]) -> Distribution:
        """Return the model of θ."""
        loc, half, factor = (part[0] for part in self.split(theta[None]))
        return low_rank(loc, factor, half.mul(2).exp())

    def write(self, model: Distribution) -> Float[Tensor, " p"]:
        """Return the θ of a model."""
        loc, factor, diagonal = low_rank_parts(model)
        return torch.cat([loc, diagonal.log() / 2, factor.flatten()])


Average = DiagonalAverage | LowRankAverage
"""−ELBO on nodes as a function of θ, which begins with the d means and the d log scales."""


def _blocks(count: int, z: Float[Tensor, "m d"], w: Float[Tensor, " m"]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of models × nodes of bounded size: all models on some nodes, or one model after another."""
    nodes = max(1, _MAX_NUMBERS_PER_CALL // z.shape[1])
    models = max(1, nodes // len(z))
    for first in range(0, count, models):
        for begin in range(0, len(z), nodes):
            yield slice(first, first + models), z[begin : begin + nodes], w[begin : begin + nodes]


def _cleaned(value: Float[Tensor, " b"], gradient: Float[Tensor, "b p"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "b p"]]:
    """Replace values that aren't finite by +inf, with a gradient of 0."""
    wrong = ~(value.isfinite() & gradient.isfinite().all(-1))
    return value.masked_fill(wrong, math.inf), gradient.masked_fill(wrong[:, None], 0.0)


@dataclass(frozen=True)
class _Batch:
    """Several θ on the same nodes: where they begin, their losses on fewer nodes, and where they end."""

    average: Average
    start: Float[Tensor, "b p"]
    loss: Float[Tensor, " b"]
    end: End

    def optima(self, tolerance: float) -> tuple[Optimum, ...]:
        """Return the distinct ends whose gradient is at most `tolerance` per coordinate, or all where none is."""
        end = self.end
        size = end.residual / math.sqrt(end.theta.shape[1] / 2)
        # At a kink of log p the gradient jumps past 0, so that it isn't small at the very minimum.
        good = (size <= tolerance) | (end.stalled & (size <= _STALLED))
        found = [
            Optimum(self.average.read(theta), float(value), bool(ok), False)
            for theta, value, ok in zip(end.theta, end.value, good, strict=True)
            if math.isfinite(float(value))
        ]
        return distinct([one for one in found if one.converged] or found)

    def check(self) -> None:
        """Refuse a target on which every start failed, or on which the best model spreads or shrinks without bound."""
        end, dim = self.end, self.average.target.dim
        refuse_infinite(-end.value)
        scale, residual = end.theta[:, None, dim : 2 * dim].exp(), end.residual / math.sqrt(end.theta.shape[1] / 2)
        refuse_unbounded(-end.value, scale, residual, self.average.target.names)

    def judge(self, node_tolerance: float) -> Verdict:
        """Judge by the largest shift of a mean of the best optimum, and by whether every optimum near it stays."""
        end, dim = self.end, self.average.z.shape[1]
        shift = ((end.theta - self.start) / self.average.metric(end.theta))[:, :dim].abs()
        # Every dimension adds its own noise of the nodes, which says nothing about the model.
        slack = max(node_tolerance, 5e-4 * dim)
        stays = (shift.square().mean(-1).sqrt() <= node_tolerance) & (shift.amax(-1) <= _MAX_SHIFT)
        stays &= (end.fall <= slack) & ((end.value - self.loss).abs() <= slack)
        return Verdict(float(shift[int(end.value.argmin())].max()), bool(stays[near_best(end.value)].all()))


def minimize_elbo(
    average: Callable[[int], Average], starts: Tensor, first: int, tolerance: float, node_tolerance: float, max_nodes: int
) -> Solution:
    """Minimise from every start (b, p) on `first` nodes, then from the distinct optima on twice as many until they stay.

    `average` makes −ELBO of a number of nodes. `tolerance` is the length of the gradient at the end, per coordinate, and
    `node_tolerance` the standard deviations by which twice as many nodes may move a mean, root mean square.

    Raises:
        TargetError: every start failed, or the best one spreads or shrinks without bound.
    """
    few = average(first)
    target, dim, size = few.target, few.target.dim, math.sqrt(starts.shape[1] / 2)
    history: list[float] = []

    def minimized(own: Average, start: Tensor, loss: Tensor, enough: float) -> _Batch:
        bend = None if own is few else few  # second derivatives come from the first nodes
        end = minimize(own, own.metric, start, enough * size, bend, spent=lambda: target.evaluations.is_spent)
        history.extend(end.history)
        return _Batch(own, start, loss, end)

    def refit(before: _Batch, count: int) -> tuple[_Batch, Verdict] | None:
        optima = before.optima(_ROUGH)[:_MAX_OPTIMA]
        if not target.evaluations.affords(len(optima) * count):
            return None
        loss = torch.tensor([one.loss for one in optima], dtype=starts.dtype, device=starts.device)
        start = torch.stack([few.write(one.model) for one in optima])
        batch = minimized(average(count), start, loss, _ROUGH)
        batch.check()
        return batch, batch.judge(node_tolerance)

    batch = minimized(few, starts, torch.full_like(starts[:, 0], math.inf), _ROUGH)
    batch.check()
    batch, node_error = double_nodes(batch, first, min(max_nodes, _MAX_NUMBERS_IN_NODES // dim), dim == 1, refit)
    batch = minimized(batch.average, batch.end.theta, batch.loss, tolerance)
    residual = float(batch.end.residual[int(batch.end.value.argmin())])
    nodes, found = len(batch.average.z), batch.optima(tolerance)
    return Solution(found, len(history), residual, node_error, nodes, history=tuple(history))


def first_nodes(dim: int) -> int:
    """Return the number of nodes to begin with: 256, on which quadratics are exact up to 64 dimensions; above, 64."""
    return 256 if dim <= 64 else 64
