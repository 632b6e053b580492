"""Needs: what users want from a model, the column that measures it, and the difference that matters in practice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Need:
    """One thing that a user may want; `decide` judges arms by each need separately."""

    name: str
    columns: tuple[str, ...]
    """Columns of the table; the first that has values is judged."""
    wish: str
    """In words, after "you want"."""
    less_is_better: bool = True
    absolute: float = 0.01
    """Differences below this don't matter, in the column's unit."""
    relative: float = 0.05
    """Nor do differences below this share of the better arm's mean; not used where a column is known up to a constant."""

    def column(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the column that counts for these rows."""
        return next((name for name in self.columns if any(row.get(name) is not None for row in rows)), None)


NEEDS = (
    Need("overall", ("jeffreys",), "q close to p in both directions"),
    Need("coverage", ("forward_kl",), "nothing of p to be missed"),
    Need("precision", ("reverse_kl",), "no draws where p has none"),
    Need("calibration", ("interval_gap",), "intervals that hold as much of p as they say", relative=0.0),
)
"""Needs by which fits are judged; units are those of the columns."""

DISTILLATION_NEEDS = (
    Need("accuracy", ("accuracy",), "labels to be right", less_is_better=False, absolute=0.005, relative=0.0),
    Need("agreement", ("agreement",), "the teacher's decisions", less_is_better=False, absolute=0.005, relative=0.0),
    Need("likelihood", ("nll",), "probabilities of the labels that are high", absolute=0.005),
    Need("calibration", ("ece",), "confidence that is right as often as it says", absolute=0.005, relative=0.0),
    Need("coverage", ("forward_kl",), "nothing to be missed that the teacher holds possible", absolute=0.005),
    Need("precision", ("reverse_kl",), "nothing that the teacher holds impossible", absolute=0.005),
)
"""Needs by which students are judged; units are those of the columns."""

CHEAPER = 0.1
"""An arm is cheaper than another where it uses less by more than this share."""
