"""Fitted: the figure of a fit: curves in one dimension, points and ellipses in two, intervals above."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily

from whichkl._checks import InputError, cannot, require
from whichkl.access import Access
from whichkl.families import Gaussian
from whichkl.families.gaussian import loc_and_tril
from whichkl.families.mixture import mixture_parts
from whichkl.fitting import Fit
from whichkl.plots.conditional import predictions
from whichkl.plots.margins import margin_steps
from whichkl.plots.pairs import regions
from whichkl.plots.rows import Sight, data, draws
from whichkl.plots.style import COLORS, SOFT, Curve, faint, lines, short, style
from whichkl.process.torch_modes import plain_modes

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_GRID = 801
SHOWN = 40
"""A plot of intervals shows at most so many coordinates."""


@plain_modes()
def plot(fit: Any) -> Figure:
    """Draw a fit: density curves in one dimension, points and ellipses in two, intervals above; predictions of q(y|x).

    Raises:
        InputError: it isn't a fit, plotly isn't installed, or a conditional fit has lost its rows.
    """
    if not isinstance(fit, Fit):
        raise InputError(cannot("draw this", f"it is a `{type(fit).__name__}`", "Pass what whichkl.fit returned"))
    if not isinstance(fit.model, Distribution):
        figures = predictions(fit)
        if not figures:
            because = "predictions are drawn beside rows, and a fit from a stream or a file keeps none"
            raise InputError(cannot("draw this fit", because, "Draw it where it was fitted"))
        return figures[0]
    dim = len(fit.names)
    if dim == 1:
        return _on_the_line(fit)
    return _on_the_plane(fit) if dim == 2 and fit.bijection.is_real else _intervals(fit)


def density(model: Distribution, x: Tensor) -> list[float]:
    """Density of a one-dimensional model on a grid."""
    return [float(v) for v in model.log_prob(x[:, None]).exp()]


def ellipse(loc: Tensor, tril: Tensor, radius: float = 2.0) -> tuple[list[float], list[float]]:
    """The curve m + radius · L (cos t, sin t): two standard deviations hold 86 % of a plane Gaussian."""
    t = torch.linspace(0, 2 * math.pi, 121, dtype=loc.dtype, device="cpu")
    points = loc + radius * torch.stack([t.cos(), t.sin()], -1) @ tril.T
    return [float(v) for v in points[:, 0]], [float(v) for v in points[:, 1]]


def _on_the_line(fit: Fit) -> Figure:
    models = [_in_the_support(fit, optimum.model) for optimum in fit.diagnostics.optima]
    drawn = torch.cat([draws(fit, model)[:, 0] for model in models])
    rows = data(fit)
    if rows is not None and Sight(rows.x, drawn[:, None], fit.names).atoms[0]:
        return _shares(fit, rows.x[:, 0], drawn)
    low, high = (float(drawn.quantile(q)) for q in (0.001, 0.999))
    x = torch.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), _GRID, dtype=torch.float64, device="cpu")
    x = x[fit.bijection.contains(x[:, None])]
    curves, target = [], fit.target
    if target is not None and Access.LOG_PROB in target.access and target.normalized:
        values = target.log_prob(x[:, None]).exp().tolist()
        curves.append(Curve("target p", x.tolist(), values, "target", fill=True))
    for optimum, model in zip(fit.diagnostics.optima, models, strict=True):
        kind, name = "global" if optimum.is_global else "local", f"q ({fit.objective.name})"
        if len(models) > 1:
            at = float(model.mean[0]) + 0.0 if fit.bijection.is_real else float(draws(fit, model, 999).median())
            name = f"q at {at:.2f} ({kind})"
        dash = "solid" if optimum.is_global else "dash"
        curves.append(Curve(name, x.tolist(), density(model, x), fit.objective.name, dash))
    figure = lines(curves, html.escape(fit.names[0]), "density")
    if target is not None and target.samples is not None and rows is not None:
        ends = (float(rows.x.min()), float(rows.x.max()))
        if ends[1] > ends[0]:
            middles, heights, width = margin_steps(rows.x[:, 0], ends, False)
            bars = {"x": middles, "y": heights, "width": width, "marker": {"color": COLORS["target"], "line": {"width": 0}}}
            figure.add_bar(**bars, name="target p (samples)", opacity=0.45)
    return figure


def _in_the_support(fit: Fit, model: Any) -> Distribution:
    """An optimum's model in the coordinates of the target."""
    wrapped: Distribution = fit.bijection.wrap(model) if fit.family.carried else model
    return wrapped


def _shares(fit: Fit, rows: Tensor, drawn: Tensor) -> Figure:
    """How often each whole number occurs, and how often under q."""
    figure = require("plotly.graph_objects", "app").Figure()
    values, heights, width = margin_steps(rows, (0, 0), True)
    figure.add_bar(
        x=values, y=heights, width=width, marker={"color": SOFT["target"], "line": {"width": 0}}, name="target p (samples)"
    )
    values, heights, _ = margin_steps(drawn, (0, 0), True)
    marker = {"color": COLORS[fit.objective.name], "size": 9}
    figure.add_scatter(x=values, y=heights, mode="markers", marker=marker, name=f"q ({fit.objective.name})")
    return style(figure, html.escape(fit.names[0]), "share")


def _on_the_plane(fit: Fit) -> Figure:
    go = require("plotly.graph_objects", "app")
    figure, rows = go.Figure(), data(fit, 5000)
    if rows is not None:
        marker = {"color": COLORS["target"], "size": 6, "opacity": faint(len(rows))}
        x, y = (short(rows.x[:, j].tolist()) for j in (0, 1))
        figure.add_scatter(x=x, y=y, mode="markers", name="target p", marker=marker, showlegend=False)
        seen = {**marker, "opacity": 1}  # a legend would show its point as faint as these are
        figure.add_scatter(x=[None], y=[None], mode="markers", name="target p", marker=seen, hoverinfo="skip")
    if _parts(fit.diagnostics.optima[0].model):
        add_ellipses(figure, fit, fit.objective.name, f"q ({fit.objective.name})")
    else:
        drawn = draws(fit, fit.model, 20_000)
        ends = Sight(drawn if rows is None else rows.x, drawn, fit.names)
        trace = regions(go, drawn, ends.range(0), ends.range(1), fit.objective.name)
        trace.update(name="q, 50 % and 90 %", showlegend=True)
        figure.add_trace(trace)
    return style(figure, html.escape(fit.names[0]), html.escape(fit.names[1]), 420)


def add_ellipses(figure: Any, fit: Fit, color: str, name: str) -> None:
    """Draw one and two standard deviations of each Gaussian of the best model, and two of every other optimum."""
    for i, (loc, tril) in enumerate(_parts(fit.diagnostics.optima[0].model)):
        for radius in (1.0, 2.0):
            x, y = ellipse(loc, tril, radius)
            line = {"color": COLORS[color], "width": 2.5 if radius == 1 else 1.5, "dash": "solid" if radius == 1 else "dash"}
            label, group = f"{name}, {radius:g} sd", f"{name}{radius}"
            figure.add_scatter(x=short(x), y=short(y), mode="lines", name=label, line=line, showlegend=i == 0, legendgroup=group)
    others = [part for one in fit.diagnostics.optima[1:] for part in _parts(one.model)]
    for i, (loc, tril) in enumerate(others):
        x, y = ellipse(loc, tril)
        line = {"color": COLORS["target"], "width": 1.5, "dash": "dot"}
        figure.add_scatter(
            x=short(x), y=short(y), mode="lines", name="other optima", line=line, showlegend=i == 0, legendgroup="other"
        )


def _parts(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Means and Cholesky factors of the Gaussians that a model consists of; none where it consists of something else."""
    try:
        if isinstance(model, MixtureSameFamily):
            _, locs, trils, df = mixture_parts(model)
            return list(zip(locs, trils, strict=True)) if df is None else []
        return [loc_and_tril(model)]
    except InputError:
        return []


def _intervals(fit: Fit) -> Figure:
    go = require("plotly.graph_objects", "app")
    best = fit.diagnostics.optima[0].model
    if fit.bijection.is_real and isinstance(fit.family, Gaussian):
        reach = 1.959963984540054 * best.variance.sqrt()
        q = torch.stack([best.mean - reach, best.mean, best.mean + reach])
    else:
        drawn = draws(fit, _in_the_support(fit, best))
        q = drawn.quantile(torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64, device="cpu"), 0)
    names = [html.escape(name) for name in fit.names][:SHOWN][::-1]
    middle, low, high = (short(q[i].tolist()[:SHOWN][::-1]) for i in (1, 0, 2))
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
    return style(figure, "value", "", max(256, 90 + 28 * len(names)))
