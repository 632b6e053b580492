"""Style: the colours, the axes and the few shapes that all figures share."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whichkl._checks import require
from whichkl.objectives import OBJECTIVES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLORS = {"target": "#8b93a1", "forward_kl": "#2f7fd6", "reverse_kl": "#e0762f", "other": "#3a9d6a"}
SOFT = {"target": "rgba(139,147,161,0.28)", "forward_kl": "rgba(47,127,214,0.18)", "reverse_kl": "rgba(224,118,47,0.18)"}
for _name, _one in OBJECTIVES.items():
    if _one.is_between:
        COLORS[_name], SOFT[_name] = "#9457c9", "rgba(148,87,201,0.18)"
AXIS = {"zeroline": False, "gridcolor": "rgba(128,128,128,0.2)", "linecolor": "rgba(128,128,128,0.5)", "automargin": True}


@dataclass(frozen=True)
class Curve:
    """One line of a figure: what it's called, its points, its colour name, and whether it's dashed or filled."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dash: str = "solid"
    fill: bool = False


def lines(curves: Sequence[Curve], x_title: str, y_title: str, height: int = 340) -> Figure:
    """Draw curves over one axis."""
    go = require("plotly.graph_objects", "app")
    figure = go.Figure()
    for curve in curves:
        color = COLORS[curve.color]
        figure.add_scatter(
            x=short(curve.x),
            y=short(curve.y),
            name=curve.name,
            mode="lines",
            line={"color": color, "width": 1 if curve.fill else 2.5, "dash": curve.dash, "simplify": False},
            fill="tozeroy" if curve.fill else None,
            fillcolor=SOFT["target"] if curve.fill else None,
        )
    return style(figure, x_title, y_title, height)


def style(figure: Figure, x_title: str, y_title: str, height: int = 340) -> Figure:
    """Give a figure the house's look, which the page's script adapts to light and dark."""
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
    """One of several figures side by side: a heading instead of a legend."""
    style(figure, x_title, y_title, height)
    heading = {"text": html.escape(title), "font": {"size": 13}, "x": 0.02, "xanchor": "left", "y": 0.98, "yanchor": "top"}
    figure.update_layout(title=heading, showlegend=False, margin={"l": 10, "r": 10, "t": 30, "b": 10}, bargap=0)
    return figure


def faint(count: int) -> float:
    """The opacity of so many points: lines beneath them stay visible."""
    return min(0.65, max(0.2, 150 / max(count, 1)))


def short(values: Sequence[float]) -> list[float]:
    """Six significant digits: a report shows no more, and weighs a third."""
    return [float(f"{v:.6g}") for v in values]
