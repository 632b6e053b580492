"""Arms: the figures of a study: what each arm trades for what, how sure the differences are, and every seed."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from whichkl.plots.style import (
    COLORS,
    MAX_LEGEND_LENGTH,
    SOFT,
    Figure,
    add_points,
    color_of,
    error_bars,
    new_figure,
    short,
    small,
    style,
)
from whichkl.printable import shorten
from whichkl.study.arms import mean_and_error, rows_by_arm
from whichkl.study.measures import COLUMNS, Column, column_words, constants_of, unit_of
from whichkl.study.verdict import Verdict

Rows = Sequence[Mapping[str, Any]]
MAX_ARMS = 12
"""Largest number of arms that a figure names."""
_MAX_POINTS = 2_000
_MAX_LABEL_LENGTH = 20
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
_MIN_ON_LOG_AXIS = 1e-4
"""Smaller values are drawn here on logarithmic axes: no reader distinguishes them from 0."""
_MIN_LOG_RATIO = 30
"""Least ratio of the largest to the smallest value for a logarithmic axis."""


def tradeoff(rows: Rows, verdict: Verdict, x: str, y: str) -> Figure | None:
    """Draw the mean of one column over that of another, a point per arm: filled on the Pareto front, hollow behind it.

    None where fewer than two arms have both.
    """
    found = {arm: (_mean(mine, x), _mean(mine, y)) for arm, mine in _finished_by_arm(rows).items()}
    points = {arm: (a, b) for arm, (a, b) in found.items() if a is not None and b is not None}
    if len(points) < 2:
        return None
    kinds = list(dict.fromkeys(_kind(arm) for arm in points))
    figure, is_few = new_figure(), len(points) <= MAX_ARMS
    x_axis, y_axis = (_axis(*zip(*[pair[k] for pair in points.values()], strict=True)) for k in (0, 1))
    for name, arms in _traces(list(points), verdict, is_few).items():
        color, symbol = color_of(arms[0]), "circle"
        if is_few:
            symbol = _SYMBOLS[kinds.index(_kind(name)) % len(_SYMBOLS)]
        (a, da), (b, db) = ([[points[arm][k][m] for arm in arms] for m in (0, 1)] for k in (0, 1))
        how: dict[str, Any] = {"symbol": symbol if arms[0] in verdict.front else f"{symbol}-open", "size": 12 if is_few else 7}
        for side, error in (("error_x", da), ("error_y", db)):
            how[side] = {"array": short(error), "color": COLORS[color], "thickness": 1.5, "width": 0}
        how |= {"marker": {"line": {"width": 2, "color": COLORS[color]}}, "hovertext": [html.escape(arm) for arm in arms]}
        add_points(figure, _on_axis(x_axis, a), _on_axis(y_axis, b), color, shorten(name, MAX_LEGEND_LENGTH), **how)
    style(figure, _title(x, rows), _title(y, rows), 440)
    figure.update_xaxes(**x_axis)
    figure.update_yaxes(**y_axis)
    return figure


def differences(verdict: Verdict) -> list[Figure]:
    """Draw, for each need, how much worse the other arms are than the leading one, with their intervals.

    Inside the band a difference doesn't matter in practice. Of many arms the nearest are shown.
    """
    figures = []
    for choice in verdict.choices:
        mine = [one for one in verdict.comparisons if one.need == choice.need and math.isfinite(one.difference)]
        mine = sorted(mine, key=lambda one: abs(one.difference))[:MAX_ARMS][::-1]
        if not mine:
            continue
        figure, band = new_figure(), max(one.threshold for one in mine)
        figure.add_vrect(x0=-band, x1=band, fillcolor=SOFT["target"], line_width=0, layer="below")
        for is_worse, color, name in ((True, "reverse_kl", "worse"), (False, "target", "not detectably worse")):
            some = [one for one in mine if (one.kind == "better") is is_worse]
            at = [one.difference for one in some]
            error = error_bars([one.low for one in some], at, [one.high for one in some])
            add_points(figure, at, [_in_two_lines(one.other) for one in some], color, name, size=9, error_x=error)
        words = f"{column_words(choice.column)}, {unit_of(choice.column)}".strip(", ")
        small(figure, choice.need, html.escape(words), height=110 + 34 * len(mine))
        figure.update_yaxes(categoryorder="array", categoryarray=[_in_two_lines(one.other) for one in mine])
        figures.append(figure)
    return figures


def seeds(rows: Rows, columns: Sequence[Column]) -> list[Figure]:
    """Draw every cell's value of each column, a line of points for each of the first arms."""
    figures = []
    arms = dict(list(_finished_by_arm(rows).items())[:MAX_ARMS])
    each = max(1, _MAX_POINTS // max(1, len(arms)))
    for column in columns:
        known = {
            arm: [row for row in mine if row.get(column.name) is not None and math.isfinite(row[column.name])][:each]
            for arm, mine in arms.items()
        }
        values = [float(row[column.name]) for mine in known.values() for row in mine]
        if not values:
            continue
        figure, axis = new_figure(), _axis(values)
        for arm, mine in list(known.items())[::-1]:
            hover = [f"seed {row['seed']}" for row in mine]
            x = _on_axis(axis, [float(row[column.name]) for row in mine])
            add_points(figure, x, [_in_two_lines(arm)] * len(mine), color_of(arm), opacity=0.55, hovertext=hover)
        small(figure, column.words, column.unit, height=110 + 34 * len(arms))
        figure.update_xaxes(**axis, tickangle=0)
        figures.append(figure)
    return figures


def _kind(arm: str) -> tuple[str, str]:
    """Return what a symbol stands for: the family, and the prefixes of an objective of language models."""
    return arm.split(" · ")[0], arm.partition("@")[2]


def _traces(arms: Sequence[str], verdict: Verdict, is_few: bool) -> dict[str, list[str]]:
    """Return the arms of each trace: one arm, or, where there are many, those of an objective on or behind the front."""
    if is_few:
        return {arm: [arm] for arm in arms}
    traces: dict[str, list[str]] = {}
    front = set(verdict.front)
    for arm in arms:
        objective = arm.rsplit(" · ", 1)[-1]
        traces.setdefault(f"{objective}, on the front" if arm in front else objective, []).append(arm)
    return traces


def _finished_by_arm(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    return rows_by_arm(row for row in rows if row["status"] != "failed")


def _mean(rows: Rows, column: str) -> tuple[float, float] | None:
    """Return a mean and its standard error; None where the mean is infinite or there is no value."""
    found = mean_and_error(rows, column)
    return (found[0], found[1] or 0.0) if found is not None and math.isfinite(found[0]) else None


def _axis(values: Sequence[float], errors: Sequence[float] = ()) -> dict[str, Any]:
    """Return an axis with room for points and their error bars; it's logarithmic where visible values differ by large factors.

    A bar that reaches 0 on a logarithmic axis has a decade of room, and runs to the edge.
    """
    seen = [value for value in values if value >= _MIN_ON_LOG_AXIS]
    pairs = list(zip(values, errors or [0.0] * len(values), strict=True))
    high = max(value + error for value, error in pairs)
    if min(values) >= 0 and seen and max(seen) > _MIN_LOG_RATIO * min(seen):
        low = min(max(value - error, value / 10) for value, error in pairs)
        low, high = (math.log10(max(_MIN_ON_LOG_AXIS, one)) for one in (low, high))
        room = 0.08 * (high - low)
        ticks = {"dtick": 1, "exponentformat": "power"} if high > 4 else {"dtick": 1}
        return {"type": "log", "range": short([low - room, high + room]), **ticks}
    low = min(value - error for value, error in pairs)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return {"range": short([low - room, high + room]), "nticks": 5}


def _on_axis(axis: Mapping[str, Any], values: Sequence[float]) -> list[float]:
    return [max(one, _MIN_ON_LOG_AXIS) for one in values] if axis.get("type") == "log" else list(values)


def _title(name: str, rows: Rows) -> str:
    """Return the words of a column, what it means, its unit, and the constant up to which it is known."""
    column = COLUMNS[name]
    constant = constants_of(rows, name)
    words = column.words if column.words == column.unit else f"{column.words}, {column.unit}"
    return f"{html.escape(f'{words} {constant}'.rstrip())}<br><sub>{html.escape(column.meaning)}</sub>"


def _in_two_lines(arm: str) -> str:
    """Write an arm on two lines, so that a narrow figure keeps its width."""
    return "<br>".join(html.escape(shorten(part, _MAX_LABEL_LENGTH)) for part in arm.split(" · ", 1))
