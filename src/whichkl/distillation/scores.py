"""Scores: a student against its teacher on examples that neither training nor stopping has seen, each with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import plain
from whichkl.distillation.calibration import BINS, Reliability, ece_resampled, reliability
from whichkl.distillation.losses import forward_kl, reverse_kl
from whichkl.divergences import Estimate
from whichkl.files.reading import rebuilt


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
    same = p.argmax(-1) == q.argmax(-1)
    kl = [divergence(teacher=p, student=q, reduction="none") for divergence in (forward_kl, reverse_kl)]
    common: dict[str, Any] = {
        "rows": len(p),
        "classes": p.shape[-1],
        "agreement": _share("agreement", same),
        "forward_kl": _mean("forward_kl", kl[0], "mean over rows of KL(teacher‖student)"),
        "reverse_kl": _mean("reverse_kl", kl[1], "mean over rows of KL(student‖teacher)"),
    }
    if labels is None:
        return Scores(**common)
    y = labels.detach().cpu()
    right = [one.argmax(-1) == y for one in (q, p)]
    nll = [-one.log_softmax(-1).gather(-1, y[:, None])[:, 0] for one in (q, p)]
    gap = right[0].double() - right[1].double()
    bins = {"student": reliability(q, y), "teacher": reliability(p, y)}
    return Scores(
        **common,
        accuracy=Contrast(
            _share("accuracy", right[0]), _share("accuracy", right[1]), _mean("accuracy", gap, "mean of pairs", unit="none")
        ),
        nll=Contrast(
            _mean("nll", nll[0], "mean −log probability of the label"),
            _mean("nll", nll[1], "mean −log probability of the label"),
            _mean("nll", nll[0] - nll[1], "mean of pairs") if all(bool(one.isfinite().all()) for one in nll) else None,
        ),
        ece=_calibration(q, p, y, bins),
        reliability=bins,
    )


def _mean(quantity: str, values: Float[Tensor, " n"], method: str, unit: Any = "nats") -> Estimate:
    n = len(values)
    if bool((values == math.inf).any()):
        note = f"infinite in {int((values == math.inf).sum())} of {n} rows"
        return Estimate(quantity, math.inf, finite="infinite", method=method, n=n, notes=(note,), unit=unit)
    error = float(values.std() / math.sqrt(n)) if n > 1 else math.inf
    return Estimate(quantity, float(values.mean()), error, method=method, n=n, unit=unit)


def _share(quantity: str, hits: Bool[Tensor, " n"]) -> Estimate:
    """A share; its error is that of two more hits and misses, which isn't 0 at the ends (Agresti & Coull, 1998)."""
    n, k = len(hits), int(hits.sum())
    near = (k + 2) / (n + 4)
    return Estimate(quantity, k / n, math.sqrt(near * (1 - near) / (n + 4)), method="share of rows", n=n, unit="none")


def _calibration(q: Tensor, p: Tensor, labels: Tensor, bins: Mapping[str, Reliability]) -> Contrast:
    method = f"{BINS} bins of equal width, error by bootstrap"
    student, teacher = ece_resampled(q, labels), ece_resampled(p, labels)

    def one(value: float, resampled: Tensor) -> Estimate:
        return Estimate("ece", value, float(resampled.std()), method=method, n=len(labels), unit="none")

    a, b = bins["student"].ece, bins["teacher"].ece
    return Contrast(one(a, student), one(b, teacher), one(a - b, student - teacher))
