"""The tables of a study's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from whichkl.reporting.page import Block
from whichkl.study import Study, Verdict
from whichkl.study.arms import arm_of, mean_and_error, rows_by_arm
from whichkl.study.measures import COLUMNS, FIELDS, FLOPS, Column, column_words, constants_of
from whichkl.study.verdict import Choice, Comparison
from whichkl.study.wording import listed, number

MAX_ARMS = 40
"""Largest number of arms that a table shows."""
_MAX_FAILURES = 60
_MIN_SHOWN_ERROR = 5e-5
"""Smaller standard errors are left out."""
_ARROWS = {"lower": "\u00a0↓", "higher": "\u00a0↑", "": ""}
_SAYS = {"better": "worse", "equal": "equal", "unclear": "no difference detected"}

Rows = Sequence[Mapping[str, Any]]


def arms_shown(verdict: Verdict) -> list[str]:
    """Return the arms that tables show: those on the front, then the others, in their order."""
    rest = [arm.name for arm in verdict.arms if arm.name not in set(verdict.front)]
    return [*verdict.front, *rest][:MAX_ARMS]


def needs_table(verdict: Verdict) -> list[Block]:
    """Return the arm to take for each need, and by how much it leads; no table where no need was tested."""
    rows = []
    for choice in verdict.choices:
        near = min((one for one in verdict.comparisons if one.need == choice.need), key=lambda one: one.difference)
        lead = f"{number(near.difference, choice.column)}" if choice.winner else "no detectable lead"
        meaning = f"{choice.wish} ({column_words(choice.column)})"
        rows.append((choice.need, meaning, choice.winner or listed(choice.best), lead))
    caption = "Where several arms are named, the study detects no difference between them."
    return [Block.table(("you need", "that is", "take", "by"), rows, caption)] if rows else []


def scorecard_tables(study: Study, shown: Sequence[str], caption: str) -> list[Block]:
    """Return the needs' columns, the other columns of the scorecard, and the user's own: a table each that has values.

    The caption is that of the first table; below every table is what its columns mean.
    """
    rows = [cell.row for cell in study.cells if cell.row["status"] != "failed" and arm_of(cell.row) in set(shown)]
    by_arm = rows_by_arm(rows)
    further = {f"{name}{ending}" for name in COLUMNS for ending in ("_stderr", "_reliable", "_teacher", "_before")}
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in {*FIELDS, FLOPS.name, *further}]
    own = [COLUMNS.get(name) or Column(name, name) for name in names]
    tables = []
    for group in ("closeness", "reach", "weights", ""):
        columns = [one for one in COLUMNS.values() if one.table == group] if group else own
        columns = [one for one in columns if any(row.get(one.name) is not None for row in rows)]
        if columns:
            heads = [f"{one.words} {constants_of(rows, one.name)}".rstrip() + _ARROWS[one.better] for one in columns]
            cells = [(arm, *(_mean(by_arm.get(arm, []), one.name) for one in columns)) for arm in shown]
            meanings = [f"{one.words}: {one.meaning}." for one in columns if one.meaning]
            tables.append(Block.table(("arm", *heads), cells, " ".join([caption, *meanings]).strip()))
            caption = ""
    return tables


def cost_table(verdict: Verdict, shown: Sequence[str]) -> Block:
    """Return what each arm costs, and how its cells ended."""
    arms, rows = {arm.name: arm for arm in verdict.arms}, []
    for name in shown:
        arm = arms[name]
        rows.append((name, arm.cost_text, f"{arm.finished} of {arm.cells}", str(arm.failed), str(arm.stopped)))
    return Block.table(("arm", verdict.arms[0].unit, "finished", "failed", "stopped early"), rows)


def comparison_table(verdict: Verdict, choice: Choice) -> Block:
    """Return the comparisons of the arm that leads for a need, the nearest first."""
    mine = sorted((one for one in verdict.comparisons if one.need == choice.need), key=lambda one: one.difference)
    left = len(mine) - MAX_ARMS
    note = f" The {MAX_ARMS} nearest; {left:,} more are in study.verdict.comparisons." if left > 0 else ""
    columns = (choice.need, "worse by", "interval", "pairs", "p (Holm)", "p (signs)", "result")
    caption = f"Compared with {choice.leader}, which leads for {choice.need}.{note}"
    return Block.table(columns, [_compared(one) for one in mine[:MAX_ARMS]], caption)


def failures_table(study: Study) -> Block | None:
    """Return the failed cells by arm and error; None where no cell failed."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in study.failed:
        found.setdefault((arm_of(cell.row), str(cell.row.get("error"))), []).append(str(cell.row["seed"]))
    rows = [(arm, str(len(seeds)), listed(seeds), error[:300]) for (arm, error), seeds in found.items()]
    left = len(rows) - _MAX_FAILURES
    note = f"{left:,} more are in table.csv." if left > 0 else ""
    return Block.table(("arm", "cells", "seeds", "error"), rows[:_MAX_FAILURES], note) if rows else None


def _compared(one: Comparison) -> tuple[str, ...]:
    ends = [number(value, one.column).removesuffix(" nats") for value in (one.low, one.high)]
    interval = f"{ends[0]} to {ends[1]}" if math.isfinite(one.low) else "–"
    p = ("< 0.0001" if value < 1e-4 else f"{value:.2g}" for value in (one.p_adjusted, one.p_flip))
    return (one.other, number(one.difference, one.column), interval, str(one.pairs), *p, _SAYS[one.kind])


def _mean(rows: Rows, name: str) -> str:
    """Write the mean of a column over the cells that have it, with its standard error, to the digits that the error leaves."""
    found = mean_and_error(rows, name)
    if found is None:
        return "–"
    mean, error = found[0], found[1] or 0.0
    if not math.isfinite(mean):
        return "∞" if mean > 0 else "−∞" if mean < 0 else "–"
    if error >= _MIN_SHOWN_ERROR:
        digits = max(0, min(4, 1 - math.floor(math.log10(error))))
        return f"{mean + 0.0:,.{digits}f} ± {error:,.{digits}f}".replace("-", "−")
    text = f"{mean + 0.0:,.4f}" if abs(mean) < 1e4 else f"{mean:,.0f}"
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", "−")
