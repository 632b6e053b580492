"""Style: the one palette, the axes, and the few shapes that all figures are made of."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from whichkl._checks import require
from whichkl.objectives import OBJECTIVES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Figure
else:
    Figure = Any

COLORS = {"target": "#8b93a1", "forward_kl": "#2f7fd6", "reverse_kl": "#e0762f", "other": "#3a9d6a"}
SOFT = {"target": "rgba(139,147,161,0.28)", "forward_kl": "rgba(47,127,214,0.18)", "reverse_kl": "rgba(224,118,47,0.18)"}
_BETWEEN = {"#9457c9": "violet", "#c4457d": "pink", "#0f93a5": "teal", "#8a6d3b": "brown"}
for _name, _color in zip((name for name, one in OBJECTIVES.items() if one.is_between), itertools.cycle(_BETWEEN)):
    COLORS[_name], SOFT[_name] = _color, f"rgba({','.join(str(int(_color[k : k + 2], 16)) for k in (1, 3, 5))},0.18)"
_COLOR_WORDS = {"#2f7fd6": "blue", "#e0762f": "orange", "#3a9d6a": "green", **_BETWEEN}
MAX_LEGEND_LENGTH = 30
AXIS = {"zeroline": False, "gridcolor": "rgba(128,128,128,0.2)", "linecolor": "rgba(128,128,128,0.5)", "automargin": True}


def new_figure() -> Figure:
    """Return an empty figure."""
    figure: Figure = require("plotly.graph_objects", "app").Figure()
    return figure


def color_word(arm: str) -> str:
    """Return the word for the colour of an arm, or of an objective.

    >>> color_word("reverse_kl")
    'orange'
    """
    return _COLOR_WORDS[COLORS[color_of(arm)]]


def color_of(arm: str) -> str:
    """Return the colour name of an arm, or of an objective, which are those of its objective."""
    name = arm.rsplit(" · ", 1)[-1].split("@")[0].split(":")[0]
    return name if name in COLORS else "other"


def add_line(figure: Any, x: Sequence[float], y: Sequence[float], color: str, name: str | None = None, **how: Any) -> None:
    """Draw a line in a colour of `COLORS`; `name` is for the legend, `width` and `dash` for the line, the rest for plotly."""
    line = {"color": COLORS[color], "width": how.pop("width", 2.2), "dash": how.pop("dash", "solid"), "simplify": False}
    _add_scatter(figure, x, y, name, {"mode": "lines", "line": line, **how})


def add_points(figure: Any, x: Sequence[float], y: Sequence[Any], color: str, name: str | None = None, **how: Any) -> None:
    """Draw points; arguments as of `add_line`, but `size`, `symbol` and `opacity` are those of a marker."""
    marker = {"color": COLORS[color], "size": how.pop("size", 8), **how.pop("marker", {})}
    marker |= {key: how.pop(key) for key in ("symbol", "opacity") if key in how}
    _add_scatter(figure, x, y, name, {"mode": "markers", "marker": marker, **how})


def add_area(figure: Any, x: Sequence[float], y: Sequence[float], name: str) -> None:
    """Fill the area under a curve of the target."""
    add_line(figure, x, y, "target", name, width=1, fill="tozeroy", fillcolor=SOFT["target"])


def add_band(figure: Any, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, **how: Any) -> None:
    """Fill between two curves; `name=` names it in the legend."""
    name = how.pop("name", None)
    add_line(figure, x, low, color, width=0, hoverinfo="skip", **how)
    add_line(figure, x, high, color, name, width=0, fill="tonexty", fillcolor=SOFT[color], **how)


def add_bars(figure: Any, x: Sequence[float], heights: Sequence[float], width: float, **how: Any) -> None:
    """Draw a histogram of the target."""
    marker = {"color": SOFT["target"], "line": {"width": 0}}
    figure.add_bar(x=x, y=heights, width=width, **{"marker": marker, **how})


def error_bars(low: Sequence[float], middle: Sequence[float], high: Sequence[float], **how: Any) -> dict[str, Any]:
    """Return error bars from `low` to `high` about `middle`, as plotly takes them."""
    above = short([h - m for h, m in zip(high, middle, strict=True)])
    below = short([m - lo for lo, m in zip(low, middle, strict=True)])
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 2.5, "width": 0, **how}


def _add_scatter(figure: Any, x: Sequence[float], y: Sequence[Any], name: str | None, how: dict[str, Any]) -> None:
    shown = {"name": html.escape(name)} if name is not None else {"showlegend": False}
    rounded = [short(one) if all(isinstance(v, (int, float)) for v in one) else list(one) for one in (x, y)]
    figure.add_scatter(x=rounded[0], y=rounded[1], **{**shown, **how})


def style(figure: Figure, x_title: str, y_title: str, height: int = 340) -> Figure:
    """Give a figure the common look, which the script of a page adapts to light and dark."""
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#737a86"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "title": None},
        xaxis={**AXIS, "title": x_title},
        yaxis={**AXIS, "title": y_title},
        hovermode="closest",
    )
    return figure


def small(figure: Figure, title: str, x_title: str = "", y_title: str = "", height: int = 230) -> Figure:
    """Give the look of one of several figures side by side: a heading instead of a legend."""
    style(figure, x_title, y_title, height)
    return with_heading(figure, title, height)


def with_heading(figure: Figure, title: str, height: int) -> Figure:
    """Give a figure a heading in place of its legend."""
    heading = {"text": html.escape(title), "font": {"size": 13}, "x": 0.02, "xanchor": "left", "y": 0.98, "yanchor": "top"}
    margin = {"l": 10, "r": 10, "t": 34, "b": 10}
    figure.update_layout(title=heading, showlegend=False, height=height, margin=margin, bargap=0)
    return figure


def faint(count: int) -> float:
    """Return the opacity of this many points: lines beneath them stay visible."""
    return min(0.65, max(0.2, 150 / max(count, 1)))


def short(values: Sequence[float]) -> list[float]:
    """Round to six significant digits: a report shows no more, and is a third as large."""
    return [float(f"{v:.6g}") for v in values]
