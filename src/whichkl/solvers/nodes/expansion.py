"""Expansion: what saves evaluations of p where mixtures descend: log p about the nodes, and more nodes for log q alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.nodes.points import Nodes, Parts, log_density

_CURVATURES = (0.1, 100.0)
"""Range of the curvatures of log p, in those of the component."""


@dataclass(frozen=True)
class Expansion:
    """Log p about the nodes of B mixtures, from its values and gradients there and one curvature per component.

    log p(x) ≈ log p(xᵢ) + sᵢ · δ − ½ δᵀ Cₖ δ, δ = x − xᵢ, with Cₖ = −E_qₖ[∇² log p] = −E[s zᵀ] Lₖ⁻¹ over the component's nodes.
    At the nodes its gradient is that of log p, so that mixtures at rest on it are at rest.
    """

    x: Float[Tensor, "b n d"]
    value: Float[Tensor, "b n"]
    score: Float[Tensor, "b n d"]
    curvature: Float[Tensor, "b k d d"]
    tether: Float[Tensor, " b"]
    """Times ½ ‖θ‖², this is added to the loss, so that a step ends where the expansion holds."""

    @classmethod
    def about(cls, x: Tensor, value: Tensor, score: Tensor, tril: Float[Tensor, "b k d d"], nodes: Nodes) -> Expansion:
        """Take the values and gradients at the nodes of components with these factors."""
        by_component = score.unflatten(1, (tril.shape[1], -1)).nan_to_num(0.0, 0.0, 0.0)
        bend = -tril.mT @ torch.einsum("bkmi,mj->bkij", by_component, nodes.w[:, None] * nodes.z)
        size, vector = torch.linalg.eigh((bend + bend.mT) / 2)
        bend = (vector * size.clamp(*_CURVATURES)[..., None, :]) @ vector.mT
        half = torch.linalg.solve_triangular(tril.mT, bend, upper=True)
        curvature = torch.linalg.solve_triangular(tril, half, upper=False, left=False)
        return cls(x, value, score, curvature, torch.zeros_like(value[:, 0]))

    def take(self, which: Tensor) -> Expansion:
        """Return the expansions of some of the mixtures."""
        return Expansion(*(getattr(self, one.name)[which] for one in fields(self)))

    def put(self, rows: Tensor, other: Expansion) -> Expansion:
        """Replace the expansions in these rows."""
        return Expansion(*(getattr(self, one.name).index_copy(0, rows, getattr(other, one.name)) for one in fields(self)))

    def at(self, x: Float[Tensor, "a n d"], rows: Tensor) -> tuple[Float[Tensor, "a n"], Float[Tensor, "a n d"]]:
        """Return the expansion and its gradient."""
        move, curvature, score = x - self.x[rows], self.curvature[rows], self.score[rows]
        bend = torch.einsum("bkij,bkmj->bkmi", curvature, move.unflatten(1, (curvature.shape[1], -1))).flatten(1, 2)
        return self.value[rows] + (move * (score - bend / 2)).sum(-1), score - bend


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
