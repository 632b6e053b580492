"""Checks of the value and of its edges: the minimum, sign, gradient, temperature; infinities, a top-k, bfloat16."""

from __future__ import annotations

import math

import torch

from whichkl._checks import InputError
from whichkl.distillation.audit.identify import Examination
from whichkl.distillation.audit.matching import AuditBatch, hard_total
from whichkl.distillation.audit.probes import SURE_GAPS, VOCABULARY, leaked, some_labels, sure_pairs, tempered_pairs
from whichkl.distillation.audit.result import Check, failed, not_applicable, passed

_ZERO = 1e-6
"""Share of the usual size below which a loss is 0."""


def zero(e: Examination) -> Check:
    """Check that value and gradient are 0 where the student is the teacher, apart from a cross-entropy with the labels."""
    teacher, _ = e.subject.pair(2, 4)
    answer, match = e.subject(teacher, teacher), e.nature.gradient
    if match is not None and match.on_labels and e.claims is None:
        rows = teacher[:, : teacher.shape[1] - e.subject.shift].reshape(-1, teacher.shape[-1])
        labels = some_labels(teacher.shape)[:, e.subject.shift :].flatten()
        left = answer.value - match.on_labels * float(hard_total(AuditBatch(rows, rows, labels, 0.0, torch.zeros_like(rows))))
        if abs(left) <= max(e.subject.tolerance, 1e-4) * e.scale:
            return passed(f"{left:.3g} at student = teacher, besides the cross-entropy with the labels")
    step = torch.randn(teacher.shape, generator=e.subject.generator(), dtype=torch.float32, device="cpu").double()
    move = e.subject(teacher, teacher + e.subject.unit * step)
    seen = f"{answer.value:.3g} at student = teacher, against {e.scale:.3g} between different rows"
    if not abs(answer.value) <= e.subject.tolerance * e.scale:
        change = "subtract the teacher's entropy" if e.nature.entropy_kept else "find what remains when the rows agree"
        if e.nature.identified.hard_labels:
            change = "leave the cross-entropy with the labels out (its weight 0), and audit the divergence alone"
        return failed(seen, change, "not_zero_at_teacher")
    still = max(1e-4 if e.nature.is_exact else 0.02, e.subject.tolerance)
    if not float(answer.gradient.norm()) <= still * float(move.gradient.norm()):
        seen = f"0 at student = teacher, but a gradient of {float(answer.gradient.norm()):.3g} there"
        return failed(seen, "the teacher must be where training ends", "moves_from_teacher")
    return passed(seen)


def zero_elsewhere(e: Examination) -> Check:
    """Check that the value is 0 at the teacher alone: not for its probabilities on other tokens, nor for its ranks."""
    teacher, _ = e.subject.pair(2, 4)
    top = teacher.argsort(-1, descending=True)
    swapped = teacher.scatter(-1, top[..., :2], teacher.gather(-1, top[..., :2].flip(-1)))
    mixed = torch.randperm(teacher.shape[-1], generator=e.subject.generator(), device="cpu")
    others = {
        "with the teacher's probabilities on other tokens": (teacher.roll(1, -1), teacher[..., mixed]),
        "whose two likeliest tokens are swapped": (swapped,),
        "that ranks tokens as the teacher does, and is surer or less sure": (2 * teacher, teacher / 2),
        "with the teacher's rows at other positions": (teacher.roll(1, 1), teacher.roll(1, 0)),
    }
    for what, students in others.items():
        for student in students:
            if abs(e.subject(teacher, student).value) <= (0.01 if e.subject.narrow else _ZERO) * e.scale:
                seen = f"0 for a student {what}"
                return failed(seen, "compare the probabilities of the same token, before any sorting", "zero_elsewhere")
    return passed("not 0 for students with the teacher's probabilities elsewhere, or its ranks alone")


def never_negative(e: Examination) -> Check:
    """Check that the loss is never below 0, on students that sharpen, flatten, leak, and err at random, and on sure rows."""
    values, unit = [], e.subject.unit
    pairs = []
    for v in (VOCABULARY, e.subject.large_vocabulary):
        teacher, student = e.subject.pair(1, 2, v)
        near = teacher + 0.1 * (student - teacher)
        pairs += [(teacher, other) for other in (leaked(teacher, v // 8), near)] + tempered_pairs(teacher, student)
    pairs += [(unit * p, unit * q) for p, q in sure_pairs(SURE_GAPS[0]).values()]
    for pair in pairs:
        try:
            value = e.subject(*pair).value
        except InputError:
            continue
        values += [value] if math.isfinite(value) else []
    if not values:
        return not_applicable("it refused these students")
    low, high = min(values), max(values)
    if low >= -e.subject.tolerance * max(e.scale, min(high, 10 * e.scale)):
        return passed(f"between {low:.3g} and {high:.3g} on {len(values)} students")
    if high <= 1e-5 * e.scale:
        return failed(f"negative on all {len(values)} students, {low:.3g} at least", "turn the sign", "sign")
    seen = f"{low:.3g} on one of {len(values)} students: it can be lowered below the teacher's own value"
    change = "sum over the whole vocabulary without clipping terms, or add a bucket for what is cut off"
    return failed(seen, change, "negative")


def sign(e: Examination) -> Check:
    """Check that training goes towards the teacher."""
    match = e.nature.gradient
    if match is None:
        return not_applicable("its gradient isn't that of a divergence of the family")
    if match.factor < 0:
        return failed(f"its gradient is that of {match.label}: training leads away", "turn the sign", "sign")
    return passed("training leads towards the teacher")


def is_divergence(e: Examination) -> Check:
    """Check that it is a divergence and not a cross-entropy."""
    found = e.nature.identified
    if found.name == "cross_entropy" or abs(e.nature.entropy_kept) > 1e-3:
        seen = f"it's a cross-entropy, not a KL: {e.nature.entropy_kept:.3g} of the teacher's entropy is in the value"
        change = "subtract the teacher's entropy, Σ p log p, from the value; the gradient stays as it is"
        return failed(seen, change, "cross_entropy")
    if e.nature.whole is None:
        return not_applicable(str(found))
    return passed(f"{e.nature.whole.label}, in value and gradient")


def claim(e: Examination) -> Check:
    """Check what the loss claims to be."""
    found = e.nature
    if e.claims is None:
        return not_applicable("nothing was claimed; pass claims=")
    if found.identified.name == e.claims and (found.gradient is None or found.gradient.factor > 0):
        return passed(f"it is {e.claims}")
    return failed(f"it is {found.identified}, not {e.claims}", "correct the name, or the loss", "not_what_it_claims")


def of_its_value(e: Examination) -> Check:
    """Check that the gradient is that of the value: against the divergence that the values are, or by finite differences."""
    found = e.nature
    if found.whole is not None:
        return passed(f"that of {found.whole.divergence.name}, up to {max(found.whole.left, 1e-16):.0e} of its size")
    if found.slope_off > 0.05:
        off = f"off by {found.slope_off:.0%} of the value's slope" if found.slope_off < math.inf else "the value has no slope"
        change = "let the gradient through all that depends on the student: a detached factor, or an estimate used as a loss, "
        return failed(f"{off}: {found.identified.note}", change + "changes it", "gradient_of_another")
    return (
        passed("that of its own value, by finite differences") if not e.subject.narrow else not_applicable("it rounds too much")
    )


def of_the_teacher(e: Examination) -> Check:
    """Check that no gradient reaches the teacher's logits, unless the loss's documentation states it."""
    answer = e.subject(*e.subject.pair(2, 4, gap=1.0), ask_teacher=True)
    if not answer.teacher_gradient > 1e-9 * float(answer.gradient.norm()):
        return passed("none reaches the teacher")
    documentation = " ".join((getattr(getattr(e.subject.loss, "func", e.subject.loss), "__doc__", None) or "").split())
    if "gradients reach the teacher" in documentation.lower():
        return passed("it reaches the teacher, as the documentation of the loss states")
    seen = "the teacher's logits get a gradient: a teacher that isn't detached moves towards the student"
    return failed(
        seen, "compute the teacher under torch.no_grad(), or detach its logits in the loss", "teacher_gradient", decides=False
    )


def temperature(e: Examination) -> Check:
    """Check the factor that comes with a temperature: none, T², or another one."""
    t, weight = e.nature.identified.temperature, e.nature.identified.weight
    if e.nature.gradient is None:
        return not_applicable("no divergence was found")
    if weight is None or abs(t - 1) < 1e-3:
        return not_applicable("both logits are used as they are")
    hard = e.nature.identified.hard_labels
    if 0 < hard < 1:  # the divergence has the other share
        weight /= 1 - hard
    if abs(weight / t**2 - 1) < 2e-3:
        return passed(f"T = {t:.4g} with the factor T²: gradients keep their size; the value isn't in nats")
    if abs(weight - 1) < 2e-3:
        return passed(f"T = {t:.4g} without the factor T²: the gradient falls like 1/T²; the value is in nats")
    if abs(weight / t - 1) < 2e-3:
        return failed(f"T = {t:.4g} with the factor T", "multiply by T², or by nothing", "factor_t")
    return passed(f"T = {t:.4g} with the factor {weight:.4g}, T² = {t * t:.4g}")
