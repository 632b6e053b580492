"""Predictions: what a conditional model predicts, over one x, against what was observed, or as a reliability diagram."""

from __future__ import annotations

import html
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from whichkl._checks import InputError, cannot
from whichkl.divergences.estimate import NORMAL
from whichkl.fitting import Fit
from whichkl.goodness.draws import Unable, drawn, law_at
from whichkl.plots.rows import data
from whichkl.plots.style import SOFT, Figure, add_band, add_line, add_points, error_bars, new_figure, small, style

_DRAWS = 400
"""Draws of y at each x."""
_BINS = 10
_MAX_POINTS = 400
_MAX_FIGURES = 6
_MIDDLE_90 = (0.05, 0.5, 0.95)
_MAX_ROWS = 5_000


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
    middle = (share + NORMAL**2 / (2 * n)) / (1 + NORMAL**2 / n)
    half = NORMAL * ((share * (1 - share) + NORMAL**2 / (4 * n)) / n) ** 0.5 / (1 + NORMAL**2 / n)
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
