"""Losses between rows of logits, one function per row divergence: forward KL is KL(teacher‖student)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.logits import Logits, Loss, Mask, Teacher, of_logits
from whichkl.divergences.kinds import PARAMETERS, ROW_DIVERGENCES, RowDivergence
from whichkl.divergences.kinds import divergence_named as _named


class RowLoss(Protocol):
    """A loss of logits; its parameter, where the divergence has one, is passed by its name."""

    __name__: str

    def __call__(
        self,
        *,
        teacher: Teacher,
        student: Logits,
        temperature: float = 1.0,
        mask: Mask | None = None,
        reduction: str = "mean",
        vocabulary: int | None = None,
        temperature_squared: bool = False,
        **parameters: float,
    ) -> Loss:
        """Return the loss; the arguments are those of `of_logits`."""


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
    Jeffreys(weight_on_forward=0.3)

    Raises:
        InputError: the name isn't known, or it takes no such parameter.
    """
    if not isinstance(name, RowDivergence):
        return _named(name, ROW_DIVERGENCES, **parameters)
    if parameters:
        because = "a divergence that is given carries its own"
        raise InputError(cannot(f"set {', '.join(parameters)}", because, "Pass them where it is made"))
    return name


def _row_loss(divergence: type[RowDivergence], example: str) -> RowLoss:
    """Return the loss of a divergence, with its signature and docstring; `example` is its value in the docstring's example."""

    def loss(
        *,
        teacher: Teacher,
        student: Logits,
        temperature: float = 1.0,
        mask: Mask | None = None,
        reduction: str = "mean",
        vocabulary: int | None = None,
        temperature_squared: bool = False,
        **parameters: float,
    ) -> Loss:
        return of_logits(
            divergence(**parameters),
            teacher=teacher,
            student=student,
            temperature=temperature,
            mask=mask,
            reduction=reduction,
            vocabulary=vocabulary,
            temperature_squared=temperature_squared,
        )

    made: Any = loss
    made.__code__ = made.__code__.replace(co_name=divergence.name)  # torch.compile keeps and counts graphs per code object
    made.__name__ = made.__qualname__ = divergence.name
    made.__signature__ = _signature(loss, divergence)
    made.__doc__ = "\n".join(
        [
            f"{inspect.getdoc(divergence)}",
            "",
            "p is the teacher's row and q the student's. Arguments, results and errors are those of `of_logits`.",
            "",
            ">>> import torch",
            f">>> {divergence.name}(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))",
            f"tensor({example})",
        ]
    )
    one: RowLoss = made
    return one


def _signature(loss: RowLoss, divergence: type[RowDivergence]) -> inspect.Signature:
    """The signature with the divergence's own parameters, after teacher and student, in place of `**parameters`."""
    whole = inspect.signature(loss)
    shared = [one for one in whole.parameters.values() if one.kind is inspect.Parameter.KEYWORD_ONLY]
    own = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation="float")
        for one in fields(divergence)
    ]
    return whole.replace(parameters=[*shared[:2], *own, *shared[2:]])


forward_kl = _row_loss(ROW_DIVERGENCES["forward_kl"], "0.2662")
reverse_kl = _row_loss(ROW_DIVERGENCES["reverse_kl"], "0.3090")
jeffreys = _row_loss(ROW_DIVERGENCES["jeffreys"], "0.2876")
jensen_shannon = _row_loss(ROW_DIVERGENCES["jensen_shannon"], "0.0687")
skew_forward_kl = _row_loss(ROW_DIVERGENCES["skew_forward_kl"], "0.2165")
skew_reverse_kl = _row_loss(ROW_DIVERGENCES["skew_reverse_kl"], "0.2345")
renyi = _row_loss(ROW_DIVERGENCES["renyi"], "0.1457")
total_variation = _row_loss(ROW_DIVERGENCES["total_variation"], "0.3319")
adaptive_kl = _row_loss(ROW_DIVERGENCES["adaptive_kl"], "0.2876")
interpolated_kl = _row_loss(ROW_DIVERGENCES["interpolated_kl"], "0.0784")

DIVERGENCES: Mapping[str, Entry] = MappingProxyType(
    {
        name: Entry(globals()[name], one, {field: getattr(one, field) for field in PARAMETERS[name]})
        for name, one in ROW_DIVERGENCES.items()
    }
)
"""Every row divergence by its name, with its function and its parameters."""
