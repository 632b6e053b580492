"""audit: a black-box examination of a distillation loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot, check_seed
from whichkl.arrays import check_tensor_options
from whichkl.distillation.audit import edge_checks, finite_checks, row_checks, token_checks, value_checks
from whichkl.distillation.audit.adapters import Adapter, adapter_for
from whichkl.distillation.audit.identify import UNKNOWN, Examination, Nature, Reduction, find_nature, knob
from whichkl.distillation.audit.probes import VOCABULARY
from whichkl.distillation.audit.result import NOT_TRIED, Audit, Check, not_applicable
from whichkl.distillation.audit.search import Identified
from whichkl.distillation.audit.signatures import instance_of
from whichkl.distillation.audit.subject import Subject
from whichkl.distillation.losses import DIVERGENCES
from whichkl.process.threads import one_thread
from whichkl.process.torch_modes import plain_modes
from whichkl.progress import with_progress

_NAN = frozenset({"nan"})
_UNSTEADY = _NAN | {"random", "state"}
_BROKEN = _UNSTEADY | {"no_gradient"}
_MIXED = _BROKEN | {"not_normalised", "wrong_axis", "rows_mixed", "misaligned"}
_MASK = _MIXED | {"nan_at_masked_tokens", "mask_ignored", "mask_inverted"}
_CUT = _MIXED | {"clamped", "rows_dropped"}
_SUMMED = _MASK | {"rows_dropped", "reduction", "mean_over_vocabulary"}

_CHECKS: dict[str, tuple[Callable[[Examination], Check] | None, frozenset[str]]] = {
    "finite numbers": (None, frozenset()),
    "the same number twice": (None, _NAN),
    "arguments untouched": (finite_checks.untouched, frozenset()),
    "gradient": (row_checks.gradient, _UNSTEADY),
    "finite on sure rows": (finite_checks.sure_rows, _BROKEN),
    "logits normalised": (row_checks.normalised, _BROKEN),
    "rows independent": (row_checks.independent, _BROKEN | {"wrong_axis"}),
    "finite where masked": (finite_checks.masked_tokens, _BROKEN),
    "causal shift": (None, _MIXED),
    "mask": (token_checks.masked, _MIXED | {"nan_at_masked_tokens"}),
    "every row counts": (row_checks.every_row_counts, _MIXED),
    "reduction": (None, _MIXED | {"rows_dropped"}),
    "count of tokens": (token_checks.count_of_tokens, _SUMMED),
    "NaN in padding": (token_checks.nan_in_padding, _MASK),
    "all masked": (token_checks.all_masked, _MASK),
    "other labels": (token_checks.other_labels, _BROKEN),
    "accumulation": (token_checks.accumulation, _SUMMED | {"mean_counts_padding", "count"}),
    "chunks and lengths": (token_checks.chunks_and_lengths, _MIXED | {"rows_dropped"}),
    "never negative": (value_checks.never_negative, _MIXED),
    "sign": (value_checks.sign, _BROKEN),
    "zero at the teacher": (value_checks.zero, _MIXED | {"clamped", "negative"}),
    "zero elsewhere": (value_checks.zero_elsewhere, _CUT | {"not_zero_at_teacher", "negative", "sign"}),
    "a divergence": (value_checks.is_divergence, _BROKEN),
    "what it claims": (value_checks.claim, _UNSTEADY),
    "gradient of its value": (value_checks.of_its_value, _BROKEN),
    "the teacher's gradient": (value_checks.of_the_teacher, _BROKEN),
    "temperature": (value_checks.temperature, _BROKEN),
    "mass outside a top-k": (edge_checks.top_k, _CUT | {"zero_elsewhere", "not_zero_at_teacher"}),
    "logits of −inf": (edge_checks.impossible, _BROKEN),
    "infinite divergence": (edge_checks.infinite, _BROKEN),
    "values on sure rows": (edge_checks.sure_values, _BROKEN),
    "small values in bf16": (edge_checks.bfloat16, _BROKEN),
}
"""The checks by name, in the order of the table, each with the findings of earlier checks that explain its failure: it isn't made
after them. Those that are None here are made before: all others need what they find."""


@typed
@with_progress("calling the loss")
@plain_modes()
def audit(
    loss_fn: Callable[..., Any] | type,
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
    parameter, on logits that are ordinary at that temperature. The checks go from the numbers themselves (NaN, draws, writes
    into arguments) over rows, masks and reductions to zeros, signs and edges; a failure that explains later ones ends those.
    Some two hundred calls on copies of logits of 128 to 4,096 tokens; about a second on a CPU.

    Args:
        loss_fn: a function, a module, or its class, of logits of a teacher and a student (b, t, v), or rows (n, v), and, if it
            takes them, a mask (b, t), True for tokens that count, and labels; the arguments' names tell which is which. It
            returns one number, one per token or one per sequence, in a tuple or dict too.
        adapter: how to call another shape: a name in `ADAPTERS`, or a function `f(loss_fn, *, teacher, student, **knobs)`,
            which may take `mask` and `labels` too.
        knobs: {"beta": (0, 1)}: arguments (or attributes of a module) to sweep between two ends.
        claims: what the loss should be, a name in `DIVERGENCES`; any other divergence is then a failure.
        shift: how many positions before its label a token's logits should lie, 0 or 1; None takes what a loss with labels does.
        seed: of all logits.
        device: where the loss is called.

    Returns:
        `.passed`, `.identified`, `.wrong`, `.fragile`, `.call`, `.checks`; prints as a table.

    Raises:
        InputError: it can't be called this way, what it returns isn't a loss, or an argument isn't known.

    >>> from whichkl import losses
    >>> r = audit(losses.reverse_kl)
    >>> r.passed, str(r.identified)
    (True, 'reverse_kl, mean over tokens')
    """
    _check_arguments(loss_fn, knobs or {}, claims)
    seed = check_seed(seed)
    check_tensor_options(None, device)
    loss = instance_of(loss_fn) if isinstance(loss_fn, type) else loss_fn
    subject = Subject(loss, adapter_for(adapter, loss), seed, device)
    with one_thread():  # small tensors: more threads only wait for each other
        e, made = _examination(subject, shift, claims, knobs or {})
        _check_all(e, made)
    checks = tuple(replace(check, name=name) for name, check in e.done.items())
    identified, mistake = e.nature.identified, next((one.seen for one in checks if one.grade == "wrong"), "")
    if identified.note == UNKNOWN and mistake:
        identified = replace(identified, note=mistake)
    return Audit(subject.name, subject.adapter.name, subject.called, identified, checks)


def _check_all(e: Examination, made: Mapping[str, Check]) -> None:
    """Make each check that no failure before it explains, and turn the parameters."""
    for name, (check, explained_by) in _CHECKS.items():
        cause = e.cause(explained_by)
        if cause:
            e.done[name] = not_applicable(f"{NOT_TRIED} “{cause}”")
        else:
            e.done[name] = made[name] if check is None else check(e)
    if not e.cause(_BROKEN):
        for name, (low, high) in e.knobs.items():
            if name not in token_checks.CHUNKS:
                e.done[f"knob {name}"] = knob(e.subject, name, low, high)


def _check_arguments(loss_fn: Any, knobs: Mapping[str, Any], claims: str | None) -> None:
    if not callable(loss_fn):
        raise InputError(cannot("audit this", f"it is a {type(loss_fn).__name__}, not a function", "Pass the loss itself"))
    if claims is not None and claims not in DIVERGENCES:
        known = f"Use one of {', '.join(DIVERGENCES)}"
        raise InputError(cannot(f"check the claim {claims!r}", "there is none of that name", known))
    if any(not isinstance(ends, (list, tuple)) or len(ends) != 2 for ends in knobs.values()):
        because = "each parameter of the loss has two values, a low and a high one"
        raise InputError(cannot("turn these `knobs`", because, "Give, say, knobs={'beta': (0.1, 0.9)}"))


def _examination(
    subject: Subject, shift: int | None, claims: str | None, knobs: Mapping[str, Any]
) -> tuple[Examination, dict[str, Check]]:
    """Find what all checks go by: precision, shift, temperature, nature, reduction. Return the checks made on the way."""
    subject.settle()
    made = {"finite numbers": finite_checks.ordinary(subject)}
    if made["finite numbers"].outcome == "fail":
        return Examination(subject, claims, knobs, _named("no number on ordinary logits")), made
    made["the same number twice"] = finite_checks.steady(subject)
    if made["the same number twice"].outcome == "fail":
        return Examination(subject, claims, knobs, _named("another number at each call")), made
    subject.find_precision()
    made["causal shift"] = token_checks.shifted(subject, shift)  # sets the shift, on which everything below depends
    nature = find_nature(subject)  # sets the unit, so that all logits below are ordinary at the loss's temperature
    mask_works = subject.adapter.masks and subject(*token_checks.padded(subject)[:3]).finite
    made["reduction"], reduction = token_checks.reduction(subject, mask_works, nature.near is not None)
    scale = abs(subject(*subject.pair(2, 4, gap=1.0)).value)
    return Examination(subject, claims, knobs, _nature_with(nature, reduction, subject), reduction, scale), made


def _named(note: str) -> Nature:
    """Return the nature of a loss that can't be identified."""
    return Nature(Identified("something else", note=note), None, None, 0.0, False, 0.0)


def _nature_with(found: Nature, reduction: Reduction | None, subject: Subject) -> Nature:
    """Return what a loss was found to be, with the factors of the divergence summed or averaged as the loss does."""
    if reduction is None or found.identified.name == "something else":
        return found

    def weight(factor: float) -> float:
        return reduction.weight(factor, 2, 4 - subject.shift, VOCABULARY)

    hard = weight(found.identified.hard_labels)
    if found.gradient is None:
        return replace(found, identified=replace(found.identified, reduction=reduction.name, hard_labels=hard))
    named = replace(found.identified, weight=weight(found.gradient.factor), reduction=reduction.name, hard_labels=hard)
    return replace(found, identified=named)
