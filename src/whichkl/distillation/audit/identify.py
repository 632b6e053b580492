"""Identification: the divergence whose gradient a loss has, and whether its values are that divergence's too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from whichkl._checks import InputError, cannot
from whichkl.distillation.audit.matching import (
    AuditBatch,
    by_gradient,
    by_value,
    entropy,
    guessed_temperature,
    hard_total,
    on_labels_only,
    residual,
    same_gradient,
    total,
    twins,
)
from whichkl.distillation.audit.probes import Logits, pair_of_logits, some_labels
from whichkl.distillation.audit.result import Check, failed, passed
from whichkl.distillation.audit.search import TOLERANCE, TOLERANCE_OF_NARROW, Identified, Match
from whichkl.distillation.audit.subject import Subject

UNKNOWN = "neither its gradient nor its values are those of a divergence of the family"
_BATCHES_OF_VALUES = 12
_MAX_UNIT_OFF = 2.0
"""Largest ratio of the temperature that is found and the unit of the logits on which it was found. Further off, rows are so flat
that all divergences agree, or so sure that they stand still; the loss is then looked at again in its own unit."""
_MAX_LEFT_OF_NEAR = 0.02
"""Largest share of gradient and values that may be left over where a loss is named after the divergence nearest to it."""
_GAP_CLOSE = 0.3
"""Size of the noise between teacher and student that are close, where no divergence of the family is another one yet."""
_MAX_LEFT_OF_GUESS = 0.1
"""Largest 1 − cosine of a guess of the temperature that a search may start from."""
_STEP_NEAR_TEACHER = 0.02
_NEAR_END = 1e-4
"""Share of a knob's range: the nearest points to the ends that are compared with them."""


@dataclass(frozen=True)
class Nature:
    """What a loss was found to be, by gradient and by value.

    Attributes:
        gradient: the divergence whose gradient it has.
        value: the divergence whose values it has.
        entropy_kept: how much of the teacher's entropy is left in the value: 1 in a cross-entropy.
        constant: whether values are off by something that the student doesn't move.
        slope_off: how far the gradient is from the value's finite differences, relatively.
        is_exact: whether values and gradient are those of the divergence up to rounding, not only within a few percent.
    """

    identified: Identified
    gradient: Match | None
    value: Match | None
    entropy_kept: float
    constant: bool
    slope_off: float
    is_exact: bool = True

    @property
    def near(self) -> Match | None:
        """The divergence that it is in both, exactly or nearly, or None."""
        return self.gradient if self.gradient is not None and self.gradient == self.value else None

    @property
    def whole(self) -> Match | None:
        """The divergence that it is in both, or None."""
        return self.near if self.is_exact else None


@dataclass(frozen=True)
class Reduction:
    """How the value scales with sequences, positions and tokens of the vocabulary: 0 for a mean, 1 for a sum."""

    name: str
    b: float
    t: float
    v: float

    def weight(self, factor: float, b: int, t: int, v: int) -> float:
        """Return what multiplies the divergence, from the factor of the sum in a call of these sizes."""
        return float(factor * float(b) ** (1 - self.b) * float(t) ** (1 - self.t) * float(v) ** (-self.v))


@dataclass
class Examination:
    """What the checks of a loss go by."""

    subject: Subject
    claims: str | None
    knobs: Mapping[str, Any]
    nature: Nature
    reduction: Reduction | None = None
    scale: float = 0.0
    """Size of the loss between different rows."""
    done: dict[str, Check] = field(default_factory=dict)
    """The checks made so far, by name; later ones may depend on them."""

    def same(self, a: float, b: float) -> bool:
        """Whether two values are the same up to the loss's precision; without a size of their own, next to the loss's scale."""
        return abs(a - b) <= self.subject.tolerance * max(abs(a), abs(b), 1e-7 * self.scale, 1e-300)

    def cause(self, findings: frozenset[str]) -> str:
        """Return the name of a check that failed with one of these findings, or ""."""
        return next((name for name, one in self.done.items() if one.outcome == "fail" and one.finding in findings), "")


def find_nature(subject: Subject) -> Nature:
    """Identify a loss on logits of its own temperature, and set `subject.unit` to it."""
    guesses = sorted((_guess(subject, unit) for unit in (subject.unit, 0.1, 10.0)), key=lambda one: one[1])
    near = [guess for guess, left in guesses if left < _MAX_LEFT_OF_GUESS]
    subject.unit_is_known = bool(near)
    found: Nature | None = None
    # rounding spoils a guess, so that the next one is tried
    for guess in near[: len(near) if subject.narrow else 1]:
        round_numbers = (float(f"{guess:.{digits}g}") for digits in (1, 2))  # temperatures are round numbers
        close = 0.1 if subject.narrow else 0.03
        subject.unit = next((one for one in round_numbers if abs(one / guess - 1) < close), guess)
        found = nature(subject)
        if found.gradient is not None:
            break
    found = nature(subject) if found is None else found
    for _ in range(2):
        temperature = found.identified.temperature if found.gradient is not None else subject.unit
        if 1 / _MAX_UNIT_OFF < temperature / subject.unit < _MAX_UNIT_OFF:
            break
        before, subject.unit = subject.unit, temperature
        again = nature(subject)
        if again.gradient is None:
            subject.unit = before
            break
        found = again
    return found


def _guess(subject: Subject, unit: float) -> tuple[float, float]:
    """Guess the temperature from how the gradient changes next to the teacher, on logits of this unit; and how far off it is."""
    generator, s = subject.generator(), subject.shift
    teacher = unit / subject.unit * pair_of_logits(generator, 2, 4)[0]
    step = torch.randn(teacher.shape, generator=generator, dtype=torch.float64, device="cpu").sign()
    step *= unit / subject.unit * (0.2 if subject.narrow else _STEP_NEAR_TEACHER)
    center, up = subject.scaled(teacher, teacher + step)
    down = subject.scaled(teacher, teacher - step)[1]
    change = subject(center, up).gradient - subject(center, down).gradient
    rows = [x[:, : 4 - s].reshape(-1, x.shape[-1]) for x in (center, up - down, change)]
    return guessed_temperature(rows[0], rows[1], rows[2])


def nature(subject: Subject, knobs: Mapping[str, Any] | None = None) -> Nature:
    """Identify a loss by the gradient of one batch and the values of twelve, two students per teacher."""
    generator, labels = subject.generator(), subject.adapter.labels
    teacher, _ = pair_of_logits(generator, 2, 4)
    pairs = []
    for i in range(_BATCHES_OF_VALUES):
        new, student = pair_of_logits(generator, 2, 4, gap=None if i == 0 else 0.2 + 0.25 * i)
        teacher = teacher if i % 2 else new
        pairs.append((teacher, student))
    batches = [_batch(subject, *subject.scaled(*pair), knobs) for pair in pairs]
    if labels and (factor := on_labels_only(batches[0], TOLERANCE_OF_NARROW if subject.narrow else TOLERANCE)) is not None:
        return Nature(Identified("labels only", hard_labels=factor), None, None, 0.0, False, 0.0)
    gradient, is_exact = by_gradient(batches[0], labels, subject.unit, subject.unit_is_known), True
    if gradient is None and not subject.narrow:  # what is clipped far from the teacher may be a divergence close to it
        pair = subject.scaled(*pair_of_logits(subject.generator(), 2, 4, gap=_GAP_CLOSE))
        gradient = by_gradient(_batch(subject, *pair, knobs), labels, subject.unit, subject.unit_is_known)
        gradient, is_exact = (gradient if gradient is not None and gradient.left < TOLERANCE else None), False
    elif gradient is not None and gradient.left >= TOLERANCE and not subject.narrow:
        subject.narrow = _leaves_noise(gradient, subject, batches[0], pairs[0], knobs)
        is_exact = subject.narrow
        if subject.narrow:
            batches = [_batch(subject, *subject.scaled(*pair), knobs) for pair in pairs]
        elif gradient.left > _MAX_LEFT_OF_NEAR:
            gradient = None
    tolerance = TOLERANCE_OF_NARROW if subject.narrow else TOLERANCE if is_exact else _MAX_LEFT_OF_NEAR
    value, kept, constant = (None, 0.0, False) if gradient is None else _values(gradient, batches, tolerance)
    if gradient is not None and value is None and not constant:
        for other in twins(gradient, batches[0], labels, max(tolerance / 10, 10 * gradient.left)):
            same_value, left_over, _ = _values(other, batches, tolerance)
            if same_value is not None and not left_over:
                gradient = value = other
                break
    off = 0.0 if subject.narrow else _slope_off(subject, knobs)
    if value is None and not constant and off > 0.05:  # a true gradient that isn't in the family has no value in it either
        value = by_value(batches, labels, subject.unit)
        if value is not None and batches[0].gradient.any() and same_gradient(value, batches[0]):
            gradient = value
    if value is None and gradient is not None and not constant and off <= 0.05:  # the value follows from its gradient
        value, is_exact = gradient, False
    named = _named(gradient, value, kept, constant)
    if not is_exact and value is not None and value == gradient:
        named = replace(named, note="nearly; it differs where tokens are rare or the student is far off")
    return Nature(named, gradient, value, kept, constant, off, is_exact)


def _leaves_noise(
    match: Match, subject: Subject, batch: AuditBatch, pair: tuple[Logits, Logits], knobs: Mapping[str, Any] | None
) -> bool:
    """Whether what a match leaves is rounding: on logits that differ a little it is another remainder, not the same one."""
    noise = torch.randn(2, *pair[1].shape, generator=subject.generator(), dtype=torch.float64, device="cpu")
    moved = [subject.unit * (x + 0.2 * more) for x, more in zip(pair, noise, strict=True)]
    near = _batch(subject, moved[0], moved[1], knobs)
    first, second = residual(match, batch), residual(match, near)
    return abs(float(first @ second)) < 0.5 * float(first.norm() * second.norm())


def _batch(subject: Subject, teacher: Logits, student: Logits, knobs: Mapping[str, Any] | None) -> AuditBatch:
    """Call the loss; of its rows, keep those that count: with a shift, all but the last of a sequence."""
    answer = subject(teacher, student, knobs=knobs)
    end = student.shape[1] - subject.shift
    labels = some_labels(student.shape)[:, subject.shift :].flatten()
    rows = [x[:, :end].reshape(-1, student.shape[-1]) for x in (teacher, student, answer.gradient)]
    return AuditBatch(rows[0], rows[1], labels, answer.value, rows[2])


def _slope_off(subject: Subject, knobs: Mapping[str, Any] | None) -> float:
    """Compare the gradient with central differences of the value, in three directions."""
    generator = subject.generator()
    teacher, student = subject.scaled(*pair_of_logits(generator, 2, 4, gap=1.0))
    answer = subject(teacher, student, knobs=knobs)
    step = subject.unit * (1e-3 if subject.dtype == torch.float64 else 3e-2)
    worst = 0.0
    random = torch.randn(student.shape, generator=generator, dtype=torch.float32, device="cpu").double()
    for direction in (random, student - teacher, answer.gradient):
        if not direction.any() or not direction.isfinite().all():
            continue
        way = direction / direction.abs().max()
        up, down = (subject(teacher, student + sign * step * way, knobs=knobs).value for sign in (1, -1))
        slope, said = (up - down) / (2 * step), float((answer.gradient * way).sum())
        noise = 1e-6 * abs(answer.value) / step  # of sums in single precision
        off = (abs(slope - said) - noise) / max(abs(slope), abs(said), 1e-300)
        worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


def _values(match: Match, batches: list[AuditBatch], tolerance: float) -> tuple[Match | None, float, bool]:
    """Whether the values are those of the divergence whose gradient was found; else how much of the entropy they hold."""
    seen = torch.tensor([one.value for one in batches], dtype=torch.float64, device="cpu")
    said = torch.stack([match.factor * total(match.divergence, match.temperature, one.teacher, one.student) for one in batches])
    if match.on_labels:
        said = said + match.on_labels * torch.stack([hard_total(one) for one in batches])
    gap = seen - said
    largest = tolerance * float(seen.abs().max().clamp(min=float(said.abs().max())))
    if float(gap.abs().max()) <= largest:
        return match, 0.0, False
    kept = match.factor * torch.stack([entropy(one, match.temperature) for one in batches])
    share = float((gap @ kept) / (kept @ kept))
    if float((gap - share * kept).abs().max()) <= largest:
        return match, share, False
    same_teacher = gap.view(-1, 2)
    return None, 0.0, float((same_teacher[:, 0] - same_teacher[:, 1]).abs().max()) <= largest


def _named(gradient: Match | None, value: Match | None, kept: float, constant: bool) -> Identified:
    if gradient is None and value is None:
        return Identified("something else", note=UNKNOWN)
    if gradient is None or (value is not gradient and not constant):
        of_value = "no divergence of the family" if value is None else value.label
        of_gradient = "none of them" if gradient is None else gradient.label
        return Identified("something else", note=f"it has the values of {of_value} and the gradient of {of_gradient}")
    found = replace(gradient.identified, weight=gradient.factor)
    if abs(kept) > TOLERANCE:
        if found.name == "forward_kl" and abs(kept - 1) < 1e-3:
            return replace(found, name="cross_entropy")
        return replace(found, note=f"its values hold {kept:.3g} of the teacher's entropy, so that 0 isn't the least")
    return replace(found, note="its values are off by something of the teacher only") if constant else found


def knob(subject: Subject, name: str, low: float, high: float) -> Check:
    """Sweep a knob: which divergence is at each end, and whether the path between them reaches its ends."""
    teacher, student = subject.pair(2, 4, gap=1.5)
    span = high - low

    def value_at(u: float) -> float | None:
        try:
            return subject(teacher, student, knobs={name: low + u * span}).value
        except InputError:
            return None

    def identified_at(u: float) -> Identified | None:
        try:
            return nature(subject, {name: low + u * span}).identified
        except InputError:
            return None

    values = {u: value_at(u) for u in (0.0, _NEAR_END, 0.25, 0.5, 0.75, 1 - _NEAR_END, 1.0)}
    scale = max((abs(value) for value in values.values() if value is not None), default=None)
    if scale is None:
        because = f"it refuses {name} from {low:g} to {high:g}"
        raise InputError(cannot(f"sweep `{name}`", because, "Name an argument, or an attribute, that takes these values"))
    said, jumps = [], False
    for u, near in ((0.0, _NEAR_END), (1.0, 1 - _NEAR_END)):
        at, inside = values[u], values[near]
        what = None if at is None else identified_at(u)
        text = f"{name}={low + u * span:g}: "
        text += "refused" if at is None else f"{at:.4g}" + (f", {what.name}" if what is not None else "")
        if inside is not None:
            far = at is not None and abs(at - inside) > 0.05 * max(abs(at), abs(inside))
            gone = abs(inside) < 0.01 * scale and not (at is not None and abs(at) < 0.01 * scale)
            jumps |= far
            text += f"; it jumps to {inside:.2g} just inside" if far else ""
            text += ", where it vanishes" if gone and far else f"; it vanishes towards this end ({inside:.2g})" if gone else ""
        said.append(text)
    middle = identified_at(0.5)
    if middle is not None:
        said.insert(1, f"halfway {middle.name}" + (f" {middle.parameters}" if middle.parameters else ""))
    if jumps:
        change = "the knob is no dial between its ends: use a weight on two divergences (`jeffreys`) for one"
        return failed(". ".join(said), change, "knob_jumps", decides=False)
    return passed(". ".join(said))
