"""Sides: Gaussians or mixtures of them, several at once, with log p − log q at fixed points of p and at nodes of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families import Gaussian, Mixture
from whichkl.families.gaussian import gaussian
from whichkl.families.mixture import mixture
from whichkl.objectives import Objective
from whichkl.solvers.nodes.batched_lbfgs import ascend
from whichkl.solvers.nodes.gaussians import evaluate
from whichkl.solvers.nodes.mixtures import log_density, read
from whichkl.targets import Target

_ROOM = 1 << 22
"""Numbers in what is made of p's points at once: 32 MB, some of them for autograd."""


@dataclass(frozen=True)
class Points:
    """Points of p, their weights, Σ w = 1, and log p of them."""

    x: Float[Tensor, "n d"]
    w: Float[Tensor, " n"]
    log_p: Float[Tensor, " n"]

    def at(self, rows: Tensor | slice) -> Points:
        """Return some of the points, their weights made to sum to one again."""
        w = self.w[rows]
        return Points(self.x[rows], w / w.sum(), self.log_p[rows])


@dataclass(frozen=True)
class Nodes:
    """A rule for N(0, I), carried to every component; where an objective doesn't read q, without points."""

    z: Float[Tensor, "m d"]
    w: Float[Tensor, " m"]


@dataclass(frozen=True)
class Sides:
    """B mixtures of K Gaussians (a Gaussian is K = 1) with the loss of an objective, divided by its curvature.

    The residual is the length of the gradient in coordinates whitened by each component, as in `Mixtures`.
    """

    moving: ClassVar[tuple[str, ...]] = ("logits", "loc", "tril", "loss", "residual")

    objective: Objective
    family: Gaussian | Mixture
    target: Target
    log_z: float
    """Of p, subtracted from log p at nodes; of the points it is already."""
    points: Points
    nodes: Nodes
    logits: Float[Tensor, "b k"]
    loc: Float[Tensor, "b k d"]
    tril: Float[Tensor, "b k d d"]
    loss: Float[Tensor, " b"]
    residual: Float[Tensor, " b"]

    @classmethod
    def at(
        cls,
        objective: Objective,
        family: Gaussian | Mixture,
        target: Target,
        log_z: float,
        points: Points,
        nodes: Nodes,
        parts: tuple[Tensor, Tensor, Tensor],
    ) -> Sides:
        """Evaluate mixtures of these log weights, means and factors."""
        unknown = parts[0].new_zeros(len(parts[0]))
        return cls(objective, family, target, log_z, points, nodes, *parts, unknown, unknown).measured()

    def on(self, nodes: Nodes, parts: tuple[Tensor, Tensor, Tensor]) -> Sides:
        """Evaluate others on other nodes."""
        return Sides.at(self.objective, self.family, self.target, self.log_z, self.points, nodes, parts)

    def measured(self) -> Sides:
        """Evaluate loss and residual on the points and nodes that are there."""
        value, slope = self.trial(self.origin(), torch.arange(len(self.logits), device=self.logits.device))
        residual = torch.linalg.vector_norm(slope, dim=-1)
        broken = ~(value.isfinite() & residual.isfinite())
        return replace(self, loss=(-value).masked_fill(broken, math.inf), residual=residual.masked_fill(broken, math.inf))

    def descended(self, max_calls: int, tolerance: float) -> Sides:
        """Descend by L-BFGS in the coordinates whitened by each component."""
        end = ascend(self.trial, self.origin(), tolerance=tolerance, max_calls=max_calls).x
        logits, loc, tril = self._read(end, slice(None))
        return replace(self, logits=logits, loc=loc, tril=tril).measured()

    @property
    def each(self) -> int:
        """What a call costs for each of the mixtures: nodes of q at which log p is evaluated, and rows of p that are read."""
        nodes = self.loc.shape[1] * len(self.nodes.z) if self.objective.reads_q else 0
        return nodes + (len(self.points.x) if self.objective.reads_p and self.target.samples is not None else 0)

    def models(self) -> list[Distribution]:
        """The mixtures as distributions of the family."""
        parts = zip(self.logits, self.loc, self.tril, strict=True)
        if isinstance(self.family, Gaussian):
            return [gaussian(loc[0], tril[0], self.family.covariance) for _, loc, tril in parts]
        return [mixture(logits.softmax(-1), loc, tril, self.family.covariance) for logits, loc, tril in parts]

    def take(self, which: Bool[Tensor, " b"]) -> Sides:
        """Select some of the mixtures."""
        return replace(self, **{name: getattr(self, name)[which] for name in self.moving})

    def put(self, rows: Tensor, other: Sides) -> Sides:
        """Replace those in these rows."""
        return replace(self, **{name: getattr(self, name).index_copy(0, rows, getattr(other, name)) for name in self.moving})

    def origin(self) -> Float[Tensor, "b n"]:
        """Coordinates of the mixtures themselves: 0."""
        batch, count, dim = self.loc.shape
        each = 2 * dim + (dim * (dim - 1) // 2 if self.family.covariance == "full" else 0)
        return self.loc.new_zeros(batch, count * (1 + each))

    def trial(self, theta: Float[Tensor, "a n"], rows: Tensor) -> tuple[Float[Tensor, " a"], Float[Tensor, "a n"]]:
        """Minus the loss and its gradient, for some of the mixtures; −∞ where it isn't a number."""
        count = max(1, self.loc.shape[1] * len(self.points.x) * self.points.x.shape[1])
        parts = [
            self._trial(part, row)
            for part, row in zip(*(one.split(max(1, _ROOM // count)) for one in (theta, rows)), strict=True)
        ]
        value, slope = (torch.cat(part) for part in zip(*parts, strict=True))
        broken = ~(value.isfinite() & slope.isfinite().all(-1))
        return value.masked_fill(broken, -math.inf), slope.masked_fill(broken[:, None], 0.0)

    def ratios(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Log p − log q at the points of p and at the nodes of each, and the nodes' weights, as they are."""
        rows = torch.arange(len(self.logits), device=self.logits.device)
        with torch.no_grad():
            return [self._ratios(self.origin()[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]

    def _trial(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        point = theta.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = [self.objective.loss(at_p, self.points.w, at_q, w) for at_p, at_q, w in self._ratios(point, rows)]
            value = -torch.stack(losses) / self.objective.curvature
            (slope,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), slope

    def _ratios(self, point: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        logits, loc, tril = self._read(point, rows)
        batch, _, dim = loc.shape
        at_p = at_q = weight = point.new_zeros(batch, 0)
        if self.objective.reads_p:
            if self.target.samples is not None:
                self.target.evaluations["rows"] += batch * len(self.points.x)
            at_p = self.points.log_p - log_density(self.points.x.expand(batch, -1, -1), logits, loc, tril)
        if self.objective.reads_q:
            x = (loc[:, :, None] + torch.einsum("bkij,mj->bkmi", tril, self.nodes.z)).reshape(batch, -1, dim)
            value, score = evaluate(self.target, x.detach())
            # log p enters the graph through its score: its value is a constant there.
            pulled = (score * (x - x.detach())).sum(-1)
            at_q = torch.where(value > -math.inf, value - self.log_z + pulled, -math.inf) - log_density(x, logits, loc, tril)
            weight = (logits.exp()[..., None] * self.nodes.w).reshape(batch, -1)
        return list(zip(at_p, at_q, weight, strict=True))

    def _read(self, theta: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        is_full = self.family.covariance == "full"
        return read(theta, self.logits[rows], self.loc[rows], self.tril[rows], is_full=is_full)
