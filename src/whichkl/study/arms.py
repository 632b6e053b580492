"""Arms: the rows of a study by arm and seed, as matrices of their scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from whichkl._checks import InputError, cannot
from whichkl.study.measures import COST, Need, cost_of
from whichkl.study.paired import MIN_PAIRS, Array

Cells = dict[str, dict[int, Mapping[str, Any]]]
"""Rows by arm and seed."""


@dataclass(frozen=True)
class Arm:
    """A family with an objective, and how its cells ended."""

    name: str
    cells: int
    finished: int
    failed: int
    stopped: int
    """Number of finished cells that hadn't converged."""
    cost: float
    """Mean cost of the finished cells; NaN where there are none."""
    error: str = ""
    """Error of the first cell that failed."""
    unit: str = COST.unit
    """Of the cost."""

    @property
    def cost_text(self) -> str:
        """The cost without its unit."""
        return "–" if math.isnan(self.cost) else f"{self.cost:,.0f}" if self.unit == COST.unit else f"{self.cost:.3g}"


@dataclass(frozen=True)
class ArmScores:
    """The numbers that a verdict compares."""

    arms: tuple[Arm, ...]
    needs: tuple[tuple[Need, str], ...]
    """Needs with a column that has values, and that column."""
    values: tuple[Array, ...]
    """A matrix per need, seeds × arms; less is better, NaN where a cell failed or has no value."""
    up_to: frozenset[str]
    """Columns that are known up to a constant."""
    notes: tuple[str, ...]


def arm_of(row: Mapping[str, Any]) -> str:
    """Return the name of a row's arm.

    >>> arm_of({"family": "gaussian", "objective": "jeffreys:0.3"})
    'gaussian · jeffreys:0.3'
    """
    return f"{row['family']} · {row['objective']}"


def rows_by_arm(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of each arm, in their order."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        arms.setdefault(arm_of(row), []).append(row)
    return arms


def mean_and_error(rows: Iterable[Mapping[str, Any]], column: str) -> tuple[float, float | None] | None:
    """Return the mean of a column over the rows that have it, and its standard error.

    None where no row has the column. The error is None where there is one value, or an infinite one.
    """
    values = [float(row[column]) for row in rows if row.get(column) is not None]
    if not values:
        return None
    has_error = len(values) > 1 and all(map(math.isfinite, values))
    return fmean(values), stdev(values) / math.sqrt(len(values)) if has_error else None


def cells_by_arm(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Return the rows by arm and seed, in their order."""
    arms: Cells = {}
    for row in rows:
        mine = arms.setdefault(arm_of(row), {})
        if row["seed"] in mine:
            because = f"{arm_of(row)} has seed {row['seed']} twice"
            raise InputError(cannot("decide", because, "Give each cell once"))
        mine[row["seed"]] = row
    return arms


def scores_of(rows: Sequence[Mapping[str, Any]], arms: Cells, needs: Sequence[Need]) -> ArmScores:
    """Return the values of each need as a matrix, seeds × arms."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    kept, values, notes, up_to = [], [], [], set()
    for need in needs:
        column = need.column(rows)
        if column is None:
            continue
        constants = {row.get(f"{column}_up_to") for row in rows if row.get(column) is not None}
        if len(constants) > 1:
            notes.append(f"{column} isn't judged: its values are known up to different constants.")
            continue
        if constants != {None}:
            up_to.add(column)
        sign = 1.0 if need.less_is_better else -1.0
        matrix = np.full((len(seeds), len(arms)), np.nan)
        for i, seed in enumerate(seeds):
            for j, cells in enumerate(arms.values()):
                row = cells.get(seed)
                if row is not None and row["status"] != "failed" and row.get(column) is not None:
                    matrix[i, j] = sign * float(row[column])
        kept.append((need, column))
        values.append(matrix)
        notes += _doubts(arms, column, need)
    summaries = tuple(_arm(name, list(cells.values())) for name, cells in arms.items())
    return ArmScores(summaries, tuple(kept), tuple(values), frozenset(up_to), tuple(notes))


def _arm(name: str, rows: Sequence[Mapping[str, Any]]) -> Arm:
    bad = [row for row in rows if row["status"] == "failed"]
    good = [row for row in rows if row["status"] != "failed"]
    column = cost_of(good)
    costs = [float(row[column.name]) for row in good if row.get(column.name) is not None]
    stopped = sum(row["status"] == "stopped" for row in good)
    cost = fmean(costs) if costs else float("nan")
    error = str(bad[0].get("error") or "") if bad else ""
    return Arm(name, len(rows), len(good), len(bad), stopped, cost, error, column.unit)


def _doubts(arms: Cells, column: str, need: Need) -> list[str]:
    """Note how many values of a column are unreliable by their own error bars, or missing though the cell didn't fail."""
    judged = [row for mine in arms.values() if len(mine) >= MIN_PAIRS for row in mine.values() if row["status"] != "failed"]
    known = [row for row in judged if row.get(column) is not None]
    missing, doubted = len(judged) - len(known), sum(row.get(f"{column}_reliable") is False for row in known)
    of = f"in {{:,}} of {len(judged):,} cells"
    notes = []
    if missing:
        notes.append(f"{column} ({need.name}) couldn't be measured {of.format(missing)}, which are left out.")
    if doubted:
        notes.append(f"{column} ({need.name}) is called unreliable {of.format(doubted)}; the table's notes tell why.")
    return notes
