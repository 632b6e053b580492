"""Scores: a student against its teacher on examples that neither training nor stopping has seen, each with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import plain
from whichkl.distillation.losses import forward_kl, reverse_kl
from whichkl.divergences import Estimate
from whichkl.files.reading import rebuilt

BINS = 15
"""Bins of confidence that scores use."""
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


def _binned(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return confidence, whether the prediction is right, and the number of the bin."""
    confidence, chosen = logits.double().softmax(-1).max(-1)
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return confidence, (chosen == labels).double(), bin_of


@dataclass(frozen=True)
class Contrast:
    """The same measure of student and teacher, and the difference, whose error is that of pairs."""

    student: Estimate
    teacher: Estimate
    difference: Estimate | None
    """Student − teacher; None where one is infinite."""


@dataclass(frozen=True)
class Scores:
    """Scores on held-out examples; `accuracy`, `nll` and `ece` need labels. Everything is at temperature 1."""

    rows: int
    classes: int
    agreement: Estimate
    """Share of rows in which both find the same class likeliest."""
    forward_kl: Estimate
    """KL(teacher‖student), the mean over rows."""
    reverse_kl: Estimate
    """KL(student‖teacher)."""
    accuracy: Contrast | None = None
    nll: Contrast | None = None
    """Mean −log probability of the label, a cross-entropy."""
    ece: Contrast | None = None
    reliability: Mapping[str, Reliability] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        fields: dict[str, Any] = plain(asdict(self))
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Scores:
        """Rebuild them from `to_dict`."""
        return rebuilt(cls, fields)


def scored(*, teacher: Float[Tensor, "n c"], student: Float[Tensor, "n c"], labels: Int[Tensor, " n"] | None) -> Scores:
    """Score logits of a student against those of its teacher.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> print(scored(teacher=logits, student=logits, labels=None).forward_kl.number)
    0.0000 ± 0.0000
    """
    p, q = teacher.detach().cpu().double(), student.detach().cpu().double()
    forward, reverse = (divergence(teacher=p, student=q, reduction="none") for divergence in (forward_kl, reverse_kl))
    common: dict[str, Any] = {
        "rows": len(p),
        "classes": p.shape[-1],
        "agreement": _share("agreement", p.argmax(-1) == q.argmax(-1)),
        "forward_kl": _mean("forward_kl", forward, "mean over rows of KL(teacher‖student)"),
        "reverse_kl": _mean("reverse_kl", reverse, "mean over rows of KL(student‖teacher)"),
    }
    if labels is None:
        return Scores(**common)
    y = labels.detach().cpu()
    right = [one.argmax(-1) == y for one in (q, p)]
    gain = _mean("accuracy", right[0].double() - right[1].double(), "mean of pairs", unit="none")
    nll = [-one.log_softmax(-1).gather(-1, y[:, None])[:, 0] for one in (q, p)]
    is_finite = all(bool(one.isfinite().all()) for one in nll)
    bins = {"student": reliability(q, y), "teacher": reliability(p, y)}
    return Scores(
        **common,
        accuracy=Contrast(_share("accuracy", right[0]), _share("accuracy", right[1]), gain),
        nll=Contrast(
            _mean("nll", nll[0], "mean −log probability of the label"),
            _mean("nll", nll[1], "mean −log probability of the label"),
            _mean("nll", nll[0] - nll[1], "mean of pairs") if is_finite else None,
        ),
        ece=_ece(q, p, y, bins["student"].ece, bins["teacher"].ece),
        reliability=bins,
    )


def _mean(quantity: str, values: Float[Tensor, " n"], method: str, unit: Any = "nats") -> Estimate:
    n, infinite = len(values), int((values == math.inf).sum())
    if infinite:
        note = f"infinite in {infinite} of {n} rows"
        return Estimate(quantity, math.inf, finite="infinite", method=method, n=n, notes=(note,), unit=unit)
    error = float(values.std() / math.sqrt(n)) if n > 1 else math.inf
    return Estimate(quantity, float(values.mean()), error, method=method, n=n, unit=unit)


def _share(quantity: str, hits: Bool[Tensor, " n"]) -> Estimate:
    """A share; its error is that of two more hits and misses, which isn't 0 at the ends (Agresti & Coull, 1998)."""
    n, k = len(hits), int(hits.sum())
    near = (k + 2) / (n + 4)
    return Estimate(quantity, k / n, math.sqrt(near * (1 - near) / (n + 4)), method="share of rows", n=n, unit="none")


def _ece(q: Tensor, p: Tensor, labels: Tensor, student: float, teacher: float) -> Contrast:
    """Compare the ECE of both sides, with errors from bootstrap samples of the rows, the same ones for both."""
    n, method = len(labels), f"{BINS} bins of equal width, error by bootstrap"
    resampled = []
    for logits in (q, p):
        generator = torch.Generator().manual_seed(0)  # the same for both sides, so that their difference is that of pairs
        confidence, right, bin_of = _binned(logits, labels, BINS)
        found = []
        for _ in range(_RESAMPLES):
            rows = torch.randint(n, (n,), generator=generator, device="cpu")
            found.append(torch.bincount(bin_of[rows], (right - confidence)[rows], minlength=BINS).abs().sum() / n)
        resampled.append(torch.stack(found))
    values = (student, teacher, student - teacher)
    return Contrast(
        *(
            Estimate("ece", value, float(one.std()), method=method, n=n, unit="none")
            for value, one in zip(values, (*resampled, resampled[0] - resampled[1]), strict=True)
        )
    )
