"""Checks of the value: zero and lowest at student = teacher, sign, gradient, temperature, what the loss claims to be."""

from __future__ import annotations

import math

import torch

from whichkl._checks import InputError
from whichkl.distillation.audit.identify import Nature, label
from whichkl.distillation.audit.probes import VOCABULARY, leaked
from whichkl.distillation.audit.result import Check
from whichkl.distillation.audit.subject import Subject


def zero(subject: Subject, scale: float, nature: Nature) -> Check:
    """Check that value and gradient are 0 where the student is the teacher."""
    teacher, _ = subject.pair(2, 4)
    answer = subject(teacher, teacher)
    generator = subject.generator()
    move = subject(teacher, teacher + torch.randn(teacher.shape, generator=generator, dtype=torch.float32, device="cpu").double())
    seen = f"{answer.value:.3g} at student = teacher, against {scale:.3g} between different rows"
    if not abs(answer.value) <= 1e-5 * scale:
        change = "subtract the teacher's entropy" if nature.entropy_kept else "find what remains when the rows agree"
        if nature.identified.hard_labels:
            change = "leave the cross-entropy with the labels out (its weight 0), and audit the divergence alone"
        return Check("zero at the teacher", "fail", seen, change, "not_zero_at_teacher")
    if not float(answer.gradient.norm()) <= 1e-4 * float(move.gradient.norm()):
        seen = f"0 at student = teacher, but a gradient of {float(answer.gradient.norm()):.3g} there"
        return Check("zero at the teacher", "fail", seen, "the teacher must be where training ends", "moves_from_teacher")
    return Check("zero at the teacher", "pass", seen)


def least(subject: Subject, scale: float) -> Check:
    """Check that the loss is never below 0, on students that sharpen, flatten, leak, and err at random."""
    values = []
    for v in (VOCABULARY, subject.wide):
        teacher, student = subject.pair(1, 2, v)
        for other in (student, 3 * teacher, teacher / 3, leaked(teacher, v // 8), teacher + 0.1 * (student - teacher)):
            try:
                values.append(subject(teacher, other).value)
            except InputError:
                continue
    if not values:
        return Check("never negative", "not applicable", "it refused these students")
    low, high = min(values), max(values)
    if low >= -1e-5 * max(scale, high):
        return Check("never negative", "pass", f"between {low:.3g} and {high:.3g} on {len(values)} students")
    if high <= 1e-5 * scale:
        return Check(
            "never negative", "fail", f"negative on all {len(values)} students, {low:.3g} at least", "turn the sign", "sign"
        )
    seen = f"{low:.3g} on one of {len(values)} students: it can be lowered below the teacher's own value"
    return Check("never negative", "fail", seen, "sum over the whole vocabulary, or add a bucket for what is cut off", "negative")


def sign(nature: Nature) -> Check:
    """Check that training goes towards the teacher."""
    match = nature.gradient
    if match is None:
        return Check("sign", "not applicable", "its gradient isn't that of a divergence of the family")
    if match.factor < 0:
        return Check("sign", "fail", f"its gradient is that of {label(match)}: training leads away", "turn the sign", "sign")
    return Check("sign", "pass", "training leads towards the teacher")


def identity(nature: Nature) -> Check:
    """Check that it is a divergence and not a cross-entropy."""
    found = nature.identified
    if found.name == "cross_entropy" or abs(nature.entropy_kept) > 1e-3:
        seen = f"it's a cross-entropy, not a KL: {nature.entropy_kept:.3g} of the teacher's entropy is in the value"
        change = "subtract the teacher's entropy, Σ p log p, from the value; the gradient stays as it is"
        return Check("a divergence", "fail", seen, change, "cross_entropy")
    if nature.whole is None:
        return Check("a divergence", "not applicable", str(found))
    return Check("a divergence", "pass", f"{label(nature.whole)}, in value and gradient")


def gradient(subject: Subject, nature: Nature) -> Check:
    """Check that the gradient is that of the value: against the divergence that the values are, or by finite differences."""
    name = "gradient"
    teacher, student = subject.pair(2, 4, gap=1.0)
    answer = subject(teacher, student)
    if not answer.graph:
        return Check(name, "fail", "no gradient reaches the student", "don't detach the student's logits", "no_gradient")
    if not bool(answer.gradient.isfinite().all()):
        change = "take `log_softmax` of both sides' logits before anything else"
        return Check(name, "fail", "on ordinary logits it isn't a number", change, "no_gradient")
    if not bool(answer.gradient.any()):
        change = "let the value depend on the student's logits"
        return Check(name, "fail", "0 between different rows: nothing can be learnt from it", change, "no_gradient")
    if nature.whole is not None:
        left = max(nature.whole.left, 1e-16)
        return Check(name, "pass", f"that of {nature.whole.divergence.name}, up to {left:.0e} of its size")
    if nature.slope_off > 0.05:
        off = f"off by {nature.slope_off:.0%} of the value's slope" if nature.slope_off < math.inf else "the value has no slope"
        seen = f"{off}: {nature.identified.note}"
        return Check(name, "fail", seen, _LET_GRADIENT_THROUGH, "gradient_of_another")
    return Check(name, "pass", "that of its own value, by finite differences")


_LET_GRADIENT_THROUGH = (
    "let the gradient through all that depends on the student: a detached factor, or an estimate used as a loss, changes it"
)


def normalised(subject: Subject, scale: float) -> Check:
    """Check that a constant added to a row's logits changes nothing."""
    teacher, student = subject.pair(2, 4)
    before = subject(teacher, student).value
    after = max(abs(subject(teacher + 3, student).value - before), abs(subject(teacher, student - 2).value - before))
    if after <= 1e-5 * max(scale, abs(before)):
        return Check("logits normalised", "pass", "a constant added to logits changes nothing")
    seen = f"a constant added to logits changes it by {after:.3g}"
    return Check("logits normalised", "fail", seen, "take log_softmax of both, over the last axis", "not_normalised")


def temperature(nature: Nature) -> Check:
    """Check the factor that comes with a temperature: none, T², or another one."""
    name, found = "temperature", nature.identified
    t, weight = found.temperature, found.weight
    if nature.gradient is None or weight is None or abs(t - 1) < 1e-3:
        what = "no divergence was found" if nature.gradient is None else "both logits are used as they are"
        return Check(name, "not applicable", what)
    if abs(weight / t**2 - 1) < 2e-3:
        return Check(name, "pass", f"T = {t:.4g} with the factor T²: gradients keep their size; the value isn't in nats")
    if abs(weight - 1) < 2e-3:
        return Check(name, "pass", f"T = {t:.4g} without the factor T²: the gradient falls like 1/T²; the value is in nats")
    if abs(weight / t - 1) < 2e-3:
        return Check(name, "fail", f"T = {t:.4g} with the factor T", "multiply by T², or by nothing", "factor_t")
    return Check(name, "pass", f"T = {t:.4g} with the factor {weight:.4g}, T² = {t * t:.4g}")


def claim(nature: Nature, claims: str | None) -> Check:
    """Check what the loss claims to be."""
    if claims is None:
        return Check("what it claims", "not applicable", "nothing was claimed; pass claims=")
    if nature.identified.name == claims and (nature.gradient is None or nature.gradient.factor > 0):
        return Check("what it claims", "pass", f"it is {claims}")
    seen = f"it is {nature.identified}, not {claims}"
    return Check("what it claims", "fail", seen, "correct the name, or the loss", "not_what_it_claims")
