"""Arms: the figures of a study: what each arm trades for what, how sure the differences are, and every seed."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from whichkl._checks import require
from whichkl.plots.style import COLORS, SOFT, short, small, style
from whichkl.study.arms import arm_of
from whichkl.study.needs import UNITS
from whichkl.study.verdict import Verdict
from whichkl.study.wording import column_words

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Rows = Sequence[Mapping[str, Any]]
MOST = 12
"""Arms that a figure tells apart by name."""
_POINTS = 2_000
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
_WIDE, _SHORT = 30, 20
_UP_TO = {"log_z": ", up to log Z", "entropy_p": " + H(p)"}
_LEAST, _SPAN = 1e-4, 30
"""On logarithmic axes smaller values stand at 0.0001, which no reader tells from 0."""


def tradeoff(rows: Rows, verdict: Verdict, x: str, y: str) -> Figure | None:
    """Draw the mean of one column over that of another, a point for each arm: filled on the Pareto front, hollow behind it.

    None where fewer than two arms have both.
    """
    go = require("plotly.graph_objects", "app")
    found = {arm: (_mean(mine, x), _mean(mine, y)) for arm, mine in _by_arm(rows).items()}
    points = {arm: (a, b) for arm, (a, b) in found.items() if a is not None and b is not None}
    if len(points) < 2:
        return None
    families = list(dict.fromkeys(arm.split(" · ")[0] for arm in points))
    figure, is_few = go.Figure(), len(points) <= MOST
    (x_log, x_axis), (y_log, y_axis) = (_scale([pair[k][0] for pair in points.values()]) for k in (0, 1))
    for name, arms in _traces(list(points), verdict, is_few).items():
        color, symbol = color_of(arms[0]), "circle"
        if is_few:
            symbol = _SYMBOLS[families.index(name.split(" · ")[0]) % len(_SYMBOLS)]
        (a, da), (b, db) = ([[points[arm][k][m] for arm in arms] for m in (0, 1)] for k in (0, 1))
        figure.add_scatter(
            x=short([max(one, _LEAST) if x_log else one for one in a]),
            y=short([max(one, _LEAST) if y_log else one for one in b]),
            error_x={"array": short(da), "color": color, "thickness": 1.5, "width": 0},
            error_y={"array": short(db), "color": color, "thickness": 1.5, "width": 0},
            mode="markers",
            name=html.escape(_cut(name)),
            hovertext=[html.escape(arm) for arm in arms],
            marker={
                "symbol": symbol if arms[0] in verdict.front else f"{symbol}-open",
                "color": color,
                "size": 12 if is_few else 7,
                "line": {"width": 2, "color": color},
            },
        )
    style(figure, _title(x, rows), _title(y, rows), 440)
    figure.update_xaxes(**x_axis)
    figure.update_yaxes(**y_axis)
    return figure


def differences(verdict: Verdict, most: int = MOST) -> list[Figure]:
    """Draw, for each need, how much worse the other arms are than the leading one, with their intervals.

    The band is where a difference doesn't matter in practice. The nearest of many arms are shown.
    """
    go, figures = require("plotly.graph_objects", "app"), []
    for choice in verdict.choices:
        mine = [one for one in verdict.comparisons if one.need == choice.need and math.isfinite(one.difference)]
        mine = sorted(mine, key=lambda one: abs(one.difference))[:most][::-1]
        if not mine:
            continue
        figure, names = go.Figure(), [_in_two(one.other) for one in mine]
        band = max(one.threshold for one in mine)
        figure.add_vrect(x0=-band, x1=band, fillcolor=SOFT["target"], line_width=0, layer="below")
        for kinds, color, name in (
            (("better",), "reverse_kl", "worse"),
            (("equal", "unclear"), "target", "not detectably worse"),
        ):
            some = [(one, label) for one, label in zip(mine, names, strict=True) if one.kind in kinds]
            error = {"type": "data", "symmetric": False, "thickness": 2.5, "width": 0}
            error["array"] = short([one.high - one.difference for one, _ in some])
            error["arrayminus"] = short([one.difference - one.low for one, _ in some])
            figure.add_scatter(
                x=short([one.difference for one, _ in some]),
                y=[label for _, label in some],
                error_x=error,
                mode="markers",
                marker={"color": COLORS[color], "size": 9},
                name=name,
            )
        unit = UNITS.get(choice.column, "")
        small(figure, choice.need, html.escape(f"{column_words(choice.column)}, {unit}".strip(", ")), height=110 + 34 * len(mine))
        figure.update_yaxes(categoryorder="array", categoryarray=names)
        figures.append(figure)
    return figures


def seeds(rows: Rows, columns: Sequence[str], most: int = MOST) -> list[Figure]:
    """Draw every cell's value of each column, a line of points for each of the first arms."""
    go, figures = require("plotly.graph_objects", "app"), []
    arms = dict(list(_by_arm(rows).items())[:most])
    each = max(1, _POINTS // max(1, len(arms)))
    for column in columns:
        known = {arm: [row for row in mine if _number(row, column) is not None][:each] for arm, mine in arms.items()}
        values = [float(row[column]) for mine in known.values() for row in mine]
        if not values:
            continue
        figure, (log, axis) = go.Figure(), _scale(values)
        for arm, mine in list(known.items())[::-1]:
            figure.add_scatter(
                x=short([max(float(row[column]), _LEAST) if log else float(row[column]) for row in mine]),
                y=[_in_two(arm)] * len(mine),
                mode="markers",
                hovertext=[f"seed {row['seed']}" for row in mine],
                marker={"color": color_of(arm), "size": 8, "opacity": 0.55},
            )
        small(figure, column_words(column), UNITS.get(column, ""), height=110 + 34 * len(arms))
        figure.update_xaxes(**axis, tickangle=0)
        figures.append(figure)
    return figures


def training(histories: Mapping[str, Sequence[float]]) -> Figure | None:
    """Draw the best loss of each arm over the iterations of its solver; None where no solver had them at hand."""
    go = require("plotly.graph_objects", "app")
    known = {arm: losses for arm, losses in histories.items() if any(map(math.isfinite, losses))}
    if not known:
        return None
    figure, dashes = go.Figure(), ("solid", "dash", "dot", "dashdot")
    for i, (arm, losses) in enumerate(known.items()):
        step = max(1, len(losses) // 400)
        rounds = [k for k in range(0, len(losses), step) if math.isfinite(losses[k])]
        line = {"color": color_of(arm), "width": 2.2, "dash": dashes[i % len(dashes)], "simplify": False}
        y = short([losses[k] for k in rounds])
        figure.add_scatter(x=[k + 1 for k in rounds], y=y, mode="lines", name=html.escape(_cut(arm)), line=line)
    return style(figure, "iteration", "best loss, nats", 340)


def color_of(arm: str) -> str:
    """Return the colour of an arm, which is that of its objective."""
    return COLORS.get(arm.rsplit(" · ", 1)[-1].split(":")[0], COLORS["other"])


def _traces(arms: Sequence[str], verdict: Verdict, is_few: bool) -> dict[str, list[str]]:
    """A trace for each arm, or, of many, one for each objective, on and behind the front."""
    if is_few:
        return {arm: [arm] for arm in arms}
    traces: dict[str, list[str]] = {}
    front = set(verdict.front)
    for arm in arms:
        objective = arm.rsplit(" · ", 1)[-1]
        traces.setdefault(f"{objective}, on the front" if arm in front else objective, []).append(arm)
    return traces


def _by_arm(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] != "failed":
            arms.setdefault(arm_of(row), []).append(row)
    return arms


def _mean(rows: Rows, column: str) -> tuple[float, float] | None:
    """Mean and its standard error; None where a value is infinite or there is none."""
    values = [_number(row, column) for row in rows if row.get(column) is not None]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return fmean(known), stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0


def _number(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    return float(value) if value is not None and math.isfinite(value) else None


def _scale(values: Sequence[float]) -> tuple[bool, dict[str, Any]]:
    """Whether an axis is logarithmic, as it is where values that can be seen span much, and the axis, with room for points."""
    seen = [value for value in values if value >= _LEAST]
    if min(values) >= 0 and seen and max(seen) > _SPAN * min(seen):
        low, high = (math.log10(max(_LEAST, one)) for one in (min(values), max(values)))
        room = 0.08 * (high - low)
        ticks = {"dtick": 1, "exponentformat": "power"} if high > 4 else {"dtick": 1}
        return True, {"type": "log", "range": short([low - room, high + room]), **ticks}
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return False, {"range": short([low - room, high + room]), "nticks": 5}


def _title(column: str, rows: Rows) -> str:
    unit = UNITS.get(column, "")
    words = {"forward_kl": "forward KL: what q misses of p", "reverse_kl": "reverse KL: where q goes and p doesn't"}
    word = words.get(column, column_words(column))
    constant = next((row[f"{column}_up_to"] for row in rows if row.get(f"{column}_up_to")), None)
    if constant is not None:
        return f"{html.escape(word)}<br>{html.escape(unit)}{_UP_TO[constant]}"
    return html.escape(f"{word}, {unit}" if unit and unit != word else word)


def _in_two(arm: str) -> str:
    """An arm on two lines, so that a narrow figure keeps its width."""
    return "<br>".join(html.escape(part if len(part) <= _SHORT else part[: _SHORT - 1] + "…") for part in arm.split(" · ", 1))


def _cut(text: str) -> str:
    return text if len(text) <= _WIDE else text[: _WIDE - 1] + "…"
