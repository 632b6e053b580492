"""Fitted: the figure of a fit: curves in one dimension, points and ellipses in two, intervals above."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily

from whichkl._checks import InputError, cannot, require
from whichkl.access import Access
from whichkl.divergences.estimate import NORMAL
from whichkl.families import Gaussian
from whichkl.families.gaussian import loc_and_tril
from whichkl.families.mixture import mixture_parts
from whichkl.fitting import Fit
from whichkl.plots.predictions import predictions
from whichkl.plots.rows import RowsAndDraws, data, draws, label_ticks, margin_steps, regions
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
_INTERVAL = "median and 95 % interval under q"
_MIN_SHARE_OF_AXIS = 0.04
"""Least length of an interval, as a share of a common axis."""
_MAX_NAME = 28
_MAX_RATIO_OF_SPREADS = 4
"""Largest ratio of the spreads of two coordinates that are drawn on one scale."""
_MAX_ROWS = 5_000


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
    dim = len(fit.names)
    if dim == 1:
        return _on_the_line(fit)
    return (
        _on_the_plane(fit) if dim == 2 and fit.bijection.is_real else intervals({_INTERVAL: fit}, {_INTERVAL: fit.objective.name})
    )


def density(model: Distribution, x: Tensor) -> list[float]:
    """Return the density of a one-dimensional model on a grid."""
    return [float(v) for v in model.log_prob(x[:, None]).exp()]


def ellipse(loc: Tensor, tril: Tensor, radius: float = 2.0) -> tuple[list[float], list[float]]:
    """Return the curve m + radius · L (cos t, sin t): two standard deviations hold 86 % of a plane Gaussian."""
    t = torch.linspace(0, 2 * math.pi, 121, dtype=loc.dtype, device="cpu")
    points = loc + radius * torch.stack([t.cos(), t.sin()], -1) @ tril.T
    return [float(v) for v in points[:, 0]], [float(v) for v in points[:, 1]]


def _on_the_line(fit: Fit) -> Figure:
    models = [_in_the_support(fit, optimum.model) for optimum in fit.diagnostics.optima]
    drawn = torch.cat([draws(fit, model)[:, 0] for model in models])
    rows = data(fit)
    if rows is not None and RowsAndDraws(rows.x, drawn[:, None], fit.names).has_atoms[0]:
        return shares(fit, rows.x[:, 0], {f"q ({fit.objective.name})": drawn}, [fit.objective.name])
    figure, x = new_figure(), grid_over(fit, [drawn])
    add_target_area(figure, fit, x)
    for optimum, model in zip(fit.diagnostics.optima, models, strict=True):
        kind, name = "global" if optimum.is_global else "local", f"q ({fit.objective.name})"
        if len(models) > 1:
            at = float(model.mean[0] if fit.bijection.is_real else draws(fit, model, 999).median())
            name = f"q at {at:z.2f} ({kind})"
        dash = "solid" if optimum.is_global else "dash"
        add_line(figure, x.tolist(), density(model, x), fit.objective.name, name, width=2.5, dash=dash)
    add_target_bars(figure, fit, rows)
    return style(figure, html.escape(fit.names[0]), "density")


def grid_over(fit: Fit, drawn: Sequence[Tensor]) -> Tensor:
    """Return points over the middle 99.8 % of each set of draws, with some room, inside the support."""
    low, high = min(float(one.quantile(0.001)) for one in drawn), max(float(one.quantile(0.999)) for one in drawn)
    room = 0.1 * (high - low)
    x = torch.linspace(low - room, high + room, _GRID_POINTS, dtype=torch.float64, device="cpu")
    return x[fit.bijection.contains(x[:, None])]


def add_target_area(figure: Any, fit: Fit, x: Tensor) -> None:
    """Fill the area under p, if it is normalised."""
    target = fit.target
    if target is not None and Access.LOG_PROB in target.access and target.normalized:
        add_area(figure, x.tolist(), target.log_prob(x[:, None]).exp().tolist(), "target p")


def add_target_bars(figure: Any, fit: Fit, rows: Block | None) -> None:
    """Draw the histogram of the samples, if there are any."""
    if fit.target is not None and fit.target.samples is not None and rows is not None:
        ends = (float(rows.x.min()), float(rows.x.max()))
        if ends[1] > ends[0]:
            add_bars(figure, *margin_steps(rows.x[:, 0], ends, False), name="target p (samples)")


def _in_the_support(fit: Fit, model: Any) -> Distribution:
    """Return an optimum's model in the coordinates of the target."""
    wrapped: Distribution = fit.bijection.wrap(model) if fit.family.carried else model
    return wrapped


def shares(fit: Fit, rows: Tensor, drawn: Mapping[str, Tensor], colors: Sequence[str]) -> Figure:
    """Draw how often each whole number occurs, and how often under each q."""
    figure = new_figure()
    add_bars(figure, *margin_steps(rows, (0, 0), True), name="target p (samples)")
    for (name, one), color in zip(drawn.items(), colors, strict=True):
        values, heights, _ = margin_steps(one.round(), (0, 0), True)
        add_points(figure, values, heights, color, name, size=9)
    figure.update_xaxes(**label_ticks(fit, fit.names[0]))
    return style(figure, html.escape(fit.names[0]), "share")


def _on_the_plane(fit: Fit) -> Figure:
    figure, rows, color = new_figure(), data(fit, _MAX_ROWS), fit.objective.name
    add_rows(figure, rows)
    if gaussian_parts(fit.diagnostics.optima[0].model):
        add_ellipses(figure, fit, color, f"q ({color})")
    else:
        add_regions(figure, fit, color, "q", rows)
    return on_equal_axes(figure, fit, rows)


def add_rows(figure: Any, rows: Block | None) -> None:
    """Draw the rows of p as points, if there are any."""
    if rows is None:
        return
    x, y = rows.x.T.tolist()
    add_points(figure, x, y, "target", size=6, opacity=faint(len(rows)))
    # a legend would show its point as faint as these are, so that it has a trace of its own
    add_points(figure, [math.nan], [math.nan], "target", "target p", size=6, hoverinfo="skip")


def add_regions(figure: Any, fit: Fit, color: str, name: str, rows: Block | None) -> None:
    """Draw the smallest regions that hold 50 % and 90 % of a model."""
    drawn = draws(fit, fit.model, 20_000)
    both = RowsAndDraws(drawn if rows is None else rows.x, drawn, fit.names)
    trace = regions(drawn, both.range(0), both.range(1), color)
    trace.update(name=html.escape(f"{name}, 50 % and 90 %"), showlegend=True)
    figure.add_trace(trace)


def on_equal_axes(figure: Figure, fit: Fit, rows: Block | None) -> Figure:
    """Give both coordinates of a plane one scale, unless their spreads differ so much that one would be a line."""
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
        if isinstance(model, MixtureSameFamily):
            _, locs, trils, df = mixture_parts(model)
            return list(zip(locs, trils, strict=True)) if df is None else []
        return [loc_and_tril(model)]
    except InputError:
        return []


def intervals(fits: Mapping[str, Fit], colors: Mapping[str, str]) -> Figure:
    """Draw the median and the 95 % interval of each coordinate under each fit.

    Coordinates share an axis, unless an interval would be too short to be seen; then each has an axis of its own.
    """
    first = next(iter(fits.values()))
    # the codes of categories have no order, so that an interval of them means nothing
    numbers = [i for i, name in enumerate(first.names) if name not in first.reading.categories] or list(range(len(first.names)))
    names = [first.names[i] for i in numbers[:MAX_INTERVALS]]
    ends = {label: _ends(fit)[:, numbers[:MAX_INTERVALS]] for label, fit in fits.items()}
    low, high = torch.stack([q[0] for q in ends.values()]).amin(0), torch.stack([q[2] for q in ends.values()]).amax(0)
    is_shared = bool((high - low).min() > _MIN_SHARE_OF_AXIS * (high.max() - low.min()))
    rows, each = (1 if is_shared else len(names)), 28 + 8 * (len(fits) - 1) + (0 if is_shared else 30)
    height = max(256, 90 + each * len(names))
    gap = {} if is_shared else {"vertical_spacing": min(0.9 / max(1, rows - 1), 34 / height)}
    figure = require("plotly.subplots", "app").make_subplots(rows=rows, cols=1, **gap)
    for j, (label, q) in enumerate(ends.items()):
        offset = 0.6 * ((j + 0.5) / len(ends) - 0.5) if len(ends) > 1 else 0.0
        for row in range(rows):
            part = q if is_shared else q[:, row : row + 1]
            bars, at = error_bars(*part.tolist()), [i + offset for i in range(part.shape[1])]
            named = {"legendgroup": label, "showlegend": row == 0, "row": row + 1, "col": 1}
            add_points(figure, part[1].tolist(), at, colors[label], label, size=9, error_x=bars, **named)
    style(figure, "value" if is_shared else "", "", height)
    for row in range(rows):
        shown = names if is_shared else names[row : row + 1]
        ticks = {"tickvals": list(range(len(shown))), "ticktext": [html.escape(shorten(name, _MAX_NAME)) for name in shown]}
        figure.update_yaxes(**AXIS, **ticks, range=[len(shown) - 0.5, -0.5], row=row + 1, col=1)
        figure.update_xaxes(**AXIS, nticks=6, row=row + 1, col=1)
    figure.update_layout(showlegend=True)
    return figure


def _ends(fit: Fit) -> Tensor:
    """Return the 2.5 %, 50 % and 97.5 % quantiles (3, d) of the best model."""
    best = fit.diagnostics.optima[0].model
    if fit.bijection.is_real and isinstance(fit.family, Gaussian):
        reach = NORMAL * best.variance.sqrt()
        return torch.stack([best.mean - reach, best.mean, best.mean + reach]).to("cpu", torch.float64)
    levels = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64, device="cpu")
    return draws(fit, _in_the_support(fit, best)).quantile(levels, 0)
