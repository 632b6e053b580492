"""Objectives: a row divergence by its name, with its parameter after a colon, and the loss that hard labels are mixed into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses import DIVERGENCES, RowDivergence, divergence_named, of_logits
from whichkl.divergences.kinds import parameters_of


@dataclass(frozen=True)
class Loss:
    """(1 − w) · D(teacher, student) + w · cross-entropy of the labels, w = `hard_label_weight`, a number a row.

    D is taken with both logits divided by the temperature, and multiplied by its square only where `temperature_squared` says
    so; the cross-entropy is always at temperature 1. Source: Hinton, Vinyals & Dean (2015).
    """

    divergence: RowDivergence
    hard_label_weight: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = False

    def rows(self, teacher: Float[Tensor, "n c"], student: Float[Tensor, "n c"], labels: Int[Tensor, " n"] | None) -> Tensor:
        """Return the loss of each row, in nats where temperature² isn't in it."""
        w = self.hard_label_weight
        soft = hard = None
        if w < 1:
            soft = of_logits(
                self.divergence,
                teacher=teacher,
                student=student,
                temperature=self.temperature,
                reduction="none",
                temperature_squared=self.temperature_squared,
            )
        if w > 0 and labels is not None:
            wide = student if student.dtype == torch.float64 else student.float()
            hard = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
        if soft is None or hard is None:
            return soft if hard is None else hard  # type: ignore[return-value]
        return (1 - w) * soft + w * hard

    def __str__(self) -> str:
        """Such as ``0.7 · T² · forward_kl at T = 4 + 0.3 · cross-entropy of the labels``."""
        w = self.hard_label_weight
        if w == 1:
            return "cross-entropy of the labels"
        weight = "" if w == 0 else f"{1 - w:.4g} · "
        factor = "T² · " if self.temperature_squared else ""
        at = "" if self.temperature == 1 else f" at T = {self.temperature:g}"
        return f"{weight}{factor}{spec_of(self.divergence)}{at}" + ("" if w == 0 else f" + {w:.4g} · cross-entropy of the labels")


def row_divergence_of(objective: Any) -> RowDivergence:
    """Return the row divergence that a text stands for: its name, and after a colon its parameter where it has one.

    Raises:
        InputError: the name isn't known, or the parameter can't be this.

    >>> row_divergence_of("jeffreys:0.3")
    Jeffreys(weight_on_forward=0.3)
    """
    if isinstance(objective, RowDivergence):
        return objective
    if not isinstance(objective, str):
        because = f"it is a `{type(objective).__name__}`"
        raise InputError(cannot("use this objective", because, f"Name one of {', '.join(DIVERGENCES)}"))
    name, colon, value = (part.strip() for part in objective.partition(":"))
    if not colon or name not in DIVERGENCES:
        return divergence_named(name)
    parameters = list(DIVERGENCES[name].parameters)
    try:
        number = float(value)
    except ValueError:
        number = None
    if number is None or not parameters:
        written = name + "".join(f"[:{one.upper()}]" for one in parameters)
        raise InputError(cannot(f"minimise `{objective}`", f"it is written {written}", "Correct it"))
    return divergence_named(name, **{parameters[0]: number})


def spec_of(divergence: RowDivergence) -> str:
    """Return the text that `row_divergence_of` reads.

    >>> spec_of(row_divergence_of("renyi")), spec_of(row_divergence_of("forward_kl"))
    ('renyi:0.5', 'forward_kl')
    """
    return ":".join([divergence.name, *(f"{getattr(divergence, one):g}" for one in parameters_of(divergence))])
