"""Plots: plotly figures of a fit. They draw what was computed and compute nothing but curves."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot, require
from whichkl.access import Access
from whichkl.families import Gaussian
from whichkl.families.gaussian import loc_and_tril
from whichkl.families.mixture import mixture_parts
from whichkl.fitting import Fit
from whichkl.targets import seeded

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLORS = {"target": "#8b93a1", "forward_kl": "#2f7fd6", "reverse_kl": "#e0762f", "other": "#3a9d6a"}
_GRID = 801
SHOWN = 40
"""A plot of intervals shows at most so many coordinates."""


@dataclass(frozen=True)
class Curve:
    """One line of a figure: what it's called, its points, its colour name, and whether it's dashed or filled."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dash: str = "solid"
    fill: bool = False


def plot(fit: Any) -> Figure:
    """Draw a fit: density curves in one dimension, points and ellipses in two, intervals above.

    Raises:
        InputError: it isn't a fit, or plotly isn't installed.
    """
    if not isinstance(fit, Fit):
        raise InputError(cannot("draw this", f"it is a `{type(fit).__name__}`", "Pass what whichkl.fit returned"))
    dim = len(fit.names)
    if dim == 1:
        return _on_the_line(fit)
    return _on_the_plane(fit) if dim == 2 and fit.bijection.is_real else _intervals(fit)


def lines(curves: Sequence[Curve], x_title: str, y_title: str, height: int = 340) -> Figure:
    """Draw curves over one axis."""
    go = require("plotly.graph_objects", "app")
    figure = go.Figure()
    for curve in curves:
        color = COLORS[curve.color]
        figure.add_scatter(
            x=_short(curve.x),
            y=_short(curve.y),
            name=curve.name,
            mode="lines",
            line={"color": color, "width": 1 if curve.fill else 2.5, "dash": curve.dash, "simplify": False},
            fill="tozeroy" if curve.fill else None,
            fillcolor="rgba(139,147,161,0.28)" if curve.fill else None,
        )
    return style(figure, x_title, y_title, height)


def style(figure: Figure, x_title: str, y_title: str, height: int = 340) -> Figure:
    """Give a figure the house's look, which the page's script adapts to light and dark."""
    axis = {"zeroline": False, "gridcolor": "rgba(128,128,128,0.2)", "linecolor": "rgba(128,128,128,0.5)", "automargin": True}
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#737a86"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "title": None},
        xaxis={**axis, "title": x_title},
        yaxis={**axis, "title": y_title},
        hovermode="closest",
    )
    return figure


def density(model: Distribution, x: Tensor) -> list[float]:
    """Density of a one-dimensional model on a grid."""
    return [float(v) for v in model.log_prob(x[:, None]).exp()]


def ellipse(loc: Tensor, tril: Tensor, radius: float = 2.0) -> tuple[list[float], list[float]]:
    """The curve m + radius · L (cos t, sin t): two standard deviations hold 86 % of a plane Gaussian."""
    t = torch.linspace(0, 2 * math.pi, 121, dtype=loc.dtype)
    points = loc + radius * torch.stack([t.cos(), t.sin()], -1) @ tril.T
    return [float(v) for v in points[:, 0]], [float(v) for v in points[:, 1]]


def _on_the_line(fit: Fit) -> Figure:
    models = [fit.bijection.wrap(optimum.model) for optimum in fit.diagnostics.optima]
    draws = torch.cat([_draws(fit, model)[:, 0] for model in models])
    low, high = (float(draws.quantile(q)) for q in (0.001, 0.999))
    x = torch.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), _GRID, dtype=torch.float64)
    x = x[fit.bijection.contains(x[:, None])]
    curves, target = [], fit.target
    if target is not None and Access.LOG_PROB in target.access and target.normalized:
        values = target.log_prob(x[:, None]).exp().tolist()
        curves.append(Curve("target p", x.tolist(), values, "target", fill=True))
    for optimum, model in zip(fit.diagnostics.optima, models, strict=True):
        kind = "global" if optimum.is_global else "local"
        at = float(model.mean[0]) + 0.0 if fit.bijection.is_real else float(model.sample((999,)).median())
        name = f"q at {at:.2f} ({kind})" if len(models) > 1 else f"q ({fit.objective.name})"
        dash = "solid" if optimum.is_global else "dash"
        curves.append(Curve(name, x.tolist(), density(model, x), fit.objective.name, dash))
    figure = lines(curves, html.escape(fit.names[0]), "density")
    if target is not None and target.samples is not None:
        _histogram(figure, target.samples[:, 0])
    return figure


def _on_the_plane(fit: Fit) -> Figure:
    go = require("plotly.graph_objects", "app")
    figure, target, points = go.Figure(), fit.target, None
    if target is not None and target.samples is not None:
        points = target.samples
    elif target is not None and target.sampler is not None:
        points = target.draws(1000, seed=fit.seed)
    if points is not None:
        marker = {"color": COLORS["target"], "size": 6, "opacity": 0.65}
        shown = points[:5000]
        figure.add_scatter(
            x=_short(shown[:, 0].tolist()), y=_short(shown[:, 1].tolist()), mode="markers", name="target p", marker=marker
        )
    add_ellipses(figure, fit, fit.objective.name, f"q ({fit.objective.name})")
    return style(figure, html.escape(fit.names[0]), html.escape(fit.names[1]), 420)


def add_ellipses(figure: Any, fit: Fit, color: str, name: str) -> None:
    """Draw one and two standard deviations of each Gaussian of the best model, and two of every other optimum."""
    for i, (loc, tril) in enumerate(_parts(fit.diagnostics.optima[0].model)):
        for radius in (1.0, 2.0):
            x, y = ellipse(loc, tril, radius)
            line = {"color": COLORS[color], "width": 2.5 if radius == 1 else 1.5, "dash": "solid" if radius == 1 else "dash"}
            label, group = f"{name}, {radius:g} sd", f"{name}{radius}"
            figure.add_scatter(
                x=_short(x), y=_short(y), mode="lines", name=label, line=line, showlegend=i == 0, legendgroup=group
            )
    others = [part for one in fit.diagnostics.optima[1:] for part in _parts(one.model)]
    for i, (loc, tril) in enumerate(others):
        x, y = ellipse(loc, tril)
        line = {"color": COLORS["target"], "width": 1.5, "dash": "dot"}
        figure.add_scatter(
            x=_short(x), y=_short(y), mode="lines", name="other optima", line=line, showlegend=i == 0, legendgroup="other"
        )


def _parts(model: Distribution) -> list[tuple[Tensor, Tensor]]:
    """Means and Cholesky factors of the Gaussians that a model consists of."""
    if hasattr(model, "mixture_distribution"):
        _, locs, trils = mixture_parts(model)
        return list(zip(locs, trils, strict=True))
    return [loc_and_tril(model)]


def _intervals(fit: Fit) -> Figure:
    go = require("plotly.graph_objects", "app")
    best = fit.diagnostics.optima[0].model
    if fit.bijection.is_real and isinstance(fit.family, Gaussian):
        reach = 1.959963984540054 * best.variance.sqrt()
        q = torch.stack([best.mean - reach, best.mean, best.mean + reach])
    else:
        q = _draws(fit, fit.bijection.wrap(best)).quantile(torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64), 0)
    names = [html.escape(name) for name in fit.names][:SHOWN][::-1]
    middle, low, high = (_short(q[i].tolist()[:SHOWN][::-1]) for i in (1, 0, 2))
    error = {"type": "data", "symmetric": False, "thickness": 2.5, "width": 0}
    error["array"] = [h - m for h, m in zip(high, middle, strict=True)]
    error["arrayminus"] = [m - lo for lo, m in zip(low, middle, strict=True)]
    figure = go.Figure()
    color = COLORS[fit.objective.name]
    figure.add_scatter(
        x=middle,
        y=names,
        mode="markers",
        error_x=error,
        marker={"color": color, "size": 9},
        name="median and 95 % interval under q",
    )
    figure.update_layout(showlegend=True)
    return style(figure, "value", "", 90 + 28 * len(names))


def _histogram(figure: Any, values: Tensor) -> None:
    figure.add_histogram(
        x=_short(values.tolist()[:20_000]),
        histnorm="probability density",
        name="target p (samples)",
        marker={"color": COLORS["target"]},
        opacity=0.45,
    )


def _draws(fit: Fit, model: Distribution) -> Tensor:
    with seeded(fit.seed):
        return model.sample((4000,)).to(torch.float64)


def _short(values: Sequence[float]) -> list[float]:
    """Six significant digits: a report shows no more, and weighs a third."""
    return [float(f"{v:.6g}") for v in values]
