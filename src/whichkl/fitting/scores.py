"""Scores: how likely rows are under a fit, how strange that is, and which columns drive it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot

_MAX_DRIVERS_SHOWN = 3
_MIN_GAIN_SHOWN = 0.1
"""Smallest gain, in nats, of a driver that the text of a row names."""
_MAX_ROWS_SHOWN = 10


@dataclass(frozen=True)
class Driver:
    """A column of a row, and what its value costs."""

    column: str
    value: float | str
    """What the row has there; a label for a category."""
    gain: float
    """Nats that the log density would gain if only this column took the best of the values that the model draws.

    ∞ for each of several columns whose values alone put the row outside the support.
    """

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:,.6g}"
        return f"{self.column} = {value} (+{self.gain:.3g})"


@dataclass(frozen=True)
class ScoredRow:
    """One row: its place, its scores, its values and the columns that drive it, the strongest first."""

    place: str
    """Such as ``"line 17"`` of a CSV, or ``"row 3"``, from 0, of anything else."""
    log_density: float
    """log q of the row, or log q(y|x), in nats; −inf outside the support."""
    rank: float
    """The share of the model's own draws whose log density is lower or equal."""
    values: Mapping[str, float | str]
    drivers: tuple[Driver, ...]

    @property
    def driven_by(self) -> str:
        """The strongest drivers as text."""
        strong = [str(one) for one in self.drivers[:_MAX_DRIVERS_SHOWN] if one.gain >= _MIN_GAIN_SHOWN]
        return ", ".join(strong) or ("several columns together" if self.rank == 0 else "no single column")

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON can hold it."""
        drivers = [{"column": one.column, "value": one.value, "gain": one.gain} for one in self.drivers]
        shared = {"place": self.place, "log_density": self.log_density, "rank": self.rank}
        return {**shared, "values": dict(self.values), "drivers": drivers}


@dataclass(frozen=True)
class Scores:
    """The scores of n rows, in their order; `top` has the strangest ones."""

    log_density: Float[Tensor, " n"]
    """log q of each row, or log q(y|x), in nats; −inf outside the support."""
    rank: Float[Tensor, " n"]
    """The share of the model's own draws whose log density is lower or equal; small means strange. 0 outside the support."""
    numbers: Int[np.ndarray, " n"] = field(repr=False)
    """The line of each row in a CSV, or its number, from 0, in anything else."""
    rows: tuple[ScoredRow, ...] = field(repr=False)
    """The strangest rows, the strangest first."""
    draws: int
    """How many draws the ranks count; their resolution is 1 / draws."""
    notes: tuple[str, ...] = ()

    def top(self, k: int) -> tuple[ScoredRow, ...]:
        """Return the k strangest rows, those of the lowest log density.

        Raises:
            InputError: more are requested than were kept.
        """
        if k > len(self.rows) and len(self.rows) < len(self.log_density):
            because = f"the drivers of only {len(self.rows)} rows were computed"
            raise InputError(cannot(f"show the top {k} rows", because, f"Pass `top={k}` to `score`"))
        return self.rows[:k]

    def __str__(self) -> str:
        """A short table."""
        outside = int((self.log_density == -math.inf).sum())
        count = len(self.log_density)
        lines = [f"{count:,} row{'s' * (count > 1)}, median log density {float(self.log_density.median()):.4g} nats"]
        lines[0] += f", {outside:,} outside the support of the model" if outside else ""
        for one in self.rows[:_MAX_ROWS_SHOWN]:
            lines.append(f"  {one.place}: log density {one.log_density:.4g}, rank {one.rank:.4g}: {one.driven_by}")
        return "\n".join([*lines, f"  {_resolution(self.draws)}", *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True)
class Strangest:
    """What is known of scored rows without the scores of each: their number, and the strangest ones."""

    count: int
    """The number of rows that have scores."""
    outside: int
    """How many of them lie outside the support of the model."""
    draws: int
    rows: tuple[ScoredRow, ...]
    """The strangest rows, the strangest first."""
    notes: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the ranks count, and the notes."""
        outside = (f"Rows outside the support of the model: {self.outside:,}.",) if self.outside else ()
        return (_resolution(self.draws), *outside, *(f"{note[0].upper()}{note[1:]}." for note in self.notes))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        counts = {"rows": self.count, "outside_support": self.outside, "draws": self.draws, "resolution": 1 / self.draws}
        return {**counts, "top": [one.to_dict() for one in self.rows], "notes": list(self.notes)}


def _resolution(draws: int) -> str:
    """Return what a rank counts, in one sentence."""
    return f"A rank is the share of {draws:,} draws of the model that are as strange or stranger; below 1/{draws:,} it is 0."
