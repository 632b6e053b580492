"""Conditional: what a model of y given x predicts beside what was observed."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot, require
from whichkl.fitting import Fit
from whichkl.goodness.draws import Unable, drawn, law_at
from whichkl.plots.rows import data
from whichkl.plots.style import COLORS, SOFT, short, small, style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SHOWN, _DRAWS, _ROWS, _BINS, _COLUMNS = 400, 400, 5_000, 10, 6


def predictions(fit: Fit) -> list[Figure]:
    """Draw what a conditional model predicts: a curve with its 90 % band over one x, else predicted against observed.

    For classes a reliability diagram: the chance that the model gives against how often it came true. None where the rows
    aren't at hand.

    Raises:
        InputError: the model isn't conditional, or can't be drawn from.
    """
    if isinstance(fit.model, Distribution):
        raise InputError(cannot("draw predictions", "the model is one distribution, not q(y|x)", "Use whichkl.plot"))
    block = data(fit, _ROWS)
    if block is None or block.context is None:
        return []
    try:
        law = law_at(fit.model, block.context)
        chances = _chances(law, block.x)
        if chances is not None:
            return [_reliability(fit, chances, block.x[:, 0])]
        if block.context.shape[1] == 1 and len(fit.names) <= _COLUMNS:
            return _over_x(fit, block.context, block.x)
        return _against(fit, drawn(law, (_DRAWS,), block.x.shape[1], fit.seed), block.x)
    except Unable as error:
        raise InputError(cannot("draw predictions", str(error), "Check the model that the family returns")) from error


def _chances(law: Any, y: Tensor) -> Tensor | None:
    """(n, K) chances of classes 0 … K−1; None where y isn't one column of classes."""
    law = law.base_dist if hasattr(law, "reinterpreted_batch_ndims") else law
    probs = getattr(law, "probs", None)
    if (
        not isinstance(probs, Tensor)
        or y.shape[1] != 1
        or not isinstance(law, (torch.distributions.Categorical, torch.distributions.Bernoulli))
    ):
        return None
    probs = probs.detach().cpu().to(torch.float64)
    if isinstance(law, torch.distributions.Bernoulli):
        flat = probs.reshape(len(y))
        return torch.stack([1 - flat, flat], 1)
    return probs.reshape(len(y), -1)


def _reliability(fit: Fit, chances: Tensor, y: Tensor) -> Figure:
    """Chances in ten bins of equally many, with Wilson's 95 % intervals of how often they came true."""
    figure, k = require("plotly.graph_objects", "app").Figure(), chances.shape[1]
    said = chances[:, 1:] if k == 2 else chances
    came = (y[:, None].long() == torch.arange(k, device="cpu")[None, k - said.shape[1] :]).double()
    p, hit = said.flatten(), came.flatten()
    order = p.argsort()
    bins = [part for part in order.tensor_split(_BINS) if len(part)]
    x, share, low, high = [], [], [], []
    for part in bins:
        n, f, z = len(part), float(hit[part].mean()), 1.959963984540054
        middle, half = (f + z * z / (2 * n)) / (1 + z * z / n), z * ((f * (1 - f) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
        x.append(float(p[part].mean()))
        share.append(f)
        low.append(f - (middle - half))
        high.append(middle + half - f)
    dash = {"color": COLORS["target"], "width": 1.5, "dash": "dash"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=dash, name="calibrated", hoverinfo="skip")
    error = {"type": "data", "symmetric": False, "array": short(high), "arrayminus": short(low), "thickness": 1.5, "width": 0}
    figure.add_scatter(
        x=short(x),
        y=short(share),
        error_y=error,
        mode="lines+markers",
        line={"color": COLORS[fit.objective.name], "width": 2},
        marker={"size": 8},
        name="a tenth of the rows each" if k == 2 else "a tenth of rows × classes each",
    )
    what = f"chance of {html.escape(fit.names[0])} = 1" if k == 2 else f"chance of a class of {html.escape(fit.names[0])}"
    style(figure, f"{what} under q", "how often it came true", 420)
    caption = "How often a class came true, against the chance that the model gave it, with 95 % intervals (Wilson)."
    figure.update_layout(meta={"square": True, "caption": caption})
    figure.update_xaxes(range=[-0.03, 1.03])
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure


def _over_x(fit: Fit, x: Tensor, y: Tensor) -> list[Figure]:
    """Each column of y over the one column of x: rows, the median, and the middle 90 %."""
    go, figures, color = require("plotly.graph_objects", "app"), [], fit.objective.name
    grid = torch.linspace(float(x.min()), float(x.max()), 121, dtype=torch.float64, device="cpu")[:, None]
    q = drawn(law_at(fit.model, grid), (4 * _DRAWS,), y.shape[1], fit.seed).quantile(
        torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device="cpu"), 0
    )
    x_name = fit.target.context_names[0] if fit.target is not None and fit.target.context_names else "x"
    x_name = f"{x_name} (given)" if x_name in fit.names else x_name
    for j, name in enumerate(fit.names):
        figure, at = go.Figure(), short(grid[:, 0].tolist())
        low, middle, high = (short(one.tolist()) for one in q[:, :, j])
        edge = {"x": at, "mode": "lines", "line": {"width": 0}}
        figure.add_scatter(y=low, hoverinfo="skip", showlegend=False, **edge)
        figure.add_scatter(y=high, fill="tonexty", fillcolor=SOFT[color], name="middle 90 % of q", **edge)
        marker = {"color": COLORS["target"], "size": 5, "opacity": 0.6}
        seen = short(x[:_SHOWN, 0].tolist()), short(y[:_SHOWN, j].tolist())
        figure.add_scatter(x=seen[0], y=seen[1], mode="markers", marker=marker, name="rows of p")
        figure.add_scatter(x=at, y=middle, mode="lines", line={"color": COLORS[color], "width": 2.5}, name="median of q")
        figures.append(style(figure, html.escape(x_name), html.escape(name), 380))
        figure.update_layout(meta={"caption": "The rows, with the median and the middle 90 % of the model at each x."})
    return figures


def _against(fit: Fit, draws: Tensor, y: Tensor) -> list[Figure]:
    """Observed over the median of q, about the diagonal where the model is right; behind each its middle 90 %."""
    go, figures, color = require("plotly.graph_objects", "app"), [], fit.objective.name
    q = draws[:, :_SHOWN].quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device="cpu"), 0)
    alone = len(fit.names) == 1
    for j, name in enumerate(fit.names[:_COLUMNS]):
        figure, (low, middle, high) = go.Figure(), q[:, :, j]
        error = {"type": "data", "symmetric": False, "thickness": 2, "width": 0, "color": SOFT[color]}
        error["array"], error["arrayminus"] = short((high - middle).tolist()), short((middle - low).tolist())
        at = short(middle.tolist())
        figure.add_scatter(
            x=at, y=at, error_y=error, mode="markers", marker={"color": COLORS[color], "size": 3}, name="median, middle 90 % of q"
        )
        marker = {"color": COLORS["target"], "size": 5, "opacity": 0.8}
        figure.add_scatter(x=at, y=short(y[:_SHOWN, j].tolist()), mode="markers", marker=marker, name="rows of p")
        if alone:
            style(figure, f"predicted {html.escape(name)}", "observed", 420)
        else:
            small(figure, name, "predicted", "observed", 300)
        caption = "What was observed over the model's median; nine in ten rows should lie on the light bars, its middle 90 %."
        figure.update_layout(meta={"caption": caption})
        figures.append(figure)
    return figures
