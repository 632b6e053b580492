"""Mixtures: several at once on nodes stratified over their components, climbing the ELBO together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families import Mixture
from whichkl.families.mixture import mixture
from whichkl.solvers.nodes.batched_lbfgs import ascend
from whichkl.solvers.nodes.gaussians import evaluate
from whichkl.targets import Target

_LEAST = 1e-8
"""The least weight of a component whose coordinates are whitened by it; one that has died stays where it is."""
_MOVING = ("logits", "loc", "tril", "elbo", "residual")


@dataclass(frozen=True)
class Mixtures:
    """B mixtures of K Gaussians, Σ πₖ N(mₖ, LₖLₖᵀ), with their ELBO Σₖ πₖ Σᵢ wᵢ (log p − log q)(mₖ + Lₖ zᵢ).

    The residual is the length of the ELBO's gradient in whitened coordinates: mₖ + Lₖ a / √πₖ, Lₖ T, in which a component
    that the others don't touch has curvature 1.

    Source: Morningstar et al. (2021) for nodes stratified over the components.
    """

    family: Mixture
    target: Target
    z: Float[Tensor, "m d"]
    w: Float[Tensor, " m"]
    logits: Float[Tensor, "b k"]
    loc: Float[Tensor, "b k d"]
    tril: Float[Tensor, "b k d d"]
    elbo: Float[Tensor, " b"]
    residual: Float[Tensor, " b"]

    @classmethod
    def at(cls, family: Mixture, target: Target, z: Tensor, w: Tensor, logits: Tensor, loc: Tensor, tril: Tensor) -> Mixtures:
        """Evaluate the target at B × K × m points in one call."""
        unknown = logits.new_zeros(len(logits))
        here = cls(family, target, z, w, logits.log_softmax(-1), loc, tril, unknown, unknown)
        elbo, slope = here._trial(here._origin(), torch.arange(len(logits), device=logits.device))
        residual = torch.linalg.vector_norm(slope, dim=-1)
        broken = ~(elbo.isfinite() & residual.isfinite())
        return replace(here, elbo=elbo.masked_fill(broken, -math.inf), residual=residual.masked_fill(broken, math.inf))

    def moved(self, logits: Tensor, loc: Tensor, tril: Tensor) -> Mixtures:
        """Evaluate others on the same nodes."""
        return Mixtures.at(self.family, self.target, self.z, self.w, logits, loc, tril)

    def ascended(self, max_calls: int, tolerance: float = 1e-10) -> Mixtures:
        """Climb by L-BFGS in the coordinates whitened by each component."""
        peaks = ascend(self._trial, self._origin(), tolerance=tolerance, max_calls=max_calls)
        return self.moved(*self._read(peaks.x, slice(None)))

    def models(self) -> list[Distribution]:
        """The mixtures as distributions."""
        parts = zip(self.logits, self.loc, self.tril, strict=True)
        return [mixture(logits.softmax(-1), loc, tril, self.family.covariance) for logits, loc, tril in parts]

    def take(self, which: Bool[Tensor, " b"]) -> Mixtures:
        """Select some of the mixtures."""
        return replace(self, **{name: getattr(self, name)[which] for name in _MOVING})

    def put(self, active: Bool[Tensor, " b"], better: Bool[Tensor, " a"], trial: Mixtures) -> Mixtures:
        """Replace those active ones that got better."""
        index = active.nonzero()[:, 0][better]
        return replace(self, **{name: getattr(self, name).index_copy(0, index, getattr(trial, name)[better]) for name in _MOVING})

    @property
    def points(self) -> int:
        """At which a call evaluates the target."""
        return self.loc.shape[0] * self.loc.shape[1] * len(self.z)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.loc.shape[0], self.loc.shape[1], self.loc.shape[2]

    def _origin(self) -> Tensor:
        batch, count, dim = self._shape
        each = 2 * dim + (dim * (dim - 1) // 2 if self.family.covariance == "full" else 0)
        return self.loc.new_zeros(batch, count * (1 + each))

    def _read(self, theta: Float[Tensor, "a n"], rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        return read(theta, self.logits[rows], self.loc[rows], self.tril[rows], is_full=self.family.covariance == "full")

    def _trial(self, theta: Float[Tensor, "a n"], rows: Tensor) -> tuple[Float[Tensor, " a"], Float[Tensor, "a n"]]:
        """The ELBO and its gradient, for some of the mixtures."""
        point = theta.detach().requires_grad_(True)
        with torch.enable_grad():
            logits, loc, tril = self._read(point, rows)
            batch, count, dim = loc.shape
            x = loc[:, :, None] + torch.einsum("bkij,mj->bkmi", tril, self.z)
            flat = x.reshape(batch, -1, dim)
            value, score = evaluate(self.target, flat.detach())
            log_q = log_density(flat, logits, loc, tril, self.z)
            weight = (logits.exp()[..., None] * self.w).reshape(batch, -1)
            gain = torch.where(weight > 0, value - log_q, 0.0)
            elbo = (weight * gain).sum(-1)
            # log p enters the graph through its score: its value is a constant there.
            pulled = elbo.sum() + (weight.detach()[..., None] * score * flat).sum()
            (slope,) = torch.autograd.grad(pulled, point)
        elbo = elbo.detach()
        return torch.where(elbo.isnan(), -math.inf, elbo), slope.nan_to_num(0.0, 0.0, 0.0)


def read(
    theta: Float[Tensor, "a n"], logits: Float[Tensor, "a k"], loc: Float[Tensor, "a k d"], tril: Tensor, *, is_full: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights, means and factors that θ stands for, in coordinates whitened by the given ones; differentiable."""
    count, dim = loc.shape[1:]
    size = logits.exp().clamp(min=_LEAST).sqrt()  # curvature of a component's coordinates: its weight
    log_weight = (logits + theta[:, :count] / size).log_softmax(-1)
    rest = (theta[:, count:].reshape(len(theta), count, -1)) / size[..., None]
    grow = (rest[..., dim : 2 * dim] / math.sqrt(2)).exp()
    factor = torch.diag_embed(grow)
    if is_full:
        row, column = torch.tril_indices(dim, dim, -1, device=theta.device)
        lower = torch.zeros_like(factor)
        lower[..., row, column] = rest[..., 2 * dim :]
        factor = factor + lower
    return log_weight, loc + (tril @ rest[..., :dim, None])[..., 0], tril @ factor


def log_density(
    x: Float[Tensor, "b n d"], logits: Float[Tensor, "b k"], loc: Tensor, tril: Tensor, z: Float[Tensor, "m d"] | None = None
) -> Float[Tensor, "b n"]:
    """Log of the mixture at given points, by one triangular solve a component.

    With z the points are mₖ + Lₖ zᵢ, n = K m of them, and each component knows its own: solved for, they would lose their digits
    where Lₖ is nearly singular, and climbing the ELBO would find the places where that makes log q small.
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
