"""audit: a black-box examination of a distillation loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot, check_seed
from whichkl.arrays import check_tensor_options
from whichkl.distillation.audit import token_checks, value_checks
from whichkl.distillation.audit.adapters import Adapter, adapter_for
from whichkl.distillation.audit.identify import Examination, Nature, Reduction, knob, nature
from whichkl.distillation.audit.result import Audit, Check
from whichkl.distillation.audit.subject import VOCABULARY, Subject
from whichkl.distillation.losses import DIVERGENCES
from whichkl.process.threads import one_thread
from whichkl.process.torch_modes import plain_modes
from whichkl.progress import with_progress

_CHECKS: dict[str, Callable[[Examination], Check] | None] = {
    "the same number twice": value_checks.steady,
    "zero at the teacher": value_checks.zero,
    "never negative": value_checks.never_negative,
    "sign": value_checks.sign,
    "a divergence": value_checks.is_divergence,
    "what it claims": value_checks.claim,
    "gradient": value_checks.gradient,
    "logits normalised": value_checks.normalised,
    "temperature": value_checks.temperature,
    "reduction": None,
    "every row counts": token_checks.every_row_counts,
    "causal shift": None,
    "mask": token_checks.masked,
    "count of tokens": token_checks.count_of_tokens,
    "NaN in padding": token_checks.nan_in_padding,
    "all masked": token_checks.all_masked,
    "other labels": token_checks.other_labels,
    "accumulation": token_checks.accumulation,
    "chunks and lengths": token_checks.chunks_and_lengths,
    "logits of −inf": value_checks.impossible,
    "infinite divergence": value_checks.infinite,
    "mass outside a top-k": value_checks.top_k,
    "small values in bf16": value_checks.bfloat16,
}
"""The checks by name, in the order of the table. Two of them, None here, are made before: others need what they find."""


@typed
@with_progress("calling the loss")
@plain_modes()
def audit(
    loss_fn: Callable[..., Any],
    *,
    adapter: str | Adapter | Callable[..., Any] | None = None,
    knobs: Mapping[str, tuple[float, float]] | None = None,
    claims: str | None = None,
    shift: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Audit:
    """Find out what a distillation loss computes, by calling it: which divergence, with which faults.

    The gradient and the values are matched against every divergence in `whichkl.losses`, with fitted weight, temperature and
    parameter; then come the reduction, masks, shifts, accumulation, impossible tokens, bfloat16. Some two hundred calls on
    logits of 128 to 4,096 tokens; seconds on a CPU.

    Args:
        loss_fn: `loss_fn(*, teacher, student, mask=None)` of logits (b, t, v) and a mask (b, t), True for tokens that count;
            returns one number, or one per token.
        adapter: how to call another shape: a name in `ADAPTERS`, or a function `f(loss_fn, *, teacher, student, mask, **knobs)`.
        knobs: {"beta": (0, 1)}: arguments (or attributes of a module) to sweep between two ends.
        claims: what the loss should be, a name in `DIVERGENCES`; any other divergence is then a failure.
        shift: how many positions before its label a token's logits should lie, 0 or 1; None takes what a loss with labels does.
        seed: of all logits.
        device: where the loss is called.

    Returns:
        `.passed`, `.identified`, `.findings`, `.checks`; prints as a table.

    Raises:
        InputError: it can't be called this way, what it returns isn't a loss, or an argument isn't known.

    >>> from whichkl import losses
    >>> r = audit(losses.reverse_kl)
    >>> r.passed, str(r.identified)
    (True, 'reverse_kl, mean over tokens')
    """
    if not callable(loss_fn):
        raise InputError(cannot("audit this", f"it is a {type(loss_fn).__name__}, not a function", "Pass the loss itself"))
    if claims is not None and claims not in DIVERGENCES:
        raise InputError(
            cannot(f"check the claim {claims!r}", "there is none of that name", f"Use one of {', '.join(DIVERGENCES)}")
        )
    seed = check_seed(seed)
    check_tensor_options(None, device)
    if any(not isinstance(ends, (list, tuple)) or len(ends) != 2 for ends in (knobs or {}).values()):
        because = "each parameter of the loss has two values, a low and a high one"
        raise InputError(cannot("turn these `knobs`", because, "Give, say, knobs={'beta': (0.1, 0.9)}"))
    subject = Subject(loss_fn, adapter_for(adapter, loss_fn), seed, device)
    with one_thread():  # small tensors: more threads only wait for each other
        scale = abs(subject.settle(*subject.pair(2, 4, gap=1.0)).value)
        shift_check = token_checks.shifted(subject, shift)  # sets the shift, on which everything below depends
        reduction_check, reduction = token_checks.reduction(subject)
        e = Examination(subject, scale, _nature_with(reduction, subject), reduction, claims, knobs or {})
        made = {"causal shift": shift_check, "reduction": reduction_check}
        for name, check in _CHECKS.items():
            e.done[name] = made[name] if check is None else check(e)
        for name, (low, high) in e.knobs.items():
            if name not in token_checks.CHUNKS:
                e.done[f"knob {name}"] = knob(subject, name, low, high)
    checks = tuple(replace(check, name=name) for name, check in e.done.items())
    return Audit(subject.name, subject.adapter.name, e.nature.identified, checks)


def _nature_with(reduction: Reduction | None, subject: Subject) -> Nature:
    """Identify a loss; its factors are then those of the divergence summed or averaged as the loss does."""
    found = nature(subject)
    if reduction is None or found.gradient is None or found.identified.name == "something else":
        return found
    factors = (found.gradient.factor, found.gradient.on_labels)
    weight, on_labels = (reduction.weight(one, 2, 4 - subject.shift, VOCABULARY) for one in factors)
    named = replace(found.identified, weight=weight, reduction=reduction.name, hard_labels=on_labels)
    return replace(found, identified=named)
