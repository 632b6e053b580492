"""Shape twins: two samples with the shape of the data and a known log ratio, on which the bias of an estimator is measured.

A flexible classifier gives ℓ, about log p/q, at every row. Labels drawn with the odds that ℓ gives, e^ℓ n/m, divide the same rows
into two new samples, whose log ratio is ℓ. Tails, ends of supports and bumps stay where they are, which no Gaussian twin can do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from whichkl.divergences.samples.logistic import MIN_ROWS, Parts, cross_fit, finer_features, mean_with_error
from whichkl.divergences.samples.sample_distances import standardised

_MANY_ROWS = 20_000
"""Rows of both samples from which on finer features must prove that they help."""


class BetterFit(NamedTuple):
    """A cross-fitted ℓ with its parts; the quadratic ℓ if this one has finer features; if not, how much these lost.

    `lost` is in nats of held-out log loss, over all rows.
    """

    ratio: Tensor
    parts: Parts
    coarse: Tensor | None
    lost: float


@dataclass(frozen=True)
class Pooled:
    """The rows of both samples, the first n of x, and how a classifier is fitted to them."""

    z: Tensor
    n: int
    folds: int
    full: bool
    generator: torch.Generator

    @classmethod
    def of(cls, x: Tensor, y: Tensor, folds: int, generator: torch.Generator) -> Pooled:
        """Standardise the rows together; products of columns need ten rows of the smaller sample each."""
        z, n, rows = standardised(x, y, MIN_ROWS)
        # d squares, d columns and d (d − 1)/2 products: d (d + 3)/2 features.
        full = z.shape[1] * (z.shape[1] + 3) // 2 <= min(rows // 10, 500)
        return cls(z, n, folds, full, generator)

    @property
    def log_odds(self) -> float:
        """Log n/m, which a classifier's logit has and ℓ hasn't."""
        return math.log(self.n / (len(self.z) - self.n))

    def fit(self, z: Tensor, *, fine: bool = False) -> tuple[Tensor, Parts]:
        """Cross-fit rows of the same two sizes."""
        more = finer_features(z, self.generator) if fine else None
        return cross_fit(z, self.n, self.folds, self.full, self.generator, more=more)

    def better_fit(self) -> BetterFit:
        """Cross-fit with and without finer features, and return the better one.

        In doubt that's the finer one: what few rows don't show, a quadratic ℓ denies with a small error; what many rows don't
        show is small.
        """
        coarse, finer = self.fit(self.z), self.fit(self.z, fine=True)
        gain, error = mean_with_error(self._log_loss(coarse[0]) - self._log_loss(finer[0]))
        least = -error if len(self.z) < _MANY_ROWS else error
        if gain > least:
            return BetterFit(*finer, coarse[0], 0.0)
        return BetterFit(*coarse, None, max(0.0, -gain) * len(self.z))

    def at_most(self, most: int) -> Pooled:
        """Return at most this many rows of each sample, chosen at random."""
        if max(self.n, len(self.z) - self.n) <= most:
            return self
        chosen = [torch.randperm(size, generator=self.generator, device="cpu")[:most] for size in (self.n, len(self.z) - self.n)]
        rows = torch.cat([chosen[0], self.n + chosen[1]]).to(self.z.device)
        return replace(self, z=self.z[rows], n=len(chosen[0]))

    def _log_loss(self, ratio: Tensor) -> Tensor:
        """Held-out log loss per row."""
        label = (torch.arange(len(self.z), device=self.z.device) < self.n).to(self.z.dtype)
        return binary_cross_entropy_with_logits(ratio + self.log_odds, label, reduction="none")

    def relabelled(self, ratio: Tensor) -> tuple[Pooled, Tensor]:
        """Return the same rows with labels drawn by ℓ, sorted by label, and ℓ at each; unchanged if too few are drawn."""
        chance = torch.sigmoid(ratio + self.log_odds)
        is_x = torch.rand(len(ratio), generator=self.generator, dtype=ratio.dtype, device="cpu").to(ratio.device) < chance
        order, n = (~is_x).to(torch.int8).argsort(stable=True), int(is_x.sum())
        if min(n, len(ratio) - n) < MIN_ROWS:
            return self, ratio
        return Pooled(self.z[order], n, self.folds, self.full, self.generator), ratio[order]


def lower_bound(ratio: Tensor, n: int) -> float:
    """What KL(p‖q) is at least, on average: E_p ℓ − log E_q eˡ at held-out ℓ.

    Source: Donsker & Varadhan (1983).
    """
    return float(ratio[:n].mean() - ratio[n:].logsumexp(0)) + math.log(len(ratio) - n)
