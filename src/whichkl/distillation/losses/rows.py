"""Losses between rows of logits, one function per row divergence: forward KL is KL(teacher‖student)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from whichkl._checks import InputError, as_number, cannot
from whichkl.distillation.losses.logits import Loss, of_logits
from whichkl.divergences.kinds import PARAMETERS, ROW_DIVERGENCES, RowDivergence
from whichkl.divergences.kinds import divergence_named as _named

RowLoss = Callable[..., Loss]
"""A loss of logits: the arguments of `of_logits`, and the parameter of its divergence, all by keyword."""


@dataclass(frozen=True)
class Entry:
    """One line of the table: a function of logits, its divergence, whose class attributes are its properties, and parameters."""

    function: RowLoss
    divergence: type[RowDivergence]
    parameters: Mapping[str, float]
    """The parameters with their defaults."""


def divergence_named(name: str | RowDivergence, **parameters: float) -> RowDivergence:
    """Return a row divergence by its name in `DIVERGENCES`, or the one given.

    >>> divergence_named("jeffreys", weight_on_forward=0.3)
    JeffreysDivergence(weight_on_forward=0.3)

    Raises:
        InputError: the name isn't known, or it takes no such parameter.
    """
    if not isinstance(name, RowDivergence):
        return _named(name, ROW_DIVERGENCES, **parameters)
    if parameters:
        because = "a divergence that is given carries its own"
        raise InputError(cannot(f"set {', '.join(parameters)}", because, "Pass them where it is made"))
    return name


def _row_loss(name: str, example: str = "...") -> RowLoss:
    """Return the loss of a divergence, with its signature and docstring; `example` is its value in the docstring's example."""
    divergence = ROW_DIVERGENCES[name]

    def loss(**given: Any) -> Loss:
        # A tensor may have a gradient, so that it stays what it is.
        parameters = {
            name: value if isinstance(value, Tensor) else as_number(value) for name, value in given.items() if name not in _SHARED
        }
        return of_logits(divergence(**parameters), **{name: given[name] for name in given if name in _SHARED})

    made: Any = loss
    made.__code__ = made.__code__.replace(co_name=divergence.name)  # torch.compile keeps and counts graphs per code object
    made.__name__ = made.__qualname__ = divergence.name
    made.__signature__ = _signature(divergence)
    made.__doc__ = "\n".join(
        [
            f"{inspect.getdoc(divergence)}",
            "",
            "p is the teacher's row and q the student's. Gradients reach the teacher too, unless it is detached. Arguments,",
            "results and errors are those of `of_logits`.",
            "",
            ">>> import torch",
            f">>> {divergence.name}(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))",
            f"tensor({example})",
        ]
    )
    one: RowLoss = made
    return one


_OF_LOGITS = inspect.signature(of_logits)
_SHARED = frozenset(_OF_LOGITS.parameters) - {"divergence"}


def _signature(divergence: type[RowDivergence]) -> inspect.Signature:
    """The signature of `of_logits`, with the divergence's own parameters in place of the divergence."""
    _, teacher, student, *others = _OF_LOGITS.parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [inspect.Parameter(one.name, keyword, default=one.default, annotation="float") for one in fields(divergence)]
    return _OF_LOGITS.replace(parameters=[teacher, student, *own, *others])


forward_kl = _row_loss("forward_kl", "0.2662")
reverse_kl = _row_loss("reverse_kl", "0.3090")
jeffreys = _row_loss("jeffreys", "0.2876")
jensen_shannon = _row_loss("jensen_shannon", "0.0687")
skew_forward_kl = _row_loss("skew_forward_kl", "0.2165")
skew_reverse_kl = _row_loss("skew_reverse_kl", "0.2345")
renyi = _row_loss("renyi", "0.1457")
total_variation = _row_loss("total_variation", "0.3319")
adaptive_kl = _row_loss("adaptive_kl", "0.2876")
interpolated_kl = _row_loss("interpolated_kl", "0.0784")


class _Entries(Mapping[str, Entry]):
    """The entries of all registered row divergences; one that was registered later gets its function on first access."""

    def __init__(self) -> None:
        self._made = {name: self._entry(name, globals()[name]) for name in ROW_DIVERGENCES}

    def __getitem__(self, name: str) -> Entry:
        divergence = ROW_DIVERGENCES[name]
        if name not in self._made or self._made[name].divergence is not divergence:
            self._made[name] = self._entry(name, _row_loss(name))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ROW_DIVERGENCES)

    def __len__(self) -> int:
        return len(ROW_DIVERGENCES)

    def _entry(self, name: str, function: RowLoss) -> Entry:
        divergence = ROW_DIVERGENCES[name]
        return Entry(function, divergence, {field: getattr(divergence, field) for field in PARAMETERS[name]})


DIVERGENCES: Mapping[str, Entry] = _Entries()
"""Every row divergence by its name, with its function and its parameters."""
