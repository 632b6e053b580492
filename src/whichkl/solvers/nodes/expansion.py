"""Expansion: what saves evaluations of p where mixtures descend: log p about the nodes, and more nodes for log q alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.nodes.points import Nodes, Parts, log_density

_CURVATURES = (0.1, 100.0)
"""Range of the curvatures of log p, in those of the component."""
_CHANGES = (-0.9, 9.0)
"""Range of the change of rank one: a curvature becomes at least a tenth, and at most ten times, of what it was."""
_MIN_COSINE = 0.01
"""Smallest cosine between a step and what the gradient lacked there, from which the change is taken."""


@dataclass(frozen=True)
class Expansion:
    """Log p about the nodes of B mixtures, from its values and gradients there and one curvature per component.

    log p(x) ≈ log p(xᵢ) + sᵢ · δ − ½ δᵀ Cₖ δ, δ = x − xᵢ, with Cₖ = −E_qₖ[∇² log p] = −E[s zᵀ] Lₖ⁻¹ over the component's nodes.
    At the nodes its gradient is that of log p, so that mixtures at rest on it are at rest. If it recalls the nodes of the step
    before, each Cₖ is changed by a matrix of rank one per node, so that it has the gradient of log p there, too.

    Source: the symmetric update of rank one, Davidon (1959), Conn, Gould & Toint (1991).
    """

    x: Float[Tensor, "b n d"]
    value: Float[Tensor, "b n"]
    score: Float[Tensor, "b n d"]
    curvature: Float[Tensor, "b k d d"]
    spread: Float[Tensor, "b k d d"]
    """A root S of the inverse of each curvature, S Sᵀ = Cₖ⁻¹."""
    missed: Float[Tensor, "b n d"]
    """What the gradient at the nodes before lacks without the change of rank one."""
    share: Float[Tensor, "b n"]
    """The factor of the change."""
    tether: Float[Tensor, " b"]
    """Times ½ ‖θ‖², this is added to the loss, so that a step ends where the expansion holds."""

    @classmethod
    def about(cls, x: Tensor, value: Tensor, score: Tensor, tril: Float[Tensor, "b k d d"], nodes: Nodes) -> Expansion:
        """Take the values and gradients at the nodes of components with these factors."""
        by_component = score.unflatten(1, (tril.shape[1], -1)).nan_to_num(0.0, 0.0, 0.0)
        bend = -tril.mT @ torch.einsum("bkmi,mj->bkij", by_component, nodes.w[:, None] * nodes.z)
        size, vector = torch.linalg.eigh((bend + bend.mT) / 2)
        root = size.clamp(*_CURVATURES).sqrt()[..., None, :]
        half = torch.linalg.solve_triangular(tril.mT, vector * root, upper=True)
        none = torch.zeros_like(value)
        return cls(x, value, score, half @ half.mT, tril @ vector / root, torch.zeros_like(x), none, none[:, 0])

    def recalling(self, before: Expansion) -> Expansion:
        """Return the expansion with the gradients at the nodes of another one, as far as its curvatures stay in their range."""
        move = before.x - self.x
        missed = (self.score - before.score - self._times_curvature(move)).nan_to_num(0.0, 0.0, 0.0)
        along = (missed * move).sum(-1)
        size = (
            torch.einsum("bkij,bkmi->bkmj", self.spread, missed.unflatten(1, (self.spread.shape[1], -1)))
            .square()
            .sum(-1)
            .flatten(1)
        )
        # The curvatures become C + share · missed missedᵀ, with a change of share · size in their own measure.
        share = torch.minimum(torch.maximum(1 / along, _CHANGES[0] / size), _CHANGES[1] / size)
        is_sure = along.abs() > _MIN_COSINE * torch.linalg.vector_norm(missed, dim=-1) * torch.linalg.vector_norm(move, dim=-1)
        return replace(self, missed=missed, share=torch.where(is_sure & share.isfinite(), share, 0.0))

    def joined(self, other: Expansion) -> Expansion:
        """Return the expansions of both."""
        return Expansion(*(torch.cat([getattr(self, one.name), getattr(other, one.name)]) for one in fields(self)))

    def take(self, which: Tensor) -> Expansion:
        """Return the expansions of some of the mixtures."""
        return Expansion(*(getattr(self, one.name)[which] for one in fields(self)))

    def put(self, rows: Tensor, other: Expansion) -> Expansion:
        """Replace the expansions in these rows."""
        return Expansion(*(getattr(self, one.name).index_copy(0, rows, getattr(other, one.name)) for one in fields(self)))

    def at(self, x: Float[Tensor, "a n d"], rows: Tensor) -> tuple[Float[Tensor, "a n"], Float[Tensor, "a n d"]]:
        """Return the expansion and its gradient."""
        here = self.take(rows)
        move = x - here.x
        bend = here._times_curvature(move) + here.missed * (here.share * (here.missed * move).sum(-1))[..., None]
        return here.value + (move * (here.score - bend / 2)).sum(-1), here.score - bend

    def _times_curvature(self, move: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        by_component = move.unflatten(1, (self.curvature.shape[1], -1))
        product: Tensor = torch.einsum("bkij,bkmj->bkmi", self.curvature, by_component).flatten(1, 2)
        return product


@dataclass(frozen=True)
class Entropy:
    """More nodes at which log q alone is evaluated: its part of reverse KL, E_q[log q], needs nothing of p.

    If log p is nearly quadratic, nearly all of the error of the nodes comes from log q, and is gone with `share` = 1. If q is
    nearly p, the errors of both cancel at common nodes, and `share` = 0 leaves them there.
    """

    nodes: Nodes
    share: float

    def correction(self, parts: Parts, nodes: Nodes) -> Float[Tensor, " a"]:
        """Return `share` times the difference of E_q[log q] on these nodes and on others."""
        logits, loc, tril = parts
        if self.share == 0:
            return torch.zeros_like(logits[:, 0])
        means = [
            ((logits.exp()[..., None] * one.w).flatten(1) * log_density(one.under(loc, tril), logits, loc, tril, one.z)).sum(-1)
            for one in (self.nodes, nodes)
        ]
        correction: Tensor = self.share * (means[0] - means[1])
        return correction


def left_of(value: Float[Tensor, "b n"], slope: Float[Tensor, "b n d"], tril: Float[Tensor, "b k d d"], nodes: Nodes) -> Tensor:
    """Return what is left of a function at the nodes of each component without the quadratic that its gradient gives."""
    pull = slope.unflatten(1, (tril.shape[1], -1)) @ tril
    weighted = nodes.w[:, None] * nodes.z
    line, bend = (pull * nodes.w[:, None]).sum(2), torch.einsum("bkmi,mj->bkij", pull, weighted)
    bent = torch.einsum("mi,bkij,mj->bkm", nodes.z, (bend + bend.mT) / 2, nodes.z)
    value = value.nan_to_num(0.0, 0.0, 0.0)  # −∞ where a component without weight meets p = 0
    left = value.unflatten(1, (tril.shape[1], -1)) - torch.einsum("mi,bki->bkm", nodes.z, line) - bent / 2
    unexplained: Tensor = left - (left * nodes.w).sum(-1, keepdim=True)
    return unexplained.flatten(1)
