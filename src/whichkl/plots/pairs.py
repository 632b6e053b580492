"""Pairs: the data below the diagonal, the model above it, both on it."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from whichkl._checks import require
from whichkl.fitting import Fit
from whichkl.plots.margins import add_margins
from whichkl.plots.rows import RowsAndDraws, rows_and_draws
from whichkl.plots.style import AXIS, COLORS, Figure, add_points, faint, short, style

MAX_COLUMNS = 5
_CELLS = 64
"""Cells of the smoothed histogram along each axis."""
_MAX_POINTS = 600


def pairs(fit: Fit, most: int = MAX_COLUMNS) -> Figure | None:
    """Draw every pair of columns: rows of p with the model's 50 % and 90 % regions below, draws of q above the diagonal.

    Of more columns than `most`, those with the worst calibration are drawn. None where the rows aren't available, or there is
    one column.
    """
    both = rows_and_draws(fit)
    if both is None or len(both.names) < 2:
        return None
    keep = _worst(fit, len(both.names), most)
    d, gap = len(keep), 0.02 if len(keep) > 2 else 0.03
    figure = require("plotly.subplots", "app").make_subplots(rows=d, cols=d, horizontal_spacing=gap, vertical_spacing=gap)
    ranges, has_atoms, color = {j: both.range(j) for j in keep}, both.has_atoms, fit.objective.name
    count = min(_MAX_POINTS, len(both.rows))
    rows, draws = (_scattered(part[:count], has_atoms, fit.seed) for part in (both.rows, both.draws))
    marker: dict[str, Any] = {"size": 5 if d < 4 else 3.5, "opacity": max(0.4, faint(count)), "hoverinfo": "skip"}
    for row, i in enumerate(keep, 1):
        for col, j in enumerate(keep, 1):
            place: dict[str, Any] = {"row": row, "col": col}
            if row == col:
                add_margins(figure, fit, both, i, ranges[i], **place)
                continue
            if row > col and not (has_atoms[i] or has_atoms[j]):
                figure.add_trace(regions(both.draws[:, [j, i]], ranges[j], ranges[i], color), **place)
            shown, tone = (rows, "target") if row > col else (draws, color)
            add_points(figure, shown[:, j].tolist(), shown[:, i].tolist(), tone, **marker, **place)
    style(figure, "", "", min(820, 190 + 170 * d) if d > 2 else 520)
    figure.update_layout(showlegend=False, bargap=0, meta={"square": True})
    _axes(figure, both, keep, ranges)
    return figure


def _worst(fit: Fit, d: int, most: int) -> list[int]:
    """The columns whose calibration is worst, in their order."""
    calibration = fit.diagnostics.calibration
    gaps = {} if calibration is None else {one.name: one.distance for one in calibration.columns}
    return sorted(sorted(range(d), key=lambda j: -gaps.get(fit.names[j], 0.0))[:most])


def regions(points: Tensor, x_ends: tuple[float, float], y_ends: tuple[float, float], color: str) -> Any:
    """Return a contour of the smallest regions that hold 50 % and 90 % of the draws, from a smoothed histogram."""
    x, y = (points[:, k].numpy() for k in (0, 1))
    height, x_edges, y_edges = np.histogram2d(x, y, _CELLS, (x_ends, y_ends))
    smooth = scipy.ndimage.gaussian_filter(height, 1.2, mode="constant")
    order = np.argsort(-smooth, axis=None)
    inside = np.empty(smooth.size)
    inside[order] = smooth.ravel()[order].cumsum() / max(len(x), 1)
    return require("plotly.graph_objects", "app").Contour(
        x=short(((x_edges[1:] + x_edges[:-1]) / 2).tolist()),
        y=short(((y_edges[1:] + y_edges[:-1]) / 2).tolist()),
        z=[[round(v, 3) for v in row] for row in inside.reshape(smooth.shape).T.tolist()],
        contours={"start": 0.5, "end": 0.9, "size": 0.4, "coloring": "lines"},
        colorscale=[[0, COLORS[color]], [1, COLORS[color]]],
        line={"width": 1.6},
        showscale=False,
        hoverinfo="skip",
    )


def _scattered(x: Tensor, has_atoms: list[bool], seed: int) -> Tensor:
    """Move points of columns with atoms apart by up to 0.18, so that they don't hide each other."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype, device="cpu")
    return x + (noise - 0.5) * 0.36 * torch.tensor(has_atoms, dtype=x.dtype, device="cpu")


def _axes(figure: Any, both: RowsAndDraws, keep: list[int], ranges: dict[int, tuple[float, float]]) -> None:
    """Show names and numbers only at the left and below."""
    d = len(keep)
    ticks = {"nticks": 4 if d > 3 else 6, "tickangle": 0, "tickfont": {"size": 10 if d > 3 else 12}}
    names = {j: html.escape(one if len(one) < 16 else one[:14] + "…") for j, one in enumerate(both.names)}
    for row, i in enumerate(keep, 1):
        for col, j in enumerate(keep, 1):
            x = {**AXIS, **ticks, "range": short(ranges[j]), "showticklabels": row == d}
            y = {**AXIS, **ticks, "showticklabels": col == 1 and row > 1}
            y |= {"rangemode": "tozero"} if row == col else {"range": short(ranges[i])}
            for axis, name in ((x, names[j] if row == d else ""), (y, names[i] if col == 1 else "")):
                axis["title"] = {"text": name, "standoff": 4, "font": {"size": 12}}
            figure.update_xaxes(x, row=row, col=col)
            figure.update_yaxes(y, row=row, col=col)
