"""Checks of the value and of its edges: the minimum, sign, gradient, temperature; infinities, a top-k, bfloat16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whichkl._checks import InputError
from whichkl.distillation.audit.identify import Examination
from whichkl.distillation.audit.matching import total
from whichkl.distillation.audit.result import Check, failed, not_applicable, passed
from whichkl.distillation.audit.subject import VOCABULARY, Logits

_MIN_DIVERGENCE = 1e-7
"""Nats: a smaller divergence between two students can't show whether the loss sees it."""


def steady(e: Examination) -> Check:
    """Check that the loss is the same number each time."""
    teacher, student = e.subject.pair(2, 4)
    values = [e.subject(teacher, student, seed=i).value for i in range(3)]
    if max(values) - min(values) <= 1e-6 * max(abs(one) for one in values):
        return passed("it doesn't depend on random draws")
    seen = f"{min(values):.4g} to {max(values):.4g} on the same logits"
    return failed(seen, "audit the exact loss, or fix its random draws", "random")


def zero(e: Examination) -> Check:
    """Check that value and gradient are 0 where the student is the teacher."""
    teacher, _ = e.subject.pair(2, 4)
    answer = e.subject(teacher, teacher)
    step = torch.randn(teacher.shape, generator=e.subject.generator(), dtype=torch.float32, device="cpu").double()
    move = e.subject(teacher, teacher + step)
    seen = f"{answer.value:.3g} at student = teacher, against {e.scale:.3g} between different rows"
    if not abs(answer.value) <= 1e-5 * e.scale:
        change = "subtract the teacher's entropy" if e.nature.entropy_kept else "find what remains when the rows agree"
        if e.nature.identified.hard_labels:
            change = "leave the cross-entropy with the labels out (its weight 0), and audit the divergence alone"
        return failed(seen, change, "not_zero_at_teacher")
    if not float(answer.gradient.norm()) <= 1e-4 * float(move.gradient.norm()):
        seen = f"0 at student = teacher, but a gradient of {float(answer.gradient.norm()):.3g} there"
        return failed(seen, "the teacher must be where training ends", "moves_from_teacher")
    return passed(seen)


def never_negative(e: Examination) -> Check:
    """Check that the loss is never below 0, on students that sharpen, flatten, leak, and err at random."""
    values = []
    for v in (VOCABULARY, e.subject.large_vocabulary):
        teacher, student = e.subject.pair(1, 2, v)
        for other in (student, 3 * teacher, teacher / 3, _leaked(teacher, v // 8), teacher + 0.1 * (student - teacher)):
            try:
                values.append(e.subject(teacher, other).value)
            except InputError:
                continue
    if not values:
        return not_applicable("it refused these students")
    low, high = min(values), max(values)
    if low >= -1e-5 * max(e.scale, high):
        return passed(f"between {low:.3g} and {high:.3g} on {len(values)} students")
    if high <= 1e-5 * e.scale:
        return failed(f"negative on all {len(values)} students, {low:.3g} at least", "turn the sign", "sign")
    seen = f"{low:.3g} on one of {len(values)} students: it can be lowered below the teacher's own value"
    return failed(seen, "sum over the whole vocabulary, or add a bucket for what is cut off", "negative")


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


def gradient(e: Examination) -> Check:
    """Check that the gradient is that of the value: against the divergence that the values are, or by finite differences."""
    answer, found = e.subject(*e.subject.pair(2, 4, gap=1.0)), e.nature
    if not answer.graph:
        return failed("no gradient reaches the student", "don't detach the student's logits", "no_gradient")
    if not bool(answer.gradient.isfinite().all()):
        change = "take `log_softmax` of both sides' logits before anything else"
        return failed("on ordinary logits it isn't a number", change, "no_gradient")
    if not bool(answer.gradient.any()):
        change = "let the value depend on the student's logits"
        return failed("0 between different rows: nothing can be learnt from it", change, "no_gradient")
    if found.whole is not None:
        return passed(f"that of {found.whole.divergence.name}, up to {max(found.whole.left, 1e-16):.0e} of its size")
    if found.slope_off > 0.05:
        off = f"off by {found.slope_off:.0%} of the value's slope" if found.slope_off < math.inf else "the value has no slope"
        change = "let the gradient through all that depends on the student: a detached factor, or an estimate used as a loss, "
        return failed(f"{off}: {found.identified.note}", change + "changes it", "gradient_of_another")
    return passed("that of its own value, by finite differences")


def normalised(e: Examination) -> Check:
    """Check that a constant added to a row's logits changes nothing."""
    teacher, student = e.subject.pair(2, 4)
    before = e.subject(teacher, student).value
    after = max(abs(e.subject(teacher + 3, student).value - before), abs(e.subject(teacher, student - 2).value - before))
    if after <= 1e-5 * max(e.scale, abs(before)):
        return passed("a constant added to logits changes nothing")
    seen = f"a constant added to logits changes it by {after:.3g}"
    return failed(seen, "take log_softmax of both, over the last axis", "not_normalised")


def temperature(e: Examination) -> Check:
    """Check the factor that comes with a temperature: none, T², or another one."""
    t, weight = e.nature.identified.temperature, e.nature.identified.weight
    if e.nature.gradient is None:
        return not_applicable("no divergence was found")
    if weight is None or abs(t - 1) < 1e-3:
        return not_applicable("both logits are used as they are")
    if abs(weight / t**2 - 1) < 2e-3:
        return passed(f"T = {t:.4g} with the factor T²: gradients keep their size; the value isn't in nats")
    if abs(weight - 1) < 2e-3:
        return passed(f"T = {t:.4g} without the factor T²: the gradient falls like 1/T²; the value is in nats")
    if abs(weight / t - 1) < 2e-3:
        return failed(f"T = {t:.4g} with the factor T", "multiply by T², or by nothing", "factor_t")
    return passed(f"T = {t:.4g} with the factor {weight:.4g}, T² = {t * t:.4g}")


def impossible(e: Examination) -> Check:
    """Check that tokens with logit −∞ in both change neither value nor gradient."""
    if not e.subject.adapter.infinite:
        return not_applicable("logits are products with a head")
    teacher, student = e.subject.pair(2, 3)
    bare = e.subject(teacher, student)
    none = torch.full((2, 3, VOCABULARY // 2), -math.inf, dtype=teacher.dtype, device="cpu")
    try:
        answer = e.subject(torch.cat([teacher, none], -1), torch.cat([student, none], -1))
    except InputError as error:
        return not_applicable(f"it refuses them: {error}")
    if answer.finite and abs(answer.value - bare.value) <= 1e-4 * abs(bare.value):
        return passed("tokens that are impossible for both change nothing")
    if not math.isfinite(answer.value):
        seen = f"{answer.value:.3g} instead of {bare.value:.3g}"
    elif not answer.finite:
        seen = "the gradient isn't finite"
    else:
        seen = f"{answer.value:.4g} with impossible tokens, {bare.value:.4g} without"
    change = "take 0 · log 0 as 0: leave tokens out where p is 0, before the product"
    return failed(f"tokens impossible for both: {seen}", change, "impossible_tokens", decides=False)


def infinite(e: Examination) -> Check:
    """Check that the loss is infinite where its divergence is, and finite elsewhere."""
    match = e.nature.whole
    if match is None:
        return not_applicable("it isn't known what it should be")
    if not e.subject.adapter.infinite or e.nature.identified.weight is None:
        return not_applicable("logits are products")
    hidden = []
    for impossible_for in ("student", "teacher"):
        teacher, student = e.subject.pair(1, 2)
        (teacher if impossible_for == "teacher" else student)[..., :3] = -math.inf
        truth = float(total(match.divergence, match.temperature, teacher.flatten(0, 1), student.flatten(0, 1)))
        try:
            seen = e.subject(teacher, student).value
        except InputError:
            continue
        what = f"tokens impossible for the {impossible_for} alone make it"
        if math.isinf(truth) and math.isfinite(seen) and abs(seen) < 1e3:
            hidden.append(f"{what} infinite, and the loss is {seen:.3g}")
        elif math.isfinite(truth) and not math.isfinite(seen):
            hidden.append(f"{what} {seen:.3g}, though it's finite")
        elif math.isinf(truth) and math.isnan(seen):
            hidden.append(f"{what} NaN, not infinite")
    if hidden:
        change = "don't zero what is infinite: mass where the other side has none must show"
        if any("nan" in one for one in hidden):
            change = "take 0 · log 0 as 0, by `torch.where` on both sides of it, so that nothing becomes 0 · ∞"
        return failed("; ".join(hidden), change, "infinity_hidden", decides=False)
    return passed("infinite where its divergence is, finite where that is")


def top_k(e: Examination) -> Check:
    """Check that the loss sees mass that the student puts on tokens outside of any top-k."""
    for v in (e.subject.large_vocabulary, VOCABULARY):  # some losses refuse the large one
        teacher, student = e.subject.pair(1, 2, v, 1.0)
        try:
            usual = abs(e.subject(teacher, student).value) / _forward_kl(teacher, student)
            if not 0 < usual < math.inf:
                return not_applicable(f"an ordinary student's loss is {usual:.3g}")
            kept = _blind_at(e, teacher, usual)
        except InputError:
            continue
        if kept is None:
            return passed(f"a student that leaks mass to unlikely tokens pays for it, of {v}")
        seen = (
            f"0 for a student that agrees on {kept} tokens and leaks mass to the others: both are renormalised on the top {kept}"
        )
        change = "keep the mass of the rest as one bucket, never renormalised (`whichkl.distillation.losses.TopK`)"
        return failed(seen, change, "renormalised_top_k")
    return not_applicable("it refused these logits")


def _blind_at(e: Examination, teacher: Tensor, usual: float) -> int | None:
    """The fewest tokens on which agreement is enough, or None; `usual` is the loss of an ordinary student for each nat."""

    def share(kept: int) -> float:
        student = _leaked(teacher, kept)
        truth, seen = _forward_kl(teacher, student), abs(e.subject(teacher, student).value)
        return seen / (usual * truth) if truth > _MIN_DIVERGENCE and not math.isnan(seen) else math.inf

    levels = [1 << i for i in range(12) if 1 << i < teacher.shape[-1]]
    shares = [share(k) for k in levels]
    if min(shares) > 1e-3:
        return None
    # a loss in single precision isn't exactly 0 where it is blind, so that the smallest share tells how large its noise is
    noise = max(1e-9, 100 * min(shares))
    first = next(i for i, one in enumerate(shares) if one <= noise)
    low, high = (levels[first - 1] if first else 0), levels[first]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= noise else (middle, high)
    return high


def _leaked(teacher: Logits, kept: int) -> Logits:
    """Return a student that agrees with the teacher on its `kept` likeliest tokens, up to a factor, and has mass on the others.

    The ranks don't change, so that a choice by the student's ranks sees the same tokens.
    """
    order = teacher.argsort(-1, descending=True)
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    floor = teacher.masked_fill(~inside, float("inf")).amin(-1, keepdim=True)
    return torch.where(inside, teacher, teacher + 0.5 * (floor - teacher))


def _forward_kl(teacher: Tensor, student: Tensor) -> float:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def bfloat16(e: Examination) -> Check:
    """Check that a small divergence of bfloat16 logits keeps its digits: sums are taken in float32."""
    off: list[str] = []
    worst = 0.0
    for gap in (0.1, 0.035):
        teacher, student = (x.bfloat16() for x in e.subject.pair(2, 8, gap=gap))
        truth = e.subject(teacher.double(), student.double())
        try:
            answer = e.subject(teacher, student)
        except InputError:
            return not_applicable("it refuses bfloat16")
        error = abs(answer.value - truth.value) / max(abs(truth.value), 1e-300)
        slope = float((answer.gradient - truth.gradient).norm()) / max(float(truth.gradient.norm()), 1e-300)
        worst = max(worst, error, slope)
        if not max(error, slope) <= 0.1:
            off.append(f"{answer.value:.3g} for {truth.value:.3g}, gradient off by {slope:.0%}")
    if off:
        change = "widen logits to float32 before log_softmax, and sum in float32"
        return failed("; ".join(off), change, "bf16_rounding", decides=False)
    return passed(f"value and gradient within {worst:.1%} at divergences below 0.01")
