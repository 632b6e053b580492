"""Comparison mixture: log p as the log density of a mixture of Gaussians, fitted to comparisons with a ridge."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import MixtureSameFamily

from whichkl.conversions.comparison_pairs import FOLDS, SCALE_PENALTY, Pairs, comparison_loss, quadratic_features, triangle
from whichkl.families.mixture import mixture
from whichkl.process.torch_modes import autograd_on
from whichkl.solvers.ascents import Trial, ascend

MAX_COMPONENTS = 4
_STARTS = 8
"""Number of starts for each number of components above 1."""
_KEPT = 2
"""Number of these that climb on all comparisons."""
_PAIRS_AT_FIRST, _CALLS_AT_FIRST = 500, 60
"""The starts are ranked by what they reach on this many comparisons in this many calls."""
_TOLERANCE, _MAX_CALLS = 1e-3, 300
"""Nats that a quasi-Newton step may still promise, and the largest number of calls on all comparisons."""
_MEAN_WIDTH = 1.0
"""Standard deviation of the means in their prior, per spread of the points."""
_FIRST_WIDTH = 0.5
"""Width of the components at the start, per spread of the winners."""
_DEVIATION = 0.7
"""Standard deviation of a component's own factor in its prior, times d. Its d² / 2 entries then deviate from I by about a half
together, in every dimension: with more freedom, narrow components explain single answers."""


@dataclass(frozen=True)
class _Layout:
    """θ = (logits, shared factor, then per component its mean and its own factor) of up to `MAX_COMPONENTS` components.

    The precision of component k is Lₖ Lₖᵀ with Lₖ = L Tₖ, lower triangles with the logarithms of their diagonals first; Tₖ is
    near I by its prior.
    """

    dim: int

    @property
    def entries(self) -> int:
        """Number of entries of a triangle."""
        return self.dim * (self.dim + 1) // 2

    def triangle(self, entries: Float[Tensor, "... t"]) -> Float[Tensor, "... d d"]:
        """Return lower triangles."""
        d = self.dim
        row, column = torch.tril_indices(d, d, -1, device=entries.device)
        whole = torch.diag_embed(entries[..., :d].exp())
        whole[..., row, column] = entries[..., d:]
        return whole

    def parts(self, theta: Float[Tensor, "b p"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits (b, K), shared entries (b, t), means (b, K, d) and own entries (b, K, t)."""
        logits, shared, rest = theta.split([MAX_COMPONENTS, self.entries, theta.shape[1] - MAX_COMPONENTS - self.entries], 1)
        means, own = rest.unflatten(1, (MAX_COMPONENTS, -1)).split([self.dim, self.entries], -1)
        return logits, shared, means, own

    def start(self, winners: Float[Tensor, "n d"], count: Int[Tensor, " b"], generator: torch.Generator) -> Float[Tensor, "b p"]:
        """Return equal components at random winners; a single one is at their mean."""
        size = (len(count), MAX_COMPONENTS)
        means = winners[torch.randint(len(winners), size, generator=generator, device="cpu").to(winners.device)]
        means = torch.where((count == 1)[:, None, None], winners.mean(0), means)
        own = means.new_zeros(*size, self.entries)
        shared = means.new_zeros(len(count), self.entries)
        shared[:, : self.dim] = -(_FIRST_WIDTH * winners.std(0).clamp(min=1e-3)).log()
        return torch.cat([means.new_zeros(size), shared, torch.cat([means, own], -1).flatten(1)], 1)

    def log_weights(self, logits: Float[Tensor, "b k"], count: Int[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """Return log π; −∞ for components beyond the count of a row."""
        unused = torch.arange(MAX_COMPONENTS, device=logits.device) >= count[:, None]
        return logits.masked_fill(unused, -math.inf).log_softmax(-1)

    def model(self, theta: Float[Tensor, "b p"], count: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b k f"], Float[Tensor, " b"]]:
        """Return the coefficients of log πₖ N(z; mₖ, Σₖ) in (1, z, `quadratic_features`), and the log prior."""
        logits, shared, mean, own = self.parts(theta)
        d, (i, j) = self.dim, triangle(self.dim, theta.device)
        log_weight, root = self.log_weights(logits, count), self.triangle(shared)
        factor = root[:, None] @ self.triangle(own)
        precision = factor @ factor.mT
        slope = (precision @ mean[..., None])[..., 0]
        log_det = shared[:, None, :d].sum(-1) + own[..., :d].sum(-1)
        constant = log_weight + log_det - (slope * mean).sum(-1) / 2 - d * math.log(2 * math.pi) / 2
        coefficients = torch.cat([constant[..., None], slope, -precision[..., i, j] / 2], -1)
        # Dirichlet(2) for the weights, the prior of a precision for the shared factor, and ridges.
        prior = log_weight.masked_fill(log_weight == -math.inf, 0.0).sum(-1)
        prior = prior + shared[:, :d].sum(-1) - SCALE_PENALTY / 2 * root.square().sum((-1, -2))
        prior = prior - mean.square().sum((-1, -2)) / (2 * _MEAN_WIDTH**2)
        return coefficients, prior - own.square().sum((-1, -2)) * d**2 / (2 * _DEVIATION**2)

    def mixture(self, theta: Float[Tensor, " p"], count: int) -> MixtureSameFamily:
        """Return the distribution of z."""
        of_one = torch.tensor([count], dtype=torch.int64, device=theta.device)
        logits, shared, mean, own = self.parts(theta[None])
        factor = (self.triangle(shared)[:, None] @ self.triangle(own))[0, :count]
        inverse = torch.linalg.solve_triangular(factor, torch.eye(self.dim, dtype=theta.dtype, device=theta.device), upper=False)
        tril = torch.linalg.cholesky(inverse.mT @ inverse)
        return mixture(self.log_weights(logits, of_one)[0, :count].exp(), mean[0, :count], tril, "full")


def _features(pairs: Pairs) -> Float[Tensor, "m f"]:
    z = pairs.points
    return torch.cat([torch.ones_like(z[:, :1]), z, quadratic_features(z)], 1)


def _log_density(features: Float[Tensor, "m f"], coefficients: Float[Tensor, "b k f"]) -> Float[Tensor, "b m"]:
    parts = features @ coefficients.flatten(0, 1).T
    value: Tensor = parts.view(len(features), *coefficients.shape[:2]).logsumexp(-1).T
    return value


def _objective(pairs: Pairs, count: Int[Tensor, " b"], used: Float[Tensor, "b n"]) -> Trial:
    """Return the function that is maximised: the log prior minus the losses of the answers that a row uses; and its gradient."""
    layout, features = _Layout(pairs.dim), _features(pairs)

    def trial(theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with autograd_on():
            point = theta.detach().requires_grad_(True)
            coefficients, prior = layout.model(point, count[rows])
            loss = comparison_loss(pairs.margin(_log_density(features, coefficients)))
            value = prior - (loss * used[rows]).sum(-1)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        good = value.isfinite() & gradient.isfinite().all(-1)
        return torch.where(good, value.detach(), -math.inf), torch.where(good[:, None], gradient, 0.0)

    return trial


def fit_mixtures(pairs: Pairs, generator: torch.Generator) -> list[tuple[MixtureSameFamily, Float[Tensor, " n"]]]:
    """Return mixtures of 1, 2, … components, and the loss of each answer by a fit without its fold.

    All starts, numbers of components and folds climb in one batch, by L-BFGS. A call costs one product of the quadratic features
    of all points with the coefficients of all components.

    Args:
        pairs: the comparisons, in random order.
        generator: chooses where the starts are.
    """
    layout, device = _Layout(pairs.dim), pairs.offset.device
    count = torch.tensor(
        [1, *(k for k in range(2, MAX_COMPONENTS + 1) for _ in range(_STARTS))], dtype=torch.int64, device=device
    )
    few = pairs.take(torch.arange(min(_PAIRS_AT_FIRST, len(pairs)), device=device))
    every = torch.ones_like(count, dtype=pairs.offset.dtype)[:, None]
    start = layout.start(pairs.winners, count, generator)
    ranked = ascend(_objective(few, count, every), start, 0.1, _CALLS_AT_FIRST).value
    kept = torch.cat([_highest(ranked, count == k, _KEPT) for k in range(1, MAX_COMPONENTS + 1)])
    # Folds begin at the starts too: from θ, which knows all answers, they would keep knowing those that they hold out.
    held = torch.arange(FOLDS + 1, device=device)[:, None] == pairs.fold  # the last row holds nothing out
    used, counts = (~held).to(every).repeat_interleave(len(kept), 0), count[kept].repeat(FOLDS + 1)
    ends = ascend(_objective(pairs, counts, used), start[kept].repeat(FOLDS + 1, 1), _TOLERANCE, _MAX_CALLS)
    fold = torch.arange(FOLDS + 1, device=device).repeat_interleave(len(kept))
    found = []
    for k in range(1, MAX_COMPONENTS + 1):
        best = torch.cat([_highest(ends.value, (counts == k) & (fold == i), 1) for i in range(FOLDS + 1)])
        theta = ends.x[best]
        loss = comparison_loss(pairs.margin(_log_density(_features(pairs), layout.model(theta, counts[best])[0])))
        found.append((layout.mixture(theta[-1], k), (loss * held).sum(0)))
    return found


def _highest(value: Float[Tensor, " b"], among: Tensor, most: int) -> Int[Tensor, " m"]:
    rows = among.nonzero()[:, 0]
    return rows[value[rows].topk(min(most, len(rows))).indices]
