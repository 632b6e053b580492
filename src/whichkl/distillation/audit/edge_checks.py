"""Checks of edges: infinities, a top-k, sure rows, bfloat16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whichkl._checks import InputError
from whichkl.distillation.audit.identify import Examination
from whichkl.distillation.audit.matching import AuditBatch, entropy, expected_gradient, hard_total, total
from whichkl.distillation.audit.probes import VOCABULARY, Logits, leaked, pair_of_logits, some_labels, sure_pairs
from whichkl.distillation.audit.result import Check, failed, not_applicable, passed
from whichkl.distillation.audit.search import Match

_MIN_DIVERGENCE = 1e-7
"""Nats: a smaller divergence between two students can't show whether the loss sees it."""
_WIDEN = "widen logits to float32 before log_softmax, and sum in float32"
_GAP_OF_SURE_ROWS = 60.0
"""Nats, beyond 1e-8, 1e-12 and other numbers that are added to probabilities so that they have a logarithm."""


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
    if answer.finite and abs(answer.value - bare.value) <= max(1e-4, e.subject.tolerance) * abs(bare.value):
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
    units = {e.subject.unit} if e.subject.unit_is_known else {e.subject.unit, 1.0, 0.1}
    kept: int | None = None
    for v in (e.subject.large_vocabulary, VOCABULARY):  # some losses refuse the large one
        try:
            # a loss whose temperature isn't known is blind only if it is at every one: sure rows hide what leaks
            found = [_blind_at(e, v, unit) for unit in sorted(units, reverse=True)]
        except InputError:
            continue
        if any(one is None for one in found):
            return passed(f"a student that leaks mass to unlikely tokens pays for it, of {v}")
        kept = found[0]
        seen = (
            f"0 for a student that agrees on {kept} tokens and leaks mass to the others: both are renormalised on the top {kept}"
        )
        change = "keep the mass of the rest as one bucket, never renormalised (`whichkl.distillation.losses.TopK`)"
        return failed(seen, change, "renormalised_top_k")
    return not_applicable("it refused these logits")


def _blind_at(e: Examination, v: int, unit: float) -> int | None:
    """The fewest tokens on which agreement is enough, or None, on logits of this unit."""
    teacher, student = (x * (unit / e.subject.unit) for x in e.subject.pair(1, 2, v, 1.0))
    usual = abs(e.subject(teacher, student).value) / _forward_kl(teacher / unit, student / unit)
    if not 0 < usual < math.inf:
        return None

    def share(kept: int) -> float:
        """The loss per nat of the truth, next to that of an ordinary student."""
        student = leaked(teacher, kept)
        truth, seen = _forward_kl(teacher / unit, student / unit), abs(e.subject(teacher, student).value)
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


def _forward_kl(teacher: Tensor, student: Tensor) -> float:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def sure_values(e: Examination) -> Check:
    """Check that value and gradient are those of the divergence on sure rows too, where an ε inside a logarithm shows."""
    match, subject = e.nature.near, e.subject
    if match is None:
        return not_applicable("it isn't known what it should be")
    if subject.narrow:
        return not_applicable("it rounds too much")
    usual = 1e-3 * float(subject(*subject.pair(2, 4, gap=1.0)).gradient.norm())
    for where, (p, q) in sure_pairs(_GAP_OF_SURE_ROWS).items():
        teacher, student = subject.unit * p, subject.unit * q
        answer = subject(teacher, student)
        value, slope = _truth(e, match, teacher, student)
        if not answer.finite or not math.isfinite(value):
            continue
        off = abs(answer.value - value) / max(abs(value), 1e-3 * e.scale)
        turned = float((_rows(answer.gradient, subject.shift).flatten() - slope).norm()) / max(float(slope.norm()), usual)
        if max(off, turned) > 0.01:
            seen = f"{answer.value:.4g} instead of {value:.4g} on sure rows: {where}, by {_GAP_OF_SURE_ROWS:g} nats"
            seen += "" if off > 0.01 else f"; the gradient is off by {turned:.0%}"
            change = "take log_softmax of whole rows, without a clamp, an ε or a top-k: they change rows that are sure"
            return failed(seen, change, "wrong_on_sure_rows", decides=False)
    return passed(f"those of {match.divergence.name} where a token leads by {_GAP_OF_SURE_ROWS:g} nats")


def _rows(x: Tensor, shift: int) -> Tensor:
    return x[:, : x.shape[1] - shift].reshape(-1, x.shape[-1])


def _truth(e: Examination, match: Match, teacher: Logits, student: Logits) -> tuple[float, Tensor]:
    """Value and gradient of a match on logits (2, 4, v), in float64."""
    labels = some_labels(student.shape)[:, e.subject.shift :].flatten()
    rows = [_rows(x, e.subject.shift) for x in (teacher, student)]
    batch = AuditBatch(rows[0], rows[1], labels, 0.0, torch.zeros_like(rows[1]))
    value = match.factor * float(total(match.divergence, match.temperature, *rows))
    value += match.on_labels * float(hard_total(batch)) if match.on_labels else 0.0
    value += e.nature.entropy_kept * match.factor * float(entropy(batch, match.temperature)) if e.nature.entropy_kept else 0.0
    return value, expected_gradient(match, batch)


def bfloat16(e: Examination) -> Check:
    """Check that a small divergence of bfloat16 logits keeps its digits: sums are taken in float32."""
    off: list[str] = []
    worst, match, subject = 0.0, e.nature.whole, e.subject
    if match is None and subject.narrow:
        return failed("it rounds to bfloat16 inside, whatever it is given", _WIDEN, "bf16_rounding", decides=False)
    for gap in (0.1, 0.035):
        wide = tuple(subject.unit * x for x in pair_of_logits(subject.generator(), 2, 4, gap=gap))
        if subject.adapter.infinite or not subject.narrow:  # products with a head aren't numbers of bfloat16, logits may be
            wide = tuple(x.bfloat16().double() for x in wide)
        if match is not None:
            value, slope = _truth(e, match, *wide)
        else:
            truth = subject(*wide)
            value, slope = truth.value, _rows(truth.gradient, subject.shift).flatten()
        try:
            answer = subject(*(wide if subject.narrow else (x.bfloat16() for x in wide)))
        except InputError:
            return not_applicable("it refuses bfloat16")
        error = abs(answer.value - value) / max(abs(value), 1e-300)
        turned = float((_rows(answer.gradient, subject.shift).flatten() - slope).norm()) / max(float(slope.norm()), 1e-300)
        worst = max(worst, error, turned)
        if not max(error, turned) <= 0.1:
            off.append(f"{answer.value:.3g} for {value:.3g}, gradient off by {turned:.0%}")
    if off:
        inside = "it rounds to bfloat16 inside, whatever it is given: " if subject.narrow else ""
        return failed(inside + "; ".join(off), _WIDEN, "bf16_rounding", decides=False)
    return passed(f"value and gradient within {worst:.1%} at small divergences")
