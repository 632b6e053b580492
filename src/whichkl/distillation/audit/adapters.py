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

IGNORED = -100


@dataclass(frozen=True)
class Adapter:
    """How a loss is called.

    Args:
        name: as in `audit(adapter=)`.
        shape: the call, as text.
        call: `call(loss, *, teacher, student, mask, labels, knobs)`, which calls the loss with logits (b, t, v), a mask
            (b, t), True for tokens that count, or None where all do, and labels (b, t), −100 where the mask is False.
        masks: whether tokens can be left out.
        labels: whether that is done by labels.
        infinite: whether logits may be −∞; False where they are products with a head.
    """

    name: str
    shape: str
    call: Callable[..., Any]
    masks: bool = False
    labels: bool = False
    infinite: bool = True


def adapter_for(adapter: str | Adapter | Callable[..., Any] | None, loss: Callable[..., Any]) -> Adapter:
    """Return an adapter by its name, the one given, or that of a function `f(loss, *, teacher, student, mask, **knobs)`."""
    if isinstance(adapter, Adapter):
        return adapter
    if adapter is None or adapter == "keywords":
        return replace(ADAPTERS["keywords"], masks=_takes_mask(loss)[0])
    if callable(adapter):
        call = adapter

        def own(loss: Any, *, teacher: Tensor, student: Tensor, mask: Tensor | None, knobs: Any, **_: Any) -> Any:
            return call(loss, teacher=teacher, student=student, mask=_all_rows(student) if mask is None else mask, **knobs)

        return Adapter("your own", "by a function of yours", own, masks=True)
    if adapter not in ADAPTERS:
        because = f"the names are {', '.join(ADAPTERS)}"
        hint = "Name one of them, or pass a function `f(loss, *, teacher, student, mask)`"
        raise InputError(cannot(f"use adapter={adapter!r}", because, hint))
    return ADAPTERS[adapter]


def _takes_mask(loss: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a mask can be passed by keyword, and whether it must be."""
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return True, False
    mask = parameters.get("mask")
    if mask is None:
        return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()), False
    return True, mask.default is inspect.Parameter.empty


def _all_rows(student: Tensor) -> Tensor:
    return torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)


def _keywords(loss: Any, *, teacher: Tensor, student: Tensor, mask: Tensor | None, knobs: Any, **_: Any) -> Any:
    if mask is None and _takes_mask(loss)[1]:
        mask = _all_rows(student)
    return loss(teacher=teacher, student=student, **({} if mask is None else {"mask": mask}), **knobs)


def _chunks(loss: Any, *, teacher: Tensor, student: Tensor, labels: Tensor, knobs: Any, **_: Any) -> Any:
    count = getattr(loss, "num_output_chunks", 2)
    return loss(list(student.chunk(count, 1)), list(teacher.chunk(count, 1)), labels, **knobs)


_FORMS: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "log q": lambda given: given["student"].log_softmax(-1),
    "log p": lambda given: given["teacher"].log_softmax(-1),
    "p": lambda given: given["teacher"].softmax(-1),
    "student's rows": lambda given: given["student"].flatten(0, 1),
    "teacher's rows": lambda given: given["teacher"].flatten(0, 1),
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


_LABELS = {"masks": True, "labels": True}
_BY_NAME = {"hidden_student": "student", "weight_student": "head", "hidden_teacher": "teacher", "weight_teacher": "head"}
_LABELS_BY_NAME = {"student_logits": "student", "teacher_logits": "teacher", "labels": "labels"}
_HEADS = "loss(hidden, head, hidden of the teacher, its head, labels), rows flat; the heads are the identity"
_NAMED_HEADS = "loss(hidden_student=, weight_student=, hidden_teacher=, weight_teacher=, mask=); the heads are the identity"
_KNOWN = (
    Adapter("keywords", "loss(teacher=, student=, mask=)", _keywords, masks=True),
    Adapter("student_teacher", "loss(student, teacher)", _with("student", "teacher")),
    Adapter("teacher_student", "loss(teacher, student)", _with("teacher", "student")),
    Adapter("labels", "loss(student, teacher, labels), −100 ignored", _with("student", "teacher", "labels"), **_LABELS),
    Adapter("named_labels", "loss(student_logits=, teacher_logits=, labels=), −100 ignored", _with(**_LABELS_BY_NAME), **_LABELS),
    Adapter("chunks", "loss([student, …], [teacher, …], labels), split along positions", _chunks, **_LABELS),
    Adapter("log_probs", "loss(log student, log teacher), probabilities", _with("log q", "log p")),
    Adapter("probabilities", "loss(log student, teacher), probabilities", _with("log q", "p")),
    Adapter("heads", _HEADS, _with("student's rows", "head", "teacher's rows", "head", "flat labels"), infinite=False, **_LABELS),
    Adapter("named_heads", _NAMED_HEADS, _with(**_BY_NAME, mask="mask"), masks=True, infinite=False),
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
