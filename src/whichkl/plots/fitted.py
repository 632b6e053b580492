"""Fitted: the figure of a fit: curves in one dimension, points and ellipses in two, intervals above; predictions of q(y|x)."""

from __future__ import annotations

import html
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, MixtureSameFamily

from whichkl._checks import InputError, cannot
from whichkl.access import Access
from whichkl.families import Gaussian
from whichkl.families.gaussian import loc_and_tril
from whichkl.families.mixture import mixture_parts
from whichkl.fitting import Fit
from whichkl.goodness.draws import Unable, drawn, law_at
from whichkl.plots.rows import RowsAndDraws, data, draws, margin_steps, regions
from whichkl.plots.style import (
    SOFT,
    Figure,
    add_area,
    add_band,
    add_bars,
    add_line,
    add_points,
    error_bars,
    faint,
    new_figure,
    small,
    style,
)
from whichkl.process.torch_modes import plain_modes

_GRID_POINTS = 801
MAX_INTERVALS = 40
"""Largest number of coordinates in a plot of intervals."""
_Z = 1.959963984540054
"""The 97.5 % quantile of the standard normal."""
_MAX_POINTS = 400
_DRAWS = 400
"""Draws of y at each x."""
_MAX_ROWS = 5_000
_BINS = 10
_MAX_FIGURES = 6
_MIDDLE_90 = (0.05, 0.5, 0.95)


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
            because = "predictions are drawn over rows, and a fit from a stream or a file keeps none"
            raise InputError(cannot("draw this fit", because, "Draw it where it was fitted"))
        return figures[0]
    dim = len(fit.names)
    if dim == 1:
        return _on_the_line(fit)
    return _on_the_plane(fit) if dim == 2 and fit.bijection.is_real else _intervals(fit)


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
        return _shares(fit, rows.x[:, 0], drawn)
    low, high = (float(drawn.quantile(q)) for q in (0.001, 0.999))
    x = torch.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), _GRID_POINTS, dtype=torch.float64, device="cpu")
    x = x[fit.bijection.contains(x[:, None])]
    figure, target, grid = new_figure(), fit.target, x.tolist()
    if target is not None and Access.LOG_PROB in target.access and target.normalized:
        add_area(figure, grid, target.log_prob(x[:, None]).exp().tolist(), "target p")
    for optimum, model in zip(fit.diagnostics.optima, models, strict=True):
        kind, name = "global" if optimum.is_global else "local", f"q ({fit.objective.name})"
        if len(models) > 1:
            at = float(model.mean[0]) + 0.0 if fit.bijection.is_real else float(draws(fit, model, 999).median())
            name = f"q at {at:.2f} ({kind})"
        dash = "solid" if optimum.is_global else "dash"
        add_line(figure, grid, density(model, x), fit.objective.name, name, width=2.5, dash=dash)
    if target is not None and target.samples is not None and rows is not None:
        ends = (float(rows.x.min()), float(rows.x.max()))
        if ends[1] > ends[0]:
            add_bars(figure, *margin_steps(rows.x[:, 0], ends, False), name="target p (samples)")
    return style(figure, html.escape(fit.names[0]), "density")


def _in_the_support(fit: Fit, model: Any) -> Distribution:
    """Return an optimum's model in the coordinates of the target."""
    wrapped: Distribution = fit.bijection.wrap(model) if fit.family.carried else model
    return wrapped


def _shares(fit: Fit, rows: Tensor, drawn: Tensor) -> Figure:
    """Draw how often each whole number occurs, and how often under q."""
    figure = new_figure()
    add_bars(figure, *margin_steps(rows, (0, 0), True), name="target p (samples)")
    values, heights, _ = margin_steps(drawn, (0, 0), True)
    add_points(figure, values, heights, fit.objective.name, f"q ({fit.objective.name})", size=9)
    return style(figure, html.escape(fit.names[0]), "share")


def _on_the_plane(fit: Fit) -> Figure:
    figure, rows, color = new_figure(), data(fit, 5000), fit.objective.name
    if rows is not None:
        x, y = rows.x.T.tolist()
        add_points(figure, x, y, "target", size=6, opacity=faint(len(rows)))
        # a legend would show its point as faint as these are, so that it has a trace of its own
        add_points(figure, [math.nan], [math.nan], "target", "target p", size=6, hoverinfo="skip")
    if _parts(fit.diagnostics.optima[0].model):
        add_ellipses(figure, fit, color, f"q ({color})")
    else:
        drawn = draws(fit, fit.model, 20_000)
        both = RowsAndDraws(drawn if rows is None else rows.x, drawn, fit.names)
        trace = regions(drawn, both.range(0), both.range(1), color)
        trace.update(name="q, 50 % and 90 %", showlegend=True)
        figure.add_trace(trace)
    return style(figure, html.escape(fit.names[0]), html.escape(fit.names[1]), 420)


def add_ellipses(figure: Any, fit: Fit, color: str, name: str) -> None:
    """Draw one and two standard deviations of each Gaussian of the best model, and two of every other optimum."""
    for i, part in enumerate(_parts(fit.diagnostics.optima[0].model)):
        for radius, dash, width in ((1.0, "solid", 2.5), (2.0, "dash", 1.5)):
            legend: dict[str, Any] = {"showlegend": i == 0, "legendgroup": f"{name}{radius}"}
            add_line(figure, *ellipse(*part, radius), color, f"{name}, {radius:g} sd", width=width, dash=dash, **legend)
    others = [part for one in fit.diagnostics.optima[1:] for part in _parts(one.model)]
    for i, part in enumerate(others):
        legend = {"showlegend": i == 0, "legendgroup": "other"}
        add_line(figure, *ellipse(*part), "target", "other optima", width=1.5, dash="dot", **legend)


def _parts(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Return means and Cholesky factors of the Gaussians that a model consists of; none where it consists of something else."""
    try:
        if isinstance(model, MixtureSameFamily):
            _, locs, trils, df = mixture_parts(model)
            return list(zip(locs, trils, strict=True)) if df is None else []
        return [loc_and_tril(model)]
    except InputError:
        return []


def _intervals(fit: Fit) -> Figure:
    best = fit.diagnostics.optima[0].model
    if fit.bijection.is_real and isinstance(fit.family, Gaussian):
        reach = _Z * best.variance.sqrt()
        q = torch.stack([best.mean - reach, best.mean, best.mean + reach])
    else:
        levels = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64, device="cpu")
        q = draws(fit, _in_the_support(fit, best)).quantile(levels, 0)
    names = [html.escape(name) for name in fit.names][:MAX_INTERVALS][::-1]
    low, middle, high = q[:, :MAX_INTERVALS].flip(1).tolist()
    figure, label = new_figure(), "median and 95 % interval under q"
    add_points(figure, middle, names, fit.objective.name, label, size=9, error_x=error_bars(low, middle, high))
    figure.update_layout(showlegend=True)
    return style(figure, "value", "", max(256, 90 + 28 * len(names)))


def predictions(fit: Fit) -> list[Figure]:
    """Draw what a conditional model predicts: a curve with its 90 % band over one x, else predicted against observed.

    For classes it is a reliability diagram: how often a class came true against the chance that the model gave it. The list is
    empty where the rows aren't available.

    Raises:
        InputError: the model isn't conditional, or can't be sampled.
    """
    if isinstance(fit.model, Distribution):
        raise InputError(cannot("draw predictions", "the model is one distribution, not q(y|x)", "Use whichkl.plot"))
    block = data(fit, _MAX_ROWS)
    if block is None or block.context is None:
        return []
    try:
        law = law_at(fit.model, block.context)
        chances = _chances(law, block.x)
        if chances is not None:
            return [_reliability(fit, chances, block.x[:, 0])]
        if block.context.shape[1] == 1 and len(fit.names) <= _MAX_FIGURES:
            return _over_x(fit, block.context, block.x)
        return _against(fit, drawn(law, (_DRAWS,), block.x.shape[1], fit.seed), block.x)
    except Unable as error:
        raise InputError(cannot("draw predictions", str(error), "Check the model that the family returns")) from error


def _chances(law: Any, y: Tensor) -> Tensor | None:
    """(n, K) chances of classes 0 … K−1; None where y isn't one column of classes."""
    law = law.base_dist if hasattr(law, "reinterpreted_batch_ndims") else law
    probs = getattr(law, "probs", None)
    if not isinstance(law, (Bernoulli, Categorical)) or not isinstance(probs, Tensor) or y.shape[1] != 1:
        return None
    probs = probs.detach().cpu().to(torch.float64).reshape(len(y), -1)
    return torch.cat([1 - probs, probs], 1) if isinstance(law, Bernoulli) else probs


def _reliability(fit: Fit, chances: Tensor, y: Tensor) -> Figure:
    """Draw chances in ten bins of equally many, with Wilson's 95 % intervals of how often they came true."""
    figure, k, name = new_figure(), chances.shape[1], html.escape(fit.names[0])
    said = chances[:, 1:] if k == 2 else chances
    came = (y[:, None].long() == torch.arange(k, device="cpu")[None, k - said.shape[1] :]).double()
    p, hit = said.flatten(), came.flatten()
    bins = [part for part in p.argsort().tensor_split(_BINS) if len(part)]
    x, shares = [float(p[part].mean()) for part in bins], [float(hit[part].mean()) for part in bins]
    ends = [_wilson(share, len(part)) for share, part in zip(shares, bins, strict=True)]
    error = error_bars([low for low, _ in ends], shares, [high for _, high in ends], thickness=1.5)
    add_line(figure, [0, 1], [0, 1], "target", "calibrated", width=1.5, dash="dash", hoverinfo="skip")
    label = "a tenth of the rows each" if k == 2 else "a tenth of rows × classes each"
    shape = {"mode": "lines+markers", "marker": {"size": 8}, "error_y": error}
    add_line(figure, x, shares, fit.objective.name, label, **shape)
    what = f"chance of {name} = 1" if k == 2 else f"chance of a class of {name}"
    style(figure, f"{what} under q", "how often it came true", 420)
    caption = "How often a class came true, against the chance that the model gave it, with 95 % intervals (Wilson)."
    figure.update_layout(meta={"square": True, "caption": caption})
    figure.update_xaxes(range=[-0.03, 1.03])
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure


def _wilson(share: float, n: int) -> tuple[float, float]:
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * ((share * (1 - share) + _Z**2 / (4 * n)) / n) ** 0.5 / (1 + _Z**2 / n)
    return middle - half, middle + half


def _middle(q: Tensor) -> tuple[list[Any], ...]:
    """Return the ends of the middle 90 % and the median of draws."""
    low, middle, high = q.quantile(torch.tensor(_MIDDLE_90, dtype=torch.float64, device="cpu"), 0).tolist()
    return low, middle, high


def _over_x(fit: Fit, x: Tensor, y: Tensor) -> list[Figure]:
    """Draw each column of y over the one column of x: rows, the median, and the middle 90 %."""
    figures, color = [], fit.objective.name
    grid = torch.linspace(float(x.min()), float(x.max()), 121, dtype=torch.float64, device="cpu")[:, None]
    q = drawn(law_at(fit.model, grid), (4 * _DRAWS,), y.shape[1], fit.seed)
    x_name = fit.target.context_names[0] if fit.target is not None and fit.target.context_names else "x"
    x_name = f"{x_name} (given)" if x_name in fit.names else x_name
    for j, name in enumerate(fit.names):
        figure, at, (low, middle, high) = new_figure(), grid[:, 0].tolist(), _middle(q[:, :, j])
        add_band(figure, at, low, high, color, name="middle 90 % of q")
        seen = x[:_MAX_POINTS, 0].tolist(), y[:_MAX_POINTS, j].tolist()
        add_points(figure, *seen, "target", "rows of p", size=5, opacity=0.6)
        add_line(figure, at, middle, color, "median of q", width=2.5)
        figures.append(style(figure, html.escape(x_name), html.escape(name), 380))
        figure.update_layout(meta={"caption": "The rows, with the median and the middle 90 % of the model at each x."})
    return figures


def _against(fit: Fit, draws: Tensor, y: Tensor) -> list[Figure]:
    """Draw what was observed over the median of q, about the diagonal where the model is right, with the middle 90 %."""
    figures, color = [], fit.objective.name
    caption = "What was observed over the model's median; nine in ten rows should lie on the light bars, its middle 90 %."
    for j, name in enumerate(fit.names[:_MAX_FIGURES]):
        figure, (low, middle, high) = new_figure(), _middle(draws[:, :_MAX_POINTS, j])
        error = error_bars(low, middle, high, thickness=2, color=SOFT[color])
        add_points(figure, middle, middle, color, "median, middle 90 % of q", size=3, error_y=error)
        add_points(figure, middle, y[:_MAX_POINTS, j].tolist(), "target", "rows of p", size=5, opacity=0.8)
        if len(fit.names) == 1:
            style(figure, f"predicted {html.escape(name)}", "observed", 420)
        else:
            small(figure, name, "predicted", "observed", 300)
        figure.update_layout(meta={"caption": caption})
        figures.append(figure)
    return figures
