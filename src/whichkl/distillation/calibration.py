"""Calibration: is a classifier right as often as it is confident; the expected calibration error (ECE) with its error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.files.reading import rebuilt

BINS = 15
_RESAMPLES = 200


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins of equal width by their confidence, the largest probability: bin m is ((m − 1)/M, m/M].

    ECE = Σₘ (nₘ/n) |accuracyₘ − confidenceₘ|. It depends on the number of bins, and is biased upwards, the more so the fewer
    rows there are: compare it only on the same rows. Source: Guo et al., On calibration of modern neural networks (2017).
    """

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    """Its mean in each bin; 0 in an empty one."""
    accuracy: tuple[float, ...]

    @property
    def ece(self) -> float:
        """The expected calibration error, between 0 and 1."""
        gaps = zip(self.counts, self.accuracy, self.confidence, strict=True)
        return sum(n * abs(a - c) for n, a, c in gaps) / max(1, sum(self.counts))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {name: list(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Reliability:
        """Rebuild it from `to_dict`."""
        return rebuilt(cls, fields)


def reliability(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], bins: int = BINS) -> Reliability:
    """Sort predictions into bins.

    >>> one = reliability(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([1, 0]), bins=2)
    >>> one.counts, round(one.ece, 3)
    ((1, 1), 0.25)
    """
    confidence, right, bin_of = _binned(logits, labels, bins)
    counts = torch.bincount(bin_of, minlength=bins)
    means = [torch.bincount(bin_of, one, minlength=bins) / counts.clamp(min=1) for one in (confidence, right)]
    return Reliability(tuple(counts.tolist()), tuple(means[0].tolist()), tuple(means[1].tolist()))


def ece_resampled(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], bins: int = BINS) -> Float[Tensor, " resamples"]:
    """Return the ECE of 200 bootstrap samples of the rows, the same rows for every classifier."""
    confidence, right, bin_of = _binned(logits, labels, bins)
    generator, n = torch.Generator().manual_seed(0), len(labels)
    found = []
    for _ in range(_RESAMPLES):
        rows = torch.randint(n, (n,), generator=generator, device="cpu")
        gap = torch.bincount(bin_of[rows], (right - confidence)[rows], minlength=bins)
        found.append(gap.abs().sum() / n)
    return torch.stack(found)


def _binned(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    confidence, chosen = logits.double().softmax(-1).max(-1)
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return confidence, (chosen == labels).double(), bin_of
