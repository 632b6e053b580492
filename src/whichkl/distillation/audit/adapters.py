"""Adapters: how losses with other signatures are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.audit.signatures import (
    call_by_roles,
    has_log_target,
    holds_no_logits,
    is_torch_convention,
    parameters_of_call,
    roles,
    takes,
)

IGNORED = -100


@dataclass(frozen=True)
class Adapter:
    """How a loss is called.

    Args:
        name: as in `audit(adapter=)`.
        shape: the call, as text.
        call: `call(loss, *, teacher, student, mask, labels, knobs)`, which calls the loss with logits (b, t, v), a mask
            (b, t), True for tokens that count, or None where all do, and labels (b, t), −100 where the mask is False.
        masks: whether tokens can be left out: by a mask, or by labels of −100 where the call has no mask.
        labels: whether the call has labels.
        infinite: whether logits may be −∞; False where they are products with a head.
        rows: True: logits are rows (n, v), masks and labels (n); False: (b, t, v). None: as rows if the loss refuses (b, t, v).
        needs_mask: whether a mask is passed where all tokens count, too.
        may_be_inverted: whether the mask's name allows True for padding.
        inverted: whether True is padding.
    """

    name: str
    shape: str
    call: Callable[..., Any]
    masks: bool = False
    labels: bool = False
    infinite: bool = True
    rows: bool | None = None
    needs_mask: bool = False
    may_be_inverted: bool = False
    inverted: bool = False


def adapter_for(adapter: str | Adapter | Callable[..., Any] | None, loss: Callable[..., Any]) -> Adapter:
    """Return an adapter by its name, the one given, that of a function of the user's, or the one that the signature tells."""
    if isinstance(adapter, Adapter):
        return adapter
    if adapter is None or adapter in ("keywords", "rows"):
        return _by_signature(loss, ADAPTERS[adapter or "keywords"])
    if callable(adapter):
        return _own(adapter)
    if adapter not in ADAPTERS:
        because = f"the names are {', '.join(ADAPTERS)}"
        hint = "Name one of them, or pass a function `f(loss, *, teacher, student, mask)`"
        raise InputError(cannot(f"use adapter={adapter!r}", because, hint))
    return ADAPTERS[adapter]


def _own(call: Callable[..., Any]) -> Adapter:
    """Return the adapter of a function `f(loss, *, teacher, student, **knobs)` that may take `mask` and `labels` too."""
    taken = [name for name in ("mask", "labels") if name in parameters_of_call(call)]

    def own(loss: Any, *, knobs: Any, teacher: Tensor, student: Tensor, **given: Any) -> Any:
        return call(loss, teacher=teacher, student=student, **{name: given[name] for name in taken}, **knobs)

    shape = f"a function of yours, which gets {', '.join(('teacher', 'student', *taken))}"
    masks = takes(call, "mask")  # one that doesn't read its mask has none to pass on
    return Adapter("your own", shape, own, masks=masks, labels="labels" in taken, rows=False, needs_mask="mask" in taken)


def _by_signature(loss: Callable[..., Any], named: Adapter) -> Adapter:
    """Return the adapter for the arguments' names, or the named one if they don't tell teacher and student."""
    names = roles(loss)
    if not names:
        if is_torch_convention(loss):
            return ADAPTERS["log_probs" if has_log_target(loss) else "probabilities"]
        if named.rows:
            needed = [one for one in parameters_of_call(loss).values() if one.default is one.empty]
            forms = ("student", "teacher", "labels")[: 3 if len(needed) > 2 else 2]
            return replace(named, call=_with(*forms), labels=len(forms) == 3)
        return named
    if (other := holds_no_logits(names)) != "":
        because = f"by its name, the argument `{other}` takes no logits"
        hint = f"Pass adapter=, one of {', '.join(ADAPTERS)}, or a function `f(loss, *, teacher, student, mask)`"
        raise InputError(cannot("audit this loss", because, hint))
    roles_told = ("student", "teacher", "mask", "labels")
    shape = f"loss({', '.join(f'{names[role]}=' for role in roles_told if role in names)})"
    masks = "mask" in names or ("labels" in names and not named.rows)
    by_labels = "labels" in names and "mask" not in names
    padding = "pad" in names.get("mask", "")
    return replace(
        named,
        shape=shape + (", labels of −100 ignored" if by_labels and masks else "") + (" of rows (n, v)" if named.rows else ""),
        call=call_by_roles(loss, names),
        masks=masks,
        labels="labels" in names,
        needs_mask="mask" in names and parameters_of_call(loss)[names["mask"]].default is inspect.Parameter.empty,
        may_be_inverted=padding,
    )


def _keywords(loss: Any, *, teacher: Tensor, student: Tensor, mask: Tensor | None, knobs: Any, **_: Any) -> Any:
    return loss(teacher=teacher, student=student, **({} if mask is None else {"mask": mask}), **knobs)


def _chunks(loss: Any, *, teacher: Tensor, student: Tensor, labels: Tensor, knobs: Any, **_: Any) -> Any:
    count = getattr(loss, "num_output_chunks", 2)
    return loss(list(student.chunk(count, 1)), list(teacher.chunk(count, 1)), labels, **knobs)


_FORMS: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "log q": lambda given: given["student"].log_softmax(-1),
    "log p": lambda given: given["teacher"].log_softmax(-1),
    "p": lambda given: given["teacher"].softmax(-1),
    "student's rows": lambda given: given["student"].flatten(0, -2),
    "teacher's rows": lambda given: given["teacher"].flatten(0, -2),
    "flat labels": lambda given: given["labels"].flatten(),
    "head": lambda given: _identity(given["student"]),
}
"""What losses take instead of the logits, the mask and the labels as they are."""


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _with(*forms: str, **named: str) -> Callable[..., Any]:
    """Return a call with these forms, by position or by name, and the knobs."""

    def call(loss: Any, *, knobs: Any, **given: Any) -> Any:
        made = {form: _FORMS[form](given) if form in _FORMS else given[form] for form in (*forms, *named.values())}
        return loss(*(made[form] for form in forms), **{name: made[form] for name, form in named.items()}, **knobs)

    return call


_LABELS: Mapping[str, bool] = {"masks": True, "labels": True}
_BY_NAME = {"hidden_student": "student", "weight_student": "head", "hidden_teacher": "teacher", "weight_teacher": "head"}
_LABELS_BY_NAME = {"student_logits": "student", "teacher_logits": "teacher", "labels": "labels"}
_HEADS = "loss(hidden, head, hidden of the teacher, its head, labels), rows flat; the heads are the identity"
_NAMED_HEADS = "loss(hidden_student=, weight_student=, hidden_teacher=, weight_teacher=, mask=); the heads are the identity"
_KNOWN = (
    Adapter("keywords", "loss(teacher=, student=, mask=)", _keywords, masks=True),
    Adapter(
        "rows", "loss(student, teacher) or loss(student, teacher, labels) of rows (n, v)", _with("student", "teacher"), rows=True
    ),
    Adapter("student_teacher", "loss(student, teacher)", _with("student", "teacher")),
    Adapter("teacher_student", "loss(teacher, student)", _with("teacher", "student")),
    Adapter("labels", "loss(student, teacher, labels), −100 ignored", _with("student", "teacher", "labels"), **_LABELS),
    Adapter("named_labels", "loss(student_logits=, teacher_logits=, labels=), −100 ignored", _with(**_LABELS_BY_NAME), **_LABELS),
    Adapter("chunks", "loss([student, …], [teacher, …], labels), split along positions", _chunks, **_LABELS, rows=False),
    Adapter("log_probs", "loss(log q, log p), log-probabilities of both", _with("log q", "log p")),
    Adapter("probabilities", "loss(log q, p), the student's log-probabilities, the teacher's probabilities", _with("log q", "p")),
    Adapter(
        "heads",
        _HEADS,
        _with("student's rows", "head", "teacher's rows", "head", "flat labels"),
        infinite=False,
        rows=False,
        **_LABELS,
    ),
    Adapter("named_heads", _NAMED_HEADS, _with(**_BY_NAME, mask="mask"), masks=True, infinite=False, rows=False),
)
ADAPTERS = MappingProxyType({one.name: one for one in _KNOWN})
"""The named ways of calling a loss."""


def as_knobs(text: str) -> Mapping[str, tuple[float, float]]:
    """Read NAME=LOW:HIGH.

    >>> as_knobs("beta=0:1")
    {'beta': (0.0, 1.0)}
    """
    name, equals, ends = text.partition("=")
    try:
        low, high = (float(one) for one in ends.split(":"))
    except ValueError:
        equals = ""
    if not equals or not name.isidentifier():
        raise InputError(cannot(f"read the knob `{text}`", "it isn't of the form NAME=LOW:HIGH", "Write, say, beta=0:1"))
    return {name: (low, high)}
