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


def _heads(loss: Any, *, teacher: Tensor, student: Tensor, labels: Tensor, knobs: Any, **_: Any) -> Any:
    eye = torch.eye(student.shape[-1], dtype=student.dtype, device=student.device)
    return loss(student.flatten(0, 1), eye, teacher.flatten(0, 1), eye, labels.flatten(), **knobs)


def _named_heads(loss: Any, *, teacher: Tensor, student: Tensor, mask: Any, knobs: Any, **_: Any) -> Any:
    eye = torch.eye(student.shape[-1], dtype=student.dtype, device=student.device)
    return loss(hidden_student=student, weight_student=eye, hidden_teacher=teacher, weight_teacher=eye, mask=mask, **knobs)


_WITH_LABELS = {"masks": True, "labels": True}
_KNOWN = (
    Adapter("keywords", "loss(teacher=, student=, mask=)", _keywords, masks=True),
    Adapter("student_teacher", "loss(student, teacher)", lambda f, *, teacher, student, knobs, **_: f(student, teacher, **knobs)),
    Adapter("teacher_student", "loss(teacher, student)", lambda f, *, teacher, student, knobs, **_: f(teacher, student, **knobs)),
    Adapter(
        "labels",
        "loss(student, teacher, labels), −100 ignored",
        lambda f, *, teacher, student, labels, knobs, **_: f(student, teacher, labels, **knobs),
        **_WITH_LABELS,
    ),
    Adapter(
        "named_labels",
        "loss(student_logits=, teacher_logits=, labels=), −100 ignored",
        lambda f, *, teacher, student, labels, knobs, **_: f(
            student_logits=student, teacher_logits=teacher, labels=labels, **knobs
        ),
        **_WITH_LABELS,
    ),
    Adapter("chunks", "loss([student, …], [teacher, …], labels), split along positions", _chunks, **_WITH_LABELS),
    Adapter(
        "log_probs",
        "loss(log student, log teacher), probabilities",
        lambda f, *, teacher, student, knobs, **_: f(student.log_softmax(-1), teacher.log_softmax(-1), **knobs),
    ),
    Adapter(
        "probabilities",
        "loss(log student, teacher), probabilities",
        lambda f, *, teacher, student, knobs, **_: f(student.log_softmax(-1), teacher.softmax(-1), **knobs),
    ),
    Adapter(
        "heads",
        "loss(hidden, head, hidden of the teacher, its head, labels), rows flat; the heads are the identity",
        _heads,
        infinite=False,
        **_WITH_LABELS,
    ),
    Adapter(
        "named_heads",
        "loss(hidden_student=, weight_student=, hidden_teacher=, weight_teacher=, mask=); the heads are the identity",
        _named_heads,
        masks=True,
        infinite=False,
    ),
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
