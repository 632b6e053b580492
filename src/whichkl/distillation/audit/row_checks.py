"""Checks of rows: that teacher and student both count, that a row is normalised over its tokens, that rows don't mix."""

from __future__ import annotations

import torch

from whichkl.distillation.audit.identify import Examination
from whichkl.distillation.audit.probes import VOCABULARY, Logits
from whichkl.distillation.audit.result import Check, failed, passed

_SMALL_GRADIENT = 1e-5
"""Share of forward KL's gradient below which a gradient may be rounding."""
_MIN_SHARE_OF_DEAD = 1e-9
_GAPS = (0.1, 6.0)
"""Smallest and largest noise between teacher and student, on rows that must all have a gradient."""


def gradient(e: Examination) -> Check:
    """Check that a gradient reaches the student, and that it depends on the teacher."""
    teacher, student = e.subject.pair(2, 4, gap=1.0)
    answer = e.subject(teacher, student)
    if not answer.graph:
        return failed("no gradient reaches the student", "don't detach the student's logits", "no_gradient")
    usual = (student / e.subject.unit).softmax(-1) - (teacher / e.subject.unit).softmax(-1)
    if float(answer.gradient.norm()) * e.subject.unit < _SMALL_GRADIENT * float(usual.norm()) and _is_rounding(
        e, answer.gradient
    ):
        change = "let the value depend on the student's logits"
        return failed("0 between different rows, up to rounding: nothing can be learnt from it", change, "no_gradient")
    other = e.subject(e.subject.pair(2, 5)[1][:, :4], student)
    off = float((other.gradient - answer.gradient).norm()) / float(answer.gradient.norm())
    if max(off, abs(other.value - answer.value) / max(abs(answer.value), 1e-300)) <= e.subject.tolerance:
        what = "it's the cross-entropy with the labels, and nothing of the teacher" if e.nature.identified.hard_labels else ""
        what = what or "another teacher changes neither value nor gradient"
        return failed(what, "compare the student's logits with the teacher's: nothing is distilled", "no_gradient")
    return passed("one reaches the student, and depends on the teacher")


def _is_rounding(e: Examination, slope: Logits) -> bool:
    """Whether a gradient points elsewhere on logits that differ by a thousandth."""
    if not slope.any():
        return True
    generator = torch.Generator().manual_seed(e.subject.seed + 1)
    teacher, student = e.subject.pair(2, 4, gap=1.0)
    step = 1e-3 * e.subject.unit * torch.randn(student.shape, generator=generator, dtype=torch.float64, device="cpu")
    near = e.subject(teacher, student + step).gradient
    return float((near * slope).sum()) < 0.9 * float(near.norm() * slope.norm())


def normalised(e: Examination) -> Check:
    """Check that a constant added to the logits of a row changes nothing: another constant for each row, on either side."""
    subject = e.subject
    teacher, student = subject.pair(3, 4)
    before = subject(teacher, student).value
    noise = torch.randn(3, 4, VOCABULARY, generator=subject.generator(), dtype=torch.float64, device="cpu")

    def change(constant: Logits) -> float:
        moved = [subject(teacher + constant, student).value, subject(teacher, student + constant).value]
        return max(abs(one - before) for one in moved)

    constants = 2 * subject.unit * noise
    still = max(subject.tolerance, 1e-5) * max(e.scale, abs(before))
    by_row = change(constants[..., :1].expand_as(noise))
    if by_row <= still:
        return passed("a constant added to the logits of a row changes nothing")
    if change(torch.full_like(noise, float(2 * subject.unit))) > still:
        seen = f"a constant added to logits changes it by {by_row:.3g}"
        return failed(seen, "take log_softmax of both, over the last axis", "not_normalised")
    rows = "rows" if subject.adapter.rows else "positions"
    axes = {
        rows: constants[:, :1].expand_as(noise),
        "sequences": constants[:1].expand_as(noise),
        "all rows": constants[:1, :1].expand_as(noise),
    }
    if subject.adapter.rows:
        axes = {rows: axes["all rows"]}
    over = next((name for name, one in axes.items() if change(one) <= still), "")
    what = f"probabilities are normalised over {over}, not over tokens" if over else "rows are normalised together"
    seen = f"{what}: a constant added to the logits of one row changes it by {by_row:.3g}"
    change_to = "take log_softmax over the last axis, dim=-1"
    if not subject.adapter.rows and over:
        change_to += '; if the loss takes rows (n, v), pass adapter="rows"'
    return failed(seen, change_to, "wrong_axis")


def independent(e: Examination) -> Check:
    """Check that the logits of one position leave the gradient of the other positions as it is."""
    teacher, student = e.subject.pair(3, 4, gap=1.0)
    other = [x.clone() for x in (teacher, student)]
    for x, noise in zip(other, e.subject.pair(2, 5), strict=True):
        x[0, 1] = noise[1, 2]
    before, after = (e.subject(*pair).gradient for pair in ((teacher, student), other))
    before[0, 1] = after[0, 1] = 0.0
    change = (after - before).norm(dim=-1)
    off, still = float(change.norm()) / max(float(before.norm()), 1e-300), max(e.subject.tolerance, 1e-4)
    if off <= still:
        return passed("the logits of one position leave the gradient of the others as it is")
    others = (change > still * before.norm()).nonzero().tolist()
    if len(others) == 1:
        seen = f"other logits at position 1 change the gradient at position {others[0][1]}, and at no other: rows aren't aligned"
        return failed(seen, "compare the teacher's and the student's rows of the same position", "misaligned")
    seen = f"other logits at one position change the gradient of the others by {off:.0%}"
    return failed(seen, "compute each token on its own, and divide by a number that logits don't change", "rows_mixed")


def every_row_counts(e: Examination) -> Check:
    """Check that every row moves the student, wherever it is, close to its teacher's or far from it."""
    subject, t = e.subject, 16 + e.subject.shift
    low, high = _GAPS
    gaps = low * (high / low) ** torch.linspace(0, 1, 4 * t, dtype=torch.float64, device="cpu").view(t, 4, 1).transpose(0, 1)
    generator = subject.generator()
    plain = torch.randn(2, 4, t, VOCABULARY, generator=generator, dtype=torch.float64, device="cpu")
    teacher, student = subject.scaled(2 * plain[0], 2 * plain[0] + gaps * plain[1])

    def rows_without_gradient(by: int) -> list[tuple[int, int]]:
        moved = [x.roll((by, by), (0, 1)) for x in (teacher, student)]
        size = subject(*moved).gradient.norm(dim=-1)[:, : t - subject.shift]
        return [(int(i), int(j)) for i, j in (~(size > _MIN_SHARE_OF_DEAD * size.max())).nonzero()]

    still = rows_without_gradient(0)
    if not still:
        return passed("all rows get a gradient")
    count, (i, j) = f"{len(still)} of {4 * (t - subject.shift)} rows", still[0]
    if rows_without_gradient(1) == still:  # other rows at the same places
        where = "rows at the same places, whatever they hold"
        return failed(f"{count} get no gradient: {where}", "look for a remainder that is cut off", "rows_dropped")
    here = (slice(i, i + 1), slice(j, j + 1 + subject.shift))
    alone = subject(teacher[here], student[here])
    if abs(alone.value) <= 1e-9 * e.scale:
        seen = f"no gradient in {count}, and 0 there although the student differs: clamped, as a sum cut to a top-k has to be"
        change = "remove the clamp: a sum over the whole vocabulary, or with a bucket for the rest, is never below 0"
        return failed(seen, change, "clamped")
    seen = f"no gradient in {count}, although their loss isn't 0: it is clamped from above"
    return failed(seen, "remove the clamp: it stops training where the student is furthest off", "clamped")
