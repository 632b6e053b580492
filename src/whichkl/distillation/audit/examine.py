"""audit: a black-box examination of a distillation loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from whichkl._checks import InputError, cannot
from whichkl.distillation.audit import batch_checks, edge_checks, token_checks, value_checks
from whichkl.distillation.audit.adapters import Adapter, adapter_for
from whichkl.distillation.audit.identify import Nature, nature
from whichkl.distillation.audit.knob_sweep import knob
from whichkl.distillation.audit.probes import VOCABULARY
from whichkl.distillation.audit.result import Audit, Check
from whichkl.distillation.audit.subject import Subject
from whichkl.distillation.losses import DIVERGENCES
from whichkl.process.threads import one_thread
from whichkl.process.torch_modes import plain_modes


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
    subject = Subject(loss_fn, adapter_for(adapter, loss_fn), seed, device)
    with one_thread():  # small tensors: more threads only wait for each other
        teacher, student = subject.pair(2, 4, gap=1.0)
        first = subject.settle(teacher, student)
        checks, found = _examined(subject, abs(first.value), dict(knobs or {}), claims, shift)
    return Audit(subject.name, subject.adapter.name, found.identified, tuple(checks))


def _examined(
    subject: Subject, scale: float, knobs: dict[str, Any], claims: str | None, shift: int | None
) -> tuple[list[Check], Nature]:
    steady = _steady(subject)
    shifted = token_checks.shifted(subject, shift)
    reduced, how = token_checks.reduction(subject)
    found = nature(subject)
    if how is not None and found.gradient is not None:
        n = 4 - subject.shift
        weight = how.weight(found.gradient.factor, 2, n, VOCABULARY)
        beside = how.weight(found.gradient.on_labels, 2, n, VOCABULARY)
        named = replace(found.identified, weight=weight, reduction=how.name, hard_labels=beside)
        found = replace(found, identified=named if found.identified.name != "something else" else found.identified)
    checks = [
        steady,
        value_checks.zero(subject, scale, found),
        value_checks.least(subject, scale),
        value_checks.sign(found),
        value_checks.identity(found),
        value_checks.claim(found, claims),
        value_checks.gradient(subject, found),
        value_checks.normalised(subject, scale),
        value_checks.temperature(found),
        reduced,
        batch_checks.dropped(found),
        shifted,
        *token_checks.masked(subject, how),
        batch_checks.split(subject),
        batch_checks.chunked(subject, how, knobs),
        edge_checks.impossible(subject),
        edge_checks.infinite(subject, found),
        edge_checks.top_k(subject),
        edge_checks.bfloat16(subject),
    ]
    checks += [knob(subject, name, low, high) for name, (low, high) in knobs.items() if name not in batch_checks.CHUNKS]
    return checks, found


def _steady(subject: Subject) -> Check:
    teacher, student = subject.pair(2, 4)
    values = [subject(teacher, student, seed=i).value for i in range(3)]
    if max(values) - min(values) <= 1e-6 * max(abs(one) for one in values):
        return Check("the same number twice", "pass", "it doesn't depend on random draws")
    seen = f"{min(values):.4g} to {max(values):.4g} on the same logits"
    return Check("the same number twice", "fail", seen, "audit the exact loss, or fix its random draws", "random")
