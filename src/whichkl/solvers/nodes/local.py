"""Local: what saves evaluations of p where mixtures descend: an expansion of log p about the nodes, and more nodes for log q."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from whichkl.solvers.nodes.ensemble import Nodes

_CURVATURES = (0.1, 100.0)
"""Range of the curvatures of log p, in those of the component."""


@dataclass(frozen=True)
class Local:
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
    def about(cls, x: Tensor, value: Tensor, score: Tensor, tril: Float[Tensor, "b k d d"], nodes: Nodes) -> Local:
        """Take the values and gradients at the nodes of components with these factors."""
        by_component = score.unflatten(1, (tril.shape[1], -1)).nan_to_num(0.0, 0.0, 0.0)
        bend = -tril.mT @ torch.einsum("bkmi,mj->bkij", by_component, nodes.w[:, None] * nodes.z)
        size, vector = torch.linalg.eigh((bend + bend.mT) / 2)
        bend = (vector * size.clamp(*_CURVATURES)[..., None, :]) @ vector.mT
        half = torch.linalg.solve_triangular(tril.mT, bend, upper=True)
        curvature = torch.linalg.solve_triangular(tril, half, upper=False, left=False)
        return cls(x, value, score, curvature, torch.zeros_like(value[:, 0]))

    def take(self, which: Tensor) -> Local:
        """Return the expansions of some of the mixtures."""
        return Local(*(getattr(self, one.name)[which] for one in fields(self)))

    def put(self, rows: Tensor, other: Local) -> Local:
        """Replace the expansions in these rows."""
        return Local(*(getattr(self, one.name).index_copy(0, rows, getattr(other, one.name)) for one in fields(self)))

    def at(self, x: Float[Tensor, "a n d"], rows: Tensor) -> tuple[Float[Tensor, "a n"], Float[Tensor, "a n d"]]:
        """Return the expansion and its gradient."""
        move, curvature, score = x - self.x[rows], self.curvature[rows], self.score[rows]
        bend = torch.einsum("bkij,bkmj->bkmi", curvature, move.unflatten(1, (curvature.shape[1], -1))).flatten(1, 2)
        return self.value[rows] + (move * (score - bend / 2)).sum(-1), score - bend


def left_of(value: Float[Tensor, "b n"], slope: Float[Tensor, "b n d"], tril: Float[Tensor, "b k d d"], nodes: Nodes) -> Tensor:
    """Return what is left of a function at the nodes of each component without the quadratic that its gradient gives."""
    pull = slope.unflatten(1, (tril.shape[1], -1)) @ tril
    weighted = nodes.w[:, None] * nodes.z
    line, bend = (pull * nodes.w[:, None]).sum(2), torch.einsum("bkmi,mj->bkij", pull, weighted)
    bent = torch.einsum("mi,bkij,mj->bkm", nodes.z, (bend + bend.mT) / 2, nodes.z)
    left = value.unflatten(1, (tril.shape[1], -1)) - torch.einsum("mi,bki->bkm", nodes.z, line) - bent / 2
    unexplained: Tensor = left - (left * nodes.w).sum(-1, keepdim=True)
    return unexplained.flatten(1)
