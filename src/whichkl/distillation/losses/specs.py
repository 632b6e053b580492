"""Specs: row divergences as texts, ``"jeffreys:0.3"``, in calls, files and on the command line."""

from __future__ import annotations

from typing import Any

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.rows import DIVERGENCES, divergence_named
from whichkl.divergences.divergence import RowDivergence
from whichkl.divergences.kinds import parameters_of


def row_divergence_of(objective: Any) -> RowDivergence:
    """Return the row divergence that a text names: its name, and after a colon its parameter where it has one.

    Raises:
        InputError: the name isn't known, or the parameter can't be this.

    >>> row_divergence_of("jeffreys:0.3")
    JeffreysDivergence(weight_on_forward=0.3)
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
