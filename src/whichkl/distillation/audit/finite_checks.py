"""Checks of the numbers themselves: finite, the same each time, on copies that stay as they are."""

from __future__ import annotations

import math

import torch

from whichkl._checks import InputError
from whichkl.distillation.audit.identify import Examination
from whichkl.distillation.audit.probes import SURE_GAPS, sure_pairs
from whichkl.distillation.audit.result import Check, failed, not_applicable, passed
from whichkl.distillation.audit.subject import Answer, Subject
from whichkl.distillation.audit.token_checks import padded

_SMALL_UNIT = 0.1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def ordinary(subject: Subject) -> Check:
    """Check that value and gradient are numbers on ordinary logits; where only small logits give numbers, they are the unit."""
    answer = subject(*subject.pair(2, 4))
    if answer.finite:
        return passed("value and gradient are numbers")
    what = _what_is_not(answer)
    subject.unit = _SMALL_UNIT
    if subject(*subject.pair(2, 4)).finite:  # a small temperature makes ordinary logits sure
        return passed(f"value and gradient are numbers on logits of scale {2 * _SMALL_UNIT:g}; {what} on logits of scale 2")
    subject.unit = 1.0
    change = "take log_softmax of both sides before anything else; with F.kl_div, log_target=True if the target holds logarithms"
    return failed(f"{what} on ordinary logits", change, "nan")


def _what_is_not(answer: Answer) -> str:
    if math.isfinite(answer.value):
        return "the gradient is NaN or infinite"
    return f"the value is {'NaN' if math.isnan(answer.value) else 'infinite'}"


def steady(subject: Subject) -> Check:
    """Check that the loss is the same number each time."""
    pair = subject.pair(2, 4)
    again, other = ([subject(*pair, seed=i).value for i in seeds] for seeds in ((0, 0, 0), (0, 1, 2)))
    for values, name, why, change in (
        (again, "state", "although nothing is drawn: it keeps something from call to call", "reset what it keeps at each call"),
        (other, "random", "", "audit the exact loss, or fix its random draws"),
    ):
        if max(values) - min(values) > 1e-6 * max(abs(one) for one in values):
            return failed(f"{min(values):.4g} to {max(values):.4g} on the same logits {why}".rstrip(), change, name)
    return passed("it doesn't depend on random draws or on earlier calls")


def untouched(e: Examination) -> Check:
    """Check that the loss leaves its arguments as they were."""
    if not e.subject.written:
        return passed("its arguments stay as they were")
    what = " and the ".join(sorted(e.subject.written))
    seen = f"it writes into the {what}: whoever uses them afterwards gets other numbers"
    return failed(seen, "replace in-place operations: `x / T` instead of `x.div_(T)`", "writes_inputs", decides=False)


def sure_rows(e: Examination) -> Check:
    """Check that value and gradient are numbers where one side or both are sure of a token, in every narrow dtype."""
    found, tried = [], []
    for name, dtype in _DTYPES.items():
        try:
            worst = _first_broken(e.subject, dtype)
        except InputError:  # it refuses this dtype
            continue
        tried.append(name)
        if worst is not None:
            found.append((name, *worst))
    if not tried:
        return not_applicable("it refuses float32, bfloat16 and float16")
    if not found:
        return passed(f"numbers where one token leads by up to {SURE_GAPS[-1]:g} nats, in {', '.join(tried)}")
    _, gap, where, what = min(found, key=lambda one: one[1])
    dtypes = ", ".join(name for name, *_ in found)
    seen = f"in {dtypes}, {what} on sure rows: {where}, by {gap:g} or more"
    change = "keep to log_softmax of both sides: a probability that underflows has no logarithm"
    return failed(seen, change, "nan_on_sure_rows", decides=False)


def _first_broken(subject: Subject, dtype: torch.dtype) -> tuple[float, str, str] | None:
    """The smallest gap between tokens where something isn't finite, between which rows, and what."""
    for gap in SURE_GAPS:
        for where, pair in sure_pairs(gap).items():
            answer = subject(*(x.to(dtype) for x in pair))
            if not answer.finite:
                return gap, where, _what_is_not(answer)
    return None


def masked_tokens(e: Examination) -> Check:
    """Check that value and gradient are numbers where tokens are masked, on ordinary logits."""
    if not e.subject.adapter.masks:
        return not_applicable("this call leaves no tokens out")
    teacher, student, mask, counts = padded(e.subject)
    answer = e.subject(teacher, student, mask)
    if answer.finite:
        return passed("value and gradient are numbers where tokens are masked")
    at_masked = not answer.gradient[~counts].isfinite().all() and answer.gradient[counts].isfinite().all()
    what = "the gradient at masked tokens is NaN" if math.isfinite(answer.value) and at_masked else _what_is_not(answer)
    change = "don't put −inf at masked tokens: select rows, or fill with 0 before the softmax. 0 · NaN is NaN when it goes back"
    return failed(f"{what}, on ordinary logits: it reaches all weights", change, "nan_at_masked_tokens")
