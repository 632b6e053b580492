"""Identification: the divergence whose gradient a loss has, and whether its values are that divergence's too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from whichkl._checks import InputError
from whichkl.distillation.audit.matching import (
    TOLERANCE,
    Batch,
    Identified,
    Match,
    by_gradient,
    by_value,
    entropy,
    hard_total,
    same_gradient,
    total,
)
from whichkl.distillation.audit.probes import pair
from whichkl.distillation.audit.subject import Subject, some_labels

_BATCHES_OF_VALUES = 12


@dataclass(frozen=True)
class Nature:
    """What a loss was found to be, by gradient and by value.

    Attributes:
        gradient: the divergence whose gradient it has.
        value: the divergence whose values it has.
        entropy_kept: how much of the teacher's entropy is left in the value: 1 in a cross-entropy.
        constant: whether values are off by something that the student doesn't move.
        dropped: how many rows move nothing, of how many.
        slope_off: how far the gradient is from the value's finite differences, relatively.
    """

    identified: Identified
    gradient: Match | None
    value: Match | None
    entropy_kept: float
    constant: bool
    dropped: tuple[int, int]
    slope_off: float

    @property
    def whole(self) -> Match | None:
        """The divergence that it is in both, or None."""
        return self.gradient if self.gradient is not None and self.gradient == self.value else None


def nature(subject: Subject, knobs: Mapping[str, Any] | None = None) -> Nature:
    """Identify a loss by the gradient of one batch and the values of twelve, two students per teacher."""
    generator = subject.generator()
    teacher, _ = pair(generator, 2, 4)
    batches, dropped = [], (0, 0)
    for i in range(_BATCHES_OF_VALUES):
        new, student = pair(generator, 2, 4, gap=None if i == 0 else 0.2 + 0.25 * i)
        teacher = teacher if i % 2 else new
        batch, dropped_here = _asked(subject, teacher, student, knobs)
        batches.append(batch)
        dropped = dropped if i else dropped_here
    gradient = by_gradient(batches[0], subject.adapter.labels)
    value, kept, constant = None, 0.0, False
    if gradient is not None:
        value, kept, constant = _values(gradient, batches)
    off = _slope_off(subject, knobs)
    if value is None and not constant and off > 0.05:  # a true gradient that isn't in the family has no value in it either
        value = by_value(batches, subject.adapter.labels)
        if value is not None and batches[0].gradient.any() and same_gradient(value, batches[0]):
            gradient = value
    return Nature(_named(gradient, value, kept, constant), gradient, value, kept, constant, dropped, off)


def _slope_off(subject: Subject, knobs: Mapping[str, Any] | None) -> float:
    """Compare the gradient with central differences of the value, in three directions."""
    generator = subject.generator()
    teacher, student = pair(generator, 2, 4, gap=1.0)
    answer = subject(teacher, student, knobs=knobs)
    step = 1e-3 if subject.dtype == torch.float64 else 3e-2
    worst = 0.0
    for direction in (
        torch.randn(student.shape, generator=generator, dtype=torch.float32, device="cpu").double(),
        student - teacher,
        answer.gradient,
    ):
        if not direction.any() or not direction.isfinite().all():
            continue
        way = direction / direction.abs().max()
        up, down = (subject(teacher, student + sign * step * way, knobs=knobs).value for sign in (1, -1))
        slope, said = (up - down) / (2 * step), float((answer.gradient * way).sum())
        noise = 1e-6 * abs(answer.value) / step  # of sums in single precision
        off = (abs(slope - said) - noise) / max(abs(slope), abs(said), 1e-300)
        worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


def _asked(
    subject: Subject, teacher: torch.Tensor, student: torch.Tensor, knobs: Mapping[str, Any] | None = None
) -> tuple[Batch, tuple[int, int]]:
    """A call, and the rows of it that count: with a shift, all but the last of a sequence."""
    answer = subject(teacher, student, knobs=knobs)
    b, t, v = student.shape
    rows = slice(0, t - subject.shift)
    labels = some_labels(student.shape)[:, subject.shift :]
    gradient = answer.gradient[:, rows].reshape(-1, v)
    size = gradient.norm(dim=-1)
    still = int((~(size > 1e-12 * size.max())).sum())
    batch = Batch(teacher[:, rows].reshape(-1, v), student[:, rows].reshape(-1, v), labels.flatten(), answer.value, gradient)
    return batch, (still, len(gradient))


def _values(match: Match, batches: list[Batch]) -> tuple[Match | None, float, bool]:
    """Whether the values are those of the divergence whose gradient was found; else how much of the entropy they hold."""
    seen = torch.tensor([one.value for one in batches], dtype=torch.float64, device="cpu")
    said = torch.stack([match.factor * total(match.divergence, match.temperature, one.teacher, one.student) for one in batches])
    if match.on_labels:
        said = said + match.on_labels * torch.stack([hard_total(one) for one in batches])
    gap = seen - said
    size = float(seen.abs().max().clamp(min=float(said.abs().max())))
    if float(gap.abs().max()) <= TOLERANCE * size:
        return match, 0.0, False
    kept = match.factor * torch.stack([entropy(one, match.temperature) for one in batches])
    share = float((gap @ kept) / (kept @ kept))
    if float((gap - share * kept).abs().max()) <= TOLERANCE * size:
        return match, share, False
    same = gap.view(-1, 2)
    return None, 0.0, float((same[:, 0] - same[:, 1]).abs().max()) <= TOLERANCE * size


def _named(gradient: Match | None, value: Match | None, kept: float, constant: bool) -> Identified:
    if gradient is None or (value is not gradient and not constant):
        if gradient is None and value is None:
            return Identified(
                "something else", note="neither its gradient nor its values are those of a divergence of the family"
            )
        of_value = "no divergence of the family" if value is None else label(value)
        of_gradient = "none of them" if gradient is None else label(gradient)
        return Identified("something else", note=f"it has the values of {of_value} and the gradient of {of_gradient}")
    name, note = gradient.divergence.name, ""
    if abs(kept) > TOLERANCE:
        if name == "forward_kl" and abs(kept - 1) < 1e-3:
            name = "cross_entropy"
        else:
            note = f"its values hold {kept:.3g} of the teacher's entropy, so that 0 isn't the least"
    elif constant:
        note = "its values are off by something of the teacher only"
    return Identified(
        name, parameters_of(gradient), gradient.temperature, gradient.factor, hard_labels=gradient.on_labels, note=note
    )


def label(match: Match) -> str:
    """A match in words, with its factor's sign."""
    said = Identified(match.divergence.name, parameters_of(match), match.temperature, hard_labels=match.on_labels)
    return ("minus " if match.factor < 0 else "") + str(said)


def parameters_of(match: Match) -> dict[str, float]:
    """The fitted parameters of a match, rounded where they are next to a plain number."""
    return {one.name: float(getattr(match.divergence, one.name)) for one in fields(match.divergence)}


def tries(subject: Subject, knobs: Mapping[str, Any] | None = None) -> Nature | None:
    """The nature at a setting, or None where the loss refuses it."""
    try:
        return nature(subject, knobs)
    except InputError:
        return None
