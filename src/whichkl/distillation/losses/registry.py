"""DIVERGENCES: every row divergence by its name, with its function and its properties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses import rows
from whichkl.distillation.losses.adaptive import RowAdaptiveKL, RowInterpolatedKL
from whichkl.distillation.losses.kinds import (
    RowForwardKL,
    RowJeffreys,
    RowJensenShannon,
    RowRenyi,
    RowReverseKL,
    RowSkewForwardKL,
    RowSkewReverseKL,
    RowTotalVariation,
)
from whichkl.distillation.losses.row_divergence import RowDivergence


@dataclass(frozen=True)
class Entry:
    """One line of the table: a function of logits, its divergence, whose class attributes are its properties, and parameters."""

    function: Callable[..., Tensor]
    divergence: type[RowDivergence]
    parameters: Mapping[str, float]  # and their defaults


def _entry(function: Callable[..., Tensor], divergence: type[RowDivergence]) -> Entry:
    defaults = {one.name: one.default for one in fields(divergence) if isinstance(one.default, float)}
    return Entry(function, divergence, defaults)


def divergence_named(name: str | RowDivergence, **parameters: float) -> RowDivergence:
    """Return a divergence by its name in `DIVERGENCES`, or the one given.

    >>> divergence_named("jeffreys", weight_on_forward=0.3)
    RowJeffreys(weight_on_forward=0.3)

    Raises:
        InputError: the name isn't known, or it takes no such parameter.
    """
    if isinstance(name, RowDivergence):
        if parameters:
            because = "a divergence that is given carries its own"
            raise InputError(cannot(f"set {', '.join(parameters)}", because, "Pass them where it is made"))
        return name
    if name not in DIVERGENCES:
        raise InputError(cannot(f"use divergence={name!r}", "there is none of that name", f"Use one of {', '.join(DIVERGENCES)}"))
    entry = DIVERGENCES[name]
    if unknown := set(parameters) - set(entry.parameters):
        because = f"it takes {', '.join(entry.parameters) or 'no parameters'}"
        raise InputError(cannot(f"set {', '.join(sorted(unknown))} of {name}", because, "Leave it out"))
    return entry.divergence(**parameters)


DIVERGENCES: Mapping[str, Entry] = MappingProxyType(
    {
        entry.divergence.name: entry
        for entry in (
            _entry(rows.forward_kl, RowForwardKL),
            _entry(rows.reverse_kl, RowReverseKL),
            _entry(rows.jeffreys, RowJeffreys),
            _entry(rows.jensen_shannon, RowJensenShannon),
            _entry(rows.skew_forward_kl, RowSkewForwardKL),
            _entry(rows.skew_reverse_kl, RowSkewReverseKL),
            _entry(rows.renyi, RowRenyi),
            _entry(rows.total_variation, RowTotalVariation),
            _entry(rows.adaptive_kl, RowAdaptiveKL),
            _entry(rows.interpolated_kl, RowInterpolatedKL),
        )
    }
)
