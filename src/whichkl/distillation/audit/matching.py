"""Matching: the gradient or the values of a loss against every row divergence, with fitted parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.distillation.audit.search import (
    RANGES,
    TOLERANCE,
    TOLERANCE_OF_NARROW,
    Fit,
    Match,
    grid_of,
    plainest,
    refined,
    search,
    turned,
)
from whichkl.distillation.losses import DIVERGENCES, RowDivergence

Rows = Float[Tensor, "n v"]


@dataclass(frozen=True)
class AuditBatch:
    """The rows that count in a call, and what the call returned."""

    teacher: Rows
    student: Rows
    labels: Float[Tensor, " n"]
    value: float
    gradient: Rows


def by_gradient(batch: AuditBatch, labels: bool, unit: float, is_known: bool = False) -> Match | None:
    """Match the gradient of one batch of logits of this unit; None if nothing in the reference family is near it.

    A match that leaves more than `TOLERANCE` is only the nearest, for a loss that rounds or that changes rare tokens.
    """
    return search(_gradient_fit(batch, labels), batch.gradient, unit, TOLERANCE_OF_NARROW, is_known)


def same_gradient(match: Match, batch: AuditBatch) -> bool:
    """Whether a divergence that was found by values has the gradient that was seen."""
    found = _gradient_fit(batch, bool(match.on_labels))(match.divergence, match.temperature)
    near = max(abs(found.factor - match.factor) / abs(match.factor), abs(found.on_labels - match.on_labels) / abs(match.factor))
    return found.left < 10 * TOLERANCE and near < 10 * TOLERANCE


def residual(match: Match, batch: AuditBatch) -> Tensor:
    """What a match leaves of the gradient of a batch."""
    return batch.gradient.flatten() - expected_gradient(match, batch)


def expected_gradient(match: Match, batch: AuditBatch) -> Tensor:
    """The gradient of a match, flat."""
    return match.factor * _reference(batch, match.divergence, match.temperature) + match.on_labels * _hard_gradient(batch)


def _reference(batch: AuditBatch, divergence: RowDivergence, temperature: float) -> Tensor:
    log_p, log_q = log_probs(batch.teacher, temperature), log_probs(batch.student, temperature)
    return divergence.gradient(log_p, log_q)[1].flatten() / temperature


def _gradient_fit(batch: AuditBatch, labels: bool) -> Fit:
    return _least_squares(partial(_reference, batch), batch.gradient.flatten(), _hard_gradient(batch) if labels else None)


def _hard_gradient(batch: AuditBatch) -> Tensor:
    """The gradient of the sum of the cross-entropies with the labels."""
    q = batch.student.softmax(-1)
    return q.scatter_add(-1, batch.labels[:, None], q.new_full((len(q), 1), -1.0)).flatten()


def by_value(batches: list[AuditBatch], labels: bool, unit: float) -> Match | None:
    """Match the values of many batches."""
    teacher, student = torch.stack([one.teacher for one in batches]), torch.stack([one.student for one in batches])

    def reference(divergence: RowDivergence, temperature: float) -> Tensor:
        return divergence.value(log_probs(teacher, temperature), log_probs(student, temperature)).sum(-1)

    hard = torch.stack([hard_total(one) for one in batches]) if labels else None
    seen = torch.tensor([one.value for one in batches], dtype=torch.float64, device="cpu")
    return search(_least_squares(reference, seen, hard), seen, unit, TOLERANCE)


def on_labels_only(batch: AuditBatch, tolerance: float) -> float | None:
    """The multiple of the labels' cross-entropy whose gradient was seen, or None if there is more in it."""
    hard, seen = _hard_gradient(batch), batch.gradient.flatten()
    if not bool(seen.isfinite().all()) or not bool(seen.any()):
        return None
    factor = float(hard @ seen / (hard @ hard))
    return factor if float((seen - factor * hard).norm()) < tolerance * float(seen.norm()) else None


def guessed_temperature(teacher: Rows, step: Rows, change: Rows) -> tuple[float, float]:
    """The temperature T at which a change of the gradient near the teacher fits, and 1 − cosine there.

    Near the teacher every divergence of the family is its Fisher metric, (diag p − p pᵀ) step, times a factor, p = softmax(z/T):
    the temperature shows before it is known which divergence it is.
    """

    def left(temperature: float) -> float:
        p = (teacher / temperature).softmax(-1)
        column = (p * (step - (p * step).sum(-1, keepdim=True))).flatten()
        size = float(column.norm() * change.norm())
        return 1 - abs(float(column @ change.flatten())) / size if size > 0 else 1.0

    if not bool(change.isfinite().all()):
        return 1.0, 1.0
    grid = grid_of(0.02, 400.0, 60, True)
    at = min(range(len(grid)), key=lambda i: left(grid[i]))
    ends = (math.log(grid[max(at - 1, 0)]), math.log(grid[min(at + 1, len(grid) - 1)]))
    found = scipy.optimize.minimize_scalar(lambda u: left(math.exp(u)), bounds=ends, method="bounded")
    best = math.exp(float(found.x))
    return best, left(best)


def twins(match: Match, batch: AuditBatch, labels: bool, tolerance: float) -> list[Match]:
    """Return other divergences with the same gradient at the same temperature, as Rényi's of order ½ and the interpolated KL."""
    fit, found = _gradient_fit(batch, labels), []
    for name, entry in DIVERGENCES.items():
        knob = next(iter(entry.parameters), "")
        if name == match.divergence.name or knob not in RANGES:
            continue
        other = refined(lambda x, name=name: fit(turned(name, x), match.temperature), *RANGES[knob], 21, tolerance)  # type: ignore[misc]
        found += [] if other is None else [plainest(other, fit)]
    return found


def total(divergence: RowDivergence, temperature: float, teacher: Rows, student: Rows) -> Tensor:
    """The sum of a divergence over rows."""
    return divergence.value(log_probs(teacher, temperature), log_probs(student, temperature)).sum()


def hard_total(batch: AuditBatch) -> Tensor:
    """The sum of the cross-entropies with the labels."""
    return -batch.student.log_softmax(-1).gather(-1, batch.labels[:, None]).sum()


def entropy(batch: AuditBatch, temperature: float) -> Tensor:
    """The sum of the teacher's entropies."""
    log_p = log_probs(batch.teacher, temperature)
    return -(log_p.exp() * log_p).sum()


def log_probs(logits: Rows, temperature: float) -> Rows:
    """Log-probabilities at a temperature."""
    return torch.log_softmax(logits / temperature, -1)


def _least_squares(reference: Callable[[RowDivergence, float], Tensor], seen: Tensor, hard: Tensor | None) -> Fit:
    """Return the fit of what was seen by a multiple of a reference and, where there are labels, of their cross-entropy."""

    def fit(divergence: RowDivergence, temperature: float) -> Match:
        size, column = float(seen.norm()), reference(divergence, temperature)
        if not bool(column.isfinite().all()):
            return Match(divergence, temperature, 0.0, 0.0, 1.0)
        if not float(column.norm()) > 0:
            return Match(divergence, temperature, 0.0, 0.0, 1.0)
        if hard is not None:
            both = torch.stack([column, hard], -1)
            factor, hard_weight = (float(one) for one in torch.linalg.lstsq(both, seen[:, None]).solution[:, 0])
            if abs(hard_weight) * float(hard.norm()) >= TOLERANCE * size:
                left = float((seen - factor * column - hard_weight * hard).norm())
                if abs(factor) * float(column.norm()) < TOLERANCE * size:  # a factor below what is resolved names nothing
                    return Match(divergence, temperature, 0.0, 0.0, 1.0)
                return Match(divergence, temperature, factor, hard_weight, left / size)
        factor = float(column @ seen) / max(float(column @ column), 1e-300)
        return Match(divergence, temperature, factor, 0.0, float((seen - factor * column).norm()) / size)

    return fit
