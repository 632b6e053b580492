"""Fitted: the figure of a fit: curves in one dimension, points and ellipses in two, intervals above."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot, require
from whichkl.access import Access
from whichkl.divergences.estimate import NORMAL
from whichkl.families import Gaussian
from whichkl.families.mixture import components
from whichkl.fitting import Fit
from whichkl.plots.predictions import predictions
from whichkl.plots.rows import RowsAndDraws, data, draws, has_atoms, label_ticks, margin_steps, regions
from whichkl.plots.style import (
    AXIS,
    Figure,
    add_area,
    add_bars,
    add_line,
    add_points,
    error_bars,
    faint,
    new_figure,
    style,
)
from whichkl.printable import shorten
from whichkl.samples import Block

_GRID_POINTS = 801
MAX_INTERVALS = 40
"""Largest number of coordinates in a plot of intervals."""
_MIN_SHARE_OF_AXIS = 0.04
"""Least length of an interval, as a share of a common axis."""
_MAX_NAME = 28
_MAX_RATIO_OF_SPREADS = 4
"""Largest ratio of the spreads of two coordinates that are drawn on one scale."""
_MAX_ROWS = 5_000


class Layer(NamedTuple):
    """A model of a fit in a figure, in the coordinates of the target, with its name in the legend and its look."""

    name: str
    fit: Fit
    model: Any
    color: str
    dash: str = "solid"


def figure_of(fit: Fit) -> Figure:
    """Draw one fit.

    Raises:
        InputError: plotly isn't installed, or a conditional fit has lost its rows.
    """
    if not isinstance(fit.model, Distribution):
        figures = predictions(fit)
        if not figures:
            because = "predictions are drawn over rows, and a fit from a stream or a file keeps none"
            raise InputError(cannot("draw this fit", because, "Draw it where it was fitted"))
        return figures[0]
    color, optima = fit.objective.name, fit.diagnostics.optima
    if len(fit.names) > 1:
        name = f"q ({color})" if _is_plane(fit) else "median and 95 % interval under q"
        return figure_of_layers([Layer(name, fit, fit.model, color)], data(fit, _MAX_ROWS))
    layers = []
    for one in optima:
        model: Any = fit.bijection.wrap(one.model) if fit.family.carried else one.model
        kind, name = "global" if one.is_global else "local", f"q ({color})"
        if len(optima) > 1:
            at = float(model.mean[0] if fit.bijection.is_real else draws(fit, model, 999).median())
            name = f"q at {at:z.2f} ({kind})"
        layers.append(Layer(name, fit, model, color, "solid" if one.is_global else "dash"))
    return figure_of_layers(layers, data(fit))


def figure_of_layers(layers: Sequence[Layer], rows: Block | None) -> Figure:
    """Draw models of the same coordinates over each other, and over rows of p."""
    if len(layers[0].fit.names) == 1:
        return _on_the_line(layers, rows)
    return _on_the_plane(layers, rows) if _is_plane(layers[0].fit) else _intervals(layers)


def _is_plane(fit: Fit) -> bool:
    return len(fit.names) == 2 and fit.bijection.is_real


def density(model: Distribution, x: Tensor) -> list[float]:
    """Return the density of a one-dimensional model on a grid."""
    return [float(v) for v in model.log_prob(x[:, None]).exp()]


def ellipse(loc: Tensor, tril: Tensor, radius: float = 2.0) -> tuple[list[float], list[float]]:
    """Return the curve m + radius · L (cos t, sin t): two standard deviations hold 86 % of a plane Gaussian."""
    t = torch.linspace(0, 2 * math.pi, 121, dtype=loc.dtype, device="cpu")
    points = loc + radius * torch.stack([t.cos(), t.sin()], -1) @ tril.T
    return [float(v) for v in points[:, 0]], [float(v) for v in points[:, 1]]


def _on_the_line(layers: Sequence[Layer], rows: Block | None) -> Figure:
    """Draw densities over the middle 99.8 % of each, inside the support; of whole numbers, how often each occurs."""
    figure, fit = new_figure(), layers[0].fit
    drawn = [draws(one.fit, one.model)[:, 0] for one in layers]
    if rows is not None and has_atoms(rows.x[:, 0]):
        add_bars(figure, *margin_steps(rows.x[:, 0], (0, 0), True), name="target p (samples)")
        for layer, own in zip(layers, drawn, strict=True):
            values, heights, _ = margin_steps(own.round(), (0, 0), True)
            add_points(figure, values, heights, layer.color, layer.name, size=9)
        figure.update_xaxes(**label_ticks(fit, fit.names[0]))
        return style(figure, html.escape(fit.names[0]), "share")
    low, high = min(float(own.quantile(0.001)) for own in drawn), max(float(own.quantile(0.999)) for own in drawn)
    room, target = 0.1 * (high - low), fit.target
    x = torch.linspace(low - room, high + room, _GRID_POINTS, dtype=torch.float64, device="cpu")
    x = x[fit.bijection.contains(x[:, None])]
    if target is not None and Access.LOG_PROB in target.access and target.normalized:
        add_area(figure, x.tolist(), target.log_prob(x[:, None]).exp().tolist(), "target p")
    for one in layers:
        add_line(figure, x.tolist(), density(one.model, x), one.color, one.name, width=2.5, dash=one.dash)
    if target is not None and target.samples is not None and rows is not None and float(rows.x.max()) > float(rows.x.min()):
        ends = (float(rows.x.min()), float(rows.x.max()))
        add_bars(figure, *margin_steps(rows.x[:, 0], ends, False), name="target p (samples)")
    return style(figure, html.escape(fit.names[0]), "density")


def _on_the_plane(layers: Sequence[Layer], rows: Block | None) -> Figure:
    """Draw rows of p as points, and models as ellipses, or as the smallest regions that hold 50 % and 90 % of them.

    Both coordinates have one scale, unless their spreads differ so much that one would be a line.
    """
    figure, fit = new_figure(), layers[0].fit
    if rows is not None:
        x, y = rows.x.T.tolist()
        add_points(figure, x, y, "target", size=6, opacity=faint(len(rows)))
        # a legend would show its point as faint as these are, so that it has a trace of its own
        add_points(figure, [math.nan], [math.nan], "target", "target p", size=6, hoverinfo="skip")
    for one in layers:
        if gaussian_parts(one.fit.diagnostics.optima[0].model):
            add_ellipses(figure, one.fit, one.color, one.name, has_others=len(layers) == 1)
            continue
        drawn = draws(one.fit, one.model, 20_000)
        both = RowsAndDraws(drawn if rows is None else rows.x, drawn, fit.names)
        trace = regions(drawn, both.range(0), both.range(1), one.color)
        trace.update(name=html.escape(f"{one.name}, 50 % and 90 %"), showlegend=True)
        figure.add_trace(trace)
    spread = (draws(fit, fit.model, 1_000) if rows is None else rows.x).std(0)
    style(figure, html.escape(fit.names[0]), html.escape(fit.names[1]), 460)
    figure.update_xaxes(**label_ticks(fit, fit.names[0]))
    figure.update_yaxes(**label_ticks(fit, fit.names[1]))
    if 1 / _MAX_RATIO_OF_SPREADS < float(spread[1] / spread[0]) < _MAX_RATIO_OF_SPREADS:
        figure.update_xaxes(constrain="domain")
        figure.update_yaxes(scaleanchor="x", scaleratio=1, constrain="domain")
    return figure


def add_ellipses(figure: Any, fit: Fit, color: str, name: str, *, has_others: bool = True) -> None:
    """Draw one and two standard deviations of each Gaussian of the best model, and two of the other optima if it `has_others`."""
    for i, part in enumerate(gaussian_parts(fit.diagnostics.optima[0].model)):
        for radius, dash, width in ((1.0, "solid", 2.5), (2.0, "dash", 1.5)):
            legend: dict[str, Any] = {"showlegend": i == 0, "legendgroup": f"{name}{radius}"}
            add_line(figure, *ellipse(*part, radius), color, f"{name}, {radius:g} sd", width=width, dash=dash, **legend)
    others = [part for one in fit.diagnostics.optima[1:] if has_others for part in gaussian_parts(one.model)]
    for i, part in enumerate(others):
        legend = {"showlegend": i == 0, "legendgroup": "other"}
        add_line(figure, *ellipse(*part), "target", "other optima", width=1.5, dash="dot", **legend)


def gaussian_parts(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Return means and Cholesky factors of the Gaussians that a model consists of; none where it consists of something else."""
    try:
        _, locs, trils, df = components(model)
        return list(zip(locs, trils, strict=True)) if df is None else []
    except InputError:
        return []


def _intervals(layers: Sequence[Layer]) -> Figure:
    """Draw the median and the 95 % interval of each coordinate under each model.

    Coordinates share an axis, unless an interval would be too short to be seen; then each has an axis of its own.
    """
    fit = layers[0].fit
    # the codes of categories have no order, so that an interval of them means nothing
    numbers = [i for i, name in enumerate(fit.names) if name not in fit.reading.categories] or list(range(len(fit.names)))
    names = [fit.names[i] for i in numbers[:MAX_INTERVALS]]
    ends = torch.stack([_ends(one)[:, numbers[:MAX_INTERVALS]] for one in layers])
    low, high = ends[:, 0].amin(0), ends[:, 2].amax(0)
    is_shared = bool((high - low).min() > _MIN_SHARE_OF_AXIS * (high.max() - low.min()))
    rows, each = (1 if is_shared else len(names)), 28 + 8 * (len(layers) - 1) + (0 if is_shared else 30)
    height = max(256, 90 + each * len(names))
    gap = {} if is_shared else {"vertical_spacing": min(0.9 / max(1, rows - 1), 34 / height)}
    figure = require("plotly.subplots", "app").make_subplots(rows=rows, cols=1, **gap)
    for j, (layer, q) in enumerate(zip(layers, ends, strict=True)):
        offset = 0.6 * ((j + 0.5) / len(ends) - 0.5) if len(ends) > 1 else 0.0
        for row in range(rows):
            part = q if is_shared else q[:, row : row + 1]
            bars, at = error_bars(*part.tolist()), [i + offset for i in range(part.shape[1])]
            named = {"legendgroup": layer.name, "showlegend": row == 0, "row": row + 1, "col": 1}
            add_points(figure, part[1].tolist(), at, layer.color, layer.name, size=9, error_x=bars, **named)
    style(figure, "value" if is_shared else "", "", height)
    for row in range(rows):
        shown = names if is_shared else names[row : row + 1]
        ticks = {"tickvals": list(range(len(shown))), "ticktext": [html.escape(shorten(name, _MAX_NAME)) for name in shown]}
        figure.update_yaxes(**AXIS, **ticks, range=[len(shown) - 0.5, -0.5], row=row + 1, col=1)
        figure.update_xaxes(**AXIS, nticks=6, row=row + 1, col=1)
    figure.update_layout(showlegend=True)
    return figure


def _ends(layer: Layer) -> Tensor:
    """Return the 2.5 %, 50 % and 97.5 % quantiles (3, d) of a fit's best model."""
    fit, best = layer.fit, layer.fit.diagnostics.optima[0].model
    if fit.bijection.is_real and isinstance(fit.family, Gaussian):
        reach = NORMAL * best.variance.sqrt()
        return torch.stack([best.mean - reach, best.mean, best.mean + reach]).to("cpu", torch.float64)
    levels = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64, device="cpu")
    return draws(fit, layer.model).quantile(levels, 0)
