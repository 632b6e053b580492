"""Ensemble: several mixtures of Gaussians at once, and an objective's loss at fixed points of p and at their own nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families import Gaussian, Mixture
from whichkl.families.gaussian import gaussian
from whichkl.families.mixture import components, mixture
from whichkl.objectives import Objective
from whichkl.solvers.ascents import Peaks, ascend
from whichkl.solvers.nodes.expansion import Entropy, Expansion
from whichkl.solvers.nodes.gaussian_rule import first_count
from whichkl.solvers.nodes.points import Nodes, Parts, Points, evaluate, log_density
from whichkl.solvers.solver import Optimum, distinct
from whichkl.targets import Target

_MAX_NUMBERS_AT_POINTS = 1 << 22
"""Largest number of floats computed from p's points at once: 32 MB, some of which autograd keeps."""
_MIN_WEIGHT = 1e-8
"""Smallest weight that scales a component's coordinates; a component of less weight stays where it is."""
_SHARE_OF_GRADIENT = 0.03
"""Share of the gradient at which a descent on the expansion of log p ends: the next expansion is another one."""


@dataclass(frozen=True)
class Ensemble:
    """B mixtures Σ πₖ N(mₖ, LₖLₖᵀ) of K Gaussians (a Gaussian is K = 1) with an objective's loss, divided by its curvature.

    The nodes of a mixture are mₖ + Lₖ zᵢ with weights πₖ wᵢ. The residual is the length of the gradient in whitened coordinates,
    mₖ + Lₖ a / √πₖ and Lₖ T, in which a component that overlaps with no other has curvature 1.

    Source: Morningstar et al. (2021) for nodes stratified over the components.
    """

    moving: ClassVar[tuple[str, ...]] = ("logits", "loc", "tril", "loss", "residual")

    objective: Objective
    family: Gaussian | Mixture
    target: Target
    log_z: float
    """log Z of p, subtracted from log p at nodes; `points.log_p` is already normalised."""
    points: Points
    nodes: Nodes
    logits: Float[Tensor, "b k"]
    loc: Float[Tensor, "b k d"]
    tril: Float[Tensor, "b k d d"]
    loss: Float[Tensor, " b"]
    residual: Float[Tensor, " b"]
    expansion: Expansion | None = None
    """Log p at the nodes and about them, from the evaluation that gave the loss; it takes the place of log p in `trial`."""
    entropy: Entropy | None = None
    """More nodes for log q, which costs nothing of p; for reverse KL."""

    @classmethod
    def at(
        cls,
        objective: Objective,
        family: Gaussian | Mixture,
        target: Target,
        points: Points,
        nodes: Nodes,
        parts: Parts,
        log_z: float = 0.0,
        entropy: Entropy | None = None,
    ) -> Ensemble:
        """Evaluate mixtures of these log weights, means and factors; the factors of a diagonal family lose their off-diagonal."""
        logits, loc, tril = (part.to(target.device) for part in parts)
        if family.covariance == "diagonal":
            # The standard deviations of the full factor, which its diagonal alone would understate.
            tril = torch.diag_embed(torch.linalg.vector_norm(tril, dim=-1))
        unknown = logits.new_zeros(len(logits))
        here = cls(objective, family, target, log_z, points, nodes, logits.log_softmax(-1), loc, tril, unknown, unknown)
        return replace(here, entropy=entropy).measured()

    def on(self, nodes: Nodes, parts: Parts) -> Ensemble:
        """Evaluate other mixtures on other nodes; more nodes for log q stay while there are more of them."""
        entropy = self.entropy if self.entropy is not None and len(self.entropy.nodes.z) > len(nodes.z) else None
        return Ensemble.at(self.objective, self.family, self.target, self.points, nodes, parts, self.log_z, entropy)

    def recalling(self, before: Ensemble) -> Ensemble:
        """Return the mixtures with an expansion that has the gradients of log p at the nodes of `before`, too."""
        if self.expansion is None or before.expansion is None:
            raise TypeError("nothing was expanded")
        return replace(self, expansion=self.expansion.recalling(before.expansion))

    def stepped(self, tether: Float[Tensor, " b"], max_calls: int) -> tuple[Ensemble, Float[Tensor, " b"]]:
        """Descend on the expansion; return the mixtures there, not measured, and the fall of the loss that it promises."""
        if self.expansion is None:
            raise TypeError("nothing was expanded")
        model = replace(self, expansion=replace(self.expansion, tether=tether))
        tolerance = float((_SHARE_OF_GRADIENT * self.residual).square().min()) / 2
        there, end = model._climbed(max_calls, tolerance)
        return there, self.loss + end.value + tether * end.x.square().sum(-1) / 2

    def measured(self) -> Ensemble:
        """Evaluate log p at the nodes, unless it is known there, and from it the loss and the residual."""
        here = self
        if self.objective.reads_q and self.expansion is None:
            x = self.nodes.under(self.loc, self.tril)
            here = replace(self, expansion=Expansion.about(x, *evaluate(self.target, x), self.tril, self.nodes))
        value, slope = here.trial(self.origin(), torch.arange(len(self.logits), device=self.logits.device))
        residual = torch.linalg.vector_norm(slope, dim=-1)
        broken = ~(value.isfinite() & residual.isfinite())
        return replace(here, loss=(-value).masked_fill(broken, math.inf), residual=residual.masked_fill(broken, math.inf))

    def descended(self, max_calls: int, tolerance: float) -> Ensemble:
        """Descend by L-BFGS in the coordinates whitened by each component."""
        first = self.trial(self.origin(), torch.arange(len(self.loss), device=self.loss.device))
        return replace(self, expansion=None)._climbed(max_calls, tolerance, first)[0].measured()

    def _climbed(self, max_calls: int, tolerance: float, first: tuple[Tensor, Tensor] | None = None) -> tuple[Ensemble, Peaks]:
        end = ascend(self.trial, self.origin(), tolerance=tolerance, max_calls=max_calls, first=first)
        logits, loc, tril = self._read(end.x, slice(None))
        return replace(self, logits=logits, loc=loc, tril=tril, expansion=None), end

    @property
    def cost(self) -> int:
        """Evaluations that a call costs per mixture: nodes at which log p is evaluated, and fixed rows of p that are read."""
        nodes = self.loc.shape[1] * len(self.nodes.z) if self.objective.reads_q else 0
        return nodes + (len(self.points.x) if self.objective.reads_p and self.target.samples is not None else 0)

    def models(self) -> list[Distribution]:
        """Return the mixtures as distributions of the family."""
        parts = zip(self.logits, self.loc, self.tril, strict=True)
        if isinstance(self.family, Gaussian):
            return [gaussian(loc[0], tril[0], self.family.covariance) for _, loc, tril in parts]
        return [mixture(logits.softmax(-1), loc, tril, self.family.covariance) for logits, loc, tril in parts]

    def joined(self, other: Ensemble) -> Ensemble:
        """Return the mixtures of both, which are on the same nodes."""
        moving: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in self.moving}
        expansion = None if self.expansion is None or other.expansion is None else self.expansion.joined(other.expansion)
        return replace(self, expansion=expansion, **moving)

    def take(self, which: Tensor) -> Ensemble:
        """Return some of the mixtures."""
        expansion = None if self.expansion is None else self.expansion.take(which)
        return replace(self, expansion=expansion, **{name: getattr(self, name)[which] for name in self.moving})

    def put(self, rows: Tensor, other: Ensemble) -> Ensemble:
        """Replace the mixtures in these rows, with what was expanded about them."""
        moving = {name: getattr(self, name).index_copy(0, rows, getattr(other, name)) for name in self.moving}
        expansion = None if self.expansion is None or other.expansion is None else self.expansion.put(rows, other.expansion)
        return replace(self, expansion=expansion, **moving)

    def origin(self) -> Float[Tensor, "b n"]:
        """Return the coordinates of the mixtures themselves: 0."""
        batch, count, dim = self.loc.shape
        each = 2 * dim + (dim * (dim - 1) // 2 if self.family.covariance == "full" else 0)
        return self.loc.new_zeros(batch, count * (1 + each))

    def trial(self, theta: Float[Tensor, "a n"], rows: Tensor) -> tuple[Float[Tensor, " a"], Float[Tensor, "a n"]]:
        """Return minus the loss and its gradient for some of the mixtures; −∞ and 0 where they aren't finite."""
        count, dim = self.loc.shape[1:]
        nodes = 0 if self.entropy is None else count * len(self.entropy.nodes.z)
        numbers = max(1, count * (len(self.points.x) + nodes) * dim)
        blocks = (one.split(max(1, _MAX_NUMBERS_AT_POINTS // numbers)) for one in (theta, rows))
        parts = [self._trial(*block) for block in zip(*blocks, strict=True)]
        value, slope = (torch.cat(part) for part in zip(*parts, strict=True))
        broken = ~(value.isfinite() & slope.isfinite().all(-1))
        return value.masked_fill(broken, -math.inf), slope.masked_fill(broken[:, None], 0.0)

    def ratios(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return log p − log q at the points of p and at the nodes of each mixture, and the nodes' weights."""
        rows = torch.arange(len(self.logits), device=self.logits.device)
        with torch.no_grad():
            return [self._ratios(self.origin()[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]

    def _trial(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        point = theta.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = [self.objective.loss(at_p, self.points.w, at_q, w) for at_p, at_q, w in self._ratios(point, rows)]
            # Divided by its curvature, every divergence is a KL near q = p, and so tolerances in nats fit all.
            value = -torch.stack(losses) / self.objective.curvature
            if self.entropy is not None:
                value = value - self.entropy.correction(self._read(point, rows), self.nodes)
            if self.expansion is not None:
                value = value - self.expansion.tether[rows] * point.square().sum(-1) / 2
            (slope,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), slope

    def _ratios(self, point: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        logits, loc, tril = self._read(point, rows)
        batch = len(loc)
        at_p = at_q = weight = point.new_zeros(batch, 0)
        if self.objective.reads_p:
            if self.target.samples is not None:
                self.target.evaluations["rows"] += batch * len(self.points.x)
            at_p = self.points.log_p - log_density(self.points.x.expand(batch, -1, -1), logits, loc, tril)
        if self.objective.reads_q:
            x = self.nodes.under(loc, tril)
            value, score = evaluate(self.target, x.detach()) if self.expansion is None else self.expansion.at(x.detach(), rows)
            # log p enters the graph through its score: its value is a constant there.
            log_p = torch.where(value > -math.inf, value - self.log_z + (score * (x - x.detach())).sum(-1), -math.inf)
            weight = (logits.exp()[..., None] * self.nodes.w).reshape(batch, -1)
            # The nodes of a component without weight may lie where p is zero.
            at_q = torch.where(weight > 0, log_p - log_density(x, logits, loc, tril, self.nodes.z), 0.0)
        return list(zip(at_p, at_q, weight, strict=True))

    def _read(self, theta: Float[Tensor, "a n"], rows: Tensor | slice) -> Parts:
        """Return log weights, means and factors at θ, in coordinates whitened by the present mixtures; differentiable."""
        logits, loc, tril = self.logits[rows], self.loc[rows], self.tril[rows]
        count, dim = loc.shape[1:]
        size = logits.exp().clamp(min=_MIN_WEIGHT).sqrt()  # the curvature of a component's coordinates is its weight
        log_weight = (logits + theta[:, :count] / size).log_softmax(-1)
        rest = (theta[:, count:].reshape(len(theta), count, -1)) / size[..., None]
        # The log of a standard deviation has curvature 2 under a normal law: √2 makes it 1.
        factor = torch.diag_embed((rest[..., dim : 2 * dim] / math.sqrt(2)).exp())
        if self.family.covariance == "full":
            row, column = torch.tril_indices(dim, dim, -1, device=theta.device)
            lower = torch.zeros_like(factor)
            lower[..., row, column] = rest[..., 2 * dim :]
            factor = factor + lower
        return log_weight, loc + (tril @ rest[..., :dim, None])[..., 0], tril @ factor


def optima_of(state: Ensemble, settled: float, among: Bool[Tensor, " b"] | None = None) -> tuple[Optimum, ...]:
    """Return the distinct optima, best first, whose gradient is at most `settled`, or all where none is; only those `among`."""
    scale, may = state.objective.curvature, state.loss.isfinite()
    may = may if among is None else may & among
    found = [
        Optimum(model, float(loss) * scale, bool(residual <= settled), False)
        for model, loss, residual, one in zip(state.models(), state.loss, state.residual, may, strict=True)
        if bool(one)
    ]
    same = 0.02 if isinstance(state.family, Gaussian) else 0.05
    return distinct([one for one in found if one.converged] or found, same=same) if found else ()


def first_nodes(family: Gaussian | Mixture, dim: int) -> int:
    """Return the number of nodes per component with which a fit begins: fewer for mixtures of many components."""
    is_large = isinstance(family, Mixture) and family.count > 4
    return max(64, first_count(dim) // 4) if is_large else first_count(dim)


def stacked(models: list[Distribution]) -> Parts:
    """Return the log weights, means and factors of several models."""
    parts = zip(*(components(model)[:3] for model in models), strict=True)
    probs, loc, tril = (torch.stack(part) for part in parts)
    return probs.clamp(min=1e-300).log().to(torch.float64), loc.to(torch.float64), tril.to(torch.float64)
