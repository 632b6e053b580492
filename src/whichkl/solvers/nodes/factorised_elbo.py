"""Factorised ELBO: −ELBO of factorised and of low-rank Gaussians on fixed nodes, with its gradient, in memory of m × d."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.targets import Target

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
