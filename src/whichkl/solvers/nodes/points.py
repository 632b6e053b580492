"""Points: fixed points of p, nodes of q's components, and the log densities of both there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.targets import Target

Parts = tuple[Float[Tensor, "b k"], Float[Tensor, "b k d"], Float[Tensor, "b k d d"]]
"""Log weights, means and factors of B mixtures."""


@dataclass(frozen=True)
class Points:
    """Points of p, their weights, Σ w = 1, and log p there."""

    x: Float[Tensor, "n d"]
    w: Float[Tensor, " n"]
    log_p: Float[Tensor, " n"]

    @classmethod
    def none(cls, target: Target) -> Points:
        """Return no points, for an objective that reads q alone."""
        empty = torch.zeros(0, dtype=torch.float64, device=target.device)
        return cls(empty.reshape(0, target.dim), empty, empty)

    def at(self, rows: Tensor | slice) -> Points:
        """Return some of the points, with weights that sum to one again."""
        w = self.w[rows]
        return Points(self.x[rows], w / w.sum(), self.log_p[rows])


@dataclass(frozen=True)
class Nodes:
    """A rule for N(0, I), which is carried to every component."""

    z: Float[Tensor, "m d"]
    w: Float[Tensor, " m"]

    @classmethod
    def of(cls, target: Target, count: int, seed: int) -> Nodes:
        """Return `count` nodes, others for each count."""
        # Other nodes for each count: half of the same nodes would make a doubling look settled.
        z, w = gaussian_rule(target.dim, count, seed + count)
        return cls(z.to(target.device), w.to(target.device))

    def under(self, loc: Float[Tensor, "b k d"], tril: Float[Tensor, "b k d d"]) -> Float[Tensor, "b n d"]:
        """Carry the rule to every component: mₖ + Lₖ zᵢ."""
        return (loc[:, :, None] + torch.einsum("bkij,mj->bkmi", tril, self.z)).flatten(1, 2)

    @cached_property
    def weighted(self) -> Float[Tensor, "m 1+d"]:
        """The columns w and w z, which make an expectation and its products with z of values at the nodes."""
        return torch.cat([self.w[:, None], self.w[:, None] * self.z], 1)


def log_density(
    x: Float[Tensor, "b n d"], logits: Float[Tensor, "b k"], loc: Tensor, tril: Tensor, z: Float[Tensor, "m d"] | None = None
) -> Float[Tensor, "b n"]:
    """Return the log of the mixture at given points, by one triangular solve per component.

    With z the n = K m points are mₖ + Lₖ zᵢ, and each component uses its own zᵢ. Solving for zᵢ would lose its digits where Lₖ is
    nearly singular, and the descent would find the places where that makes log q small.
    """
    dim = x.shape[-1]
    identity = torch.eye(dim, dtype=x.dtype, device=x.device)
    inverse = torch.linalg.solve_triangular(tril, identity.expand_as(tril), upper=False)
    white = torch.einsum("bkij,bnj->bkni", inverse, x) - torch.einsum("bkij,bkj->bki", inverse, loc)[:, :, None]
    if z is not None:
        count = loc.shape[1]
        own = torch.eye(count, dtype=torch.bool, device=x.device).repeat_interleave(len(z), 1)
        white = torch.where(own[..., None], z.repeat(count, 1), white)
    volume = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * dim * math.log(2 * math.pi)
    return torch.logsumexp((logits - volume)[..., None] - white.square().sum(-1) / 2, 1)


def evaluate(target: Target, x: Float[Tensor, "b m d"]) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m d"]]:
    """Return log p and ∇log p at a batch of node sets, in one call."""
    value, score = target.trial(x.reshape(-1, x.shape[-1]))
    return value.reshape(x.shape[:2]), score.reshape(x.shape)
