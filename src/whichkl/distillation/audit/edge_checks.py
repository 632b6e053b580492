"""Checks at the edges: impossible tokens, mass outside a top-k, small divergences in bfloat16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whichkl._checks import InputError
from whichkl.distillation.audit.identify import Nature
from whichkl.distillation.audit.matching import total
from whichkl.distillation.audit.probes import VOCABULARY, leaked
from whichkl.distillation.audit.result import Check
from whichkl.distillation.audit.subject import Answer, Subject

_MIN_DIVERGENCE = 1e-7
"""Nats: a smaller divergence between two students can't show whether the loss sees it."""


def impossible(subject: Subject) -> Check:
    """Check that tokens with logit −∞ in both change neither value nor gradient."""
    name = "logits of −inf"
    if not subject.adapter.infinite:
        return Check(name, "not applicable", "logits are products with a head")
    teacher, student = subject.pair(2, 3)
    bare = subject(teacher, student)
    none = torch.full((2, 3, VOCABULARY // 2), -math.inf, dtype=teacher.dtype, device="cpu")
    try:
        answer = subject(torch.cat([teacher, none], -1), torch.cat([student, none], -1))
    except InputError as error:
        return Check(name, "not applicable", f"it refuses them: {error}")
    if answer.finite and abs(answer.value - bare.value) <= 1e-4 * abs(bare.value):
        return Check(name, "pass", "tokens that are impossible for both change nothing")
    seen = f"{answer.value:.3g} instead of {bare.value:.3g}" if not math.isfinite(answer.value) else "the gradient isn't finite"
    if math.isfinite(answer.value) and answer.finite:
        seen = f"{answer.value:.4g} with impossible tokens, {bare.value:.4g} without"
    change = "take 0 · log 0 as 0: leave tokens out where p is 0, before the product"
    return Check(name, "fail", f"tokens impossible for both: {seen}", change, "impossible_tokens", decides=False)


def infinite(subject: Subject, nature: Nature) -> Check:
    """Check that the loss is infinite where its divergence is, and finite elsewhere."""
    name, match = "infinite divergence", nature.whole
    if match is None or not subject.adapter.infinite or nature.identified.weight is None:
        return Check(name, "not applicable", "it isn't known what it should be" if match is None else "logits are products")
    teacher, student = subject.pair(1, 2)
    hidden = []
    for who in ("student", "teacher"):
        sides = {"teacher": teacher.clone(), "student": student.clone()}
        sides[who][..., :3] = -math.inf
        truth = float(
            total(match.divergence, match.temperature, *(x.flatten(0, 1) for x in (sides["teacher"], sides["student"])))
        )
        try:
            seen = subject(sides["teacher"], sides["student"]).value
        except InputError:
            continue
        if math.isinf(truth) and math.isfinite(seen) and abs(seen) < 1e3:
            hidden.append(f"tokens impossible for the {who} alone make it infinite, and the loss is {seen:.3g}")
        elif math.isfinite(truth) and not math.isfinite(seen):
            hidden.append(f"tokens impossible for the {who} alone make it {seen:.3g}, though it's finite")
        elif math.isinf(truth) and math.isnan(seen):
            hidden.append(f"tokens impossible for the {who} alone make it NaN, not infinite")
    if hidden:
        change = "don't zero what is infinite: mass where the other side has none must show"
        if any("nan" in one for one in hidden):
            change = "take 0 · log 0 as 0, by `torch.where` on both sides of it, so that nothing becomes 0 · ∞"
        return Check(name, "fail", "; ".join(hidden), change, "infinity_hidden", decides=False)
    return Check(name, "pass", "infinite where its divergence is, finite where that is")


def top_k(subject: Subject) -> Check:
    """Check that the loss sees mass that the student puts on tokens outside of any top-k."""
    name = "mass outside a top-k"
    for v in (subject.wide, VOCABULARY):
        teacher, student = subject.pair(1, 2, v, 1.0)
        try:
            usual = abs(subject(teacher, student).value) / _forward_kl(teacher, student)
            if not 0 < usual < math.inf:
                return Check(name, "not applicable", f"an ordinary student's loss is {usual:.3g}")
            kept = _blind_at(subject, teacher, usual)
        except InputError:
            continue
        if kept is None:
            return Check(name, "pass", f"a student that leaks mass to unlikely tokens pays for it, of {v}")
        seen = (
            f"0 for a student that agrees on {kept} tokens and leaks mass to the others: both are renormalised on the top {kept}"
        )
        change = "keep the mass of the rest as one bucket, never renormalised (`whichkl.distillation.losses.TopK`)"
        return Check(name, "fail", seen, change, "renormalised_top_k")
    return Check(name, "not applicable", "it refused these logits")


def _blind_at(subject: Subject, teacher: Tensor, usual: float) -> int | None:
    """The fewest tokens on which agreement is enough, or None; `usual` is the loss of an ordinary student for each nat."""
    v = teacher.shape[-1]

    def share(kept: int) -> float:
        student = leaked(teacher, kept)
        truth, seen = _forward_kl(teacher, student), abs(subject(teacher, student).value)
        return seen / (usual * truth) if truth > _MIN_DIVERGENCE and not math.isnan(seen) else math.inf

    levels = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if k < v]
    shares = [share(k) for k in levels]
    if min(shares) > 1e-3:
        return None
    noise = max(1e-9, 100 * min(shares))
    first = next(i for i, one in enumerate(shares) if one <= noise)
    low, high = (levels[first - 1] if first else 0), levels[first]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= noise else (middle, high)
    return high


def _forward_kl(teacher: Tensor, student: Tensor) -> float:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def bfloat16(subject: Subject) -> Check:
    """Check that a small divergence of bfloat16 logits keeps its digits: sums are taken in float32."""
    name = "small values in bf16"
    off: list[str] = []
    worst = 0.0
    for gap in (0.1, 0.035):
        teacher, student = (x.bfloat16() for x in subject.pair(2, 8, gap=gap))
        truth = subject(teacher.double(), student.double())
        try:
            answer = subject(teacher, student)
        except InputError:
            return Check(name, "not applicable", "it refuses bfloat16")
        error = abs(answer.value - truth.value) / max(abs(truth.value), 1e-300)
        slope = _off(answer, truth)
        worst = max(worst, error, slope)
        if not max(error, slope) <= 0.1:
            off.append(f"{answer.value:.3g} for {truth.value:.3g}, gradient off by {slope:.0%}")
    if off:
        change = "widen logits to float32 before log_softmax, and sum in float32"
        return Check(name, "fail", "; ".join(off), change, "bf16_rounding", decides=False)
    return Check(name, "pass", f"value and gradient within {worst:.1%} at divergences below 0.01")


def _off(answer: Answer, truth: Answer) -> float:
    return float((answer.gradient - truth.gradient).norm()) / max(float(truth.gradient.norm()), 1e-300)
