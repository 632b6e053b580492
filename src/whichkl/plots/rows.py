"""Rows: the data of a fit and draws of its model, side by side: margins of each column, and every pair of columns."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import require
from whichkl.fitting import Fit
from whichkl.goodness.margin_laws import margins as margin_laws
from whichkl.plots.style import AXIS, COLORS, Figure, add_bars, add_line, add_points, faint, new_figure, short, small, style
from whichkl.printable import shorten
from whichkl.process.seeds import seeded
from whichkl.samples import Block

_DRAWS = 20_000
_MAX_ATOMS = 30
"""Largest number of distinct whole numbers for a column to count as discrete."""
MAX_MARGINS = 12
_MAX_LABELS, _MAX_LABEL = 8, 12
"""Largest number of labels under a small figure, and of characters of each."""
_GRID_POINTS = 161
MAX_COLUMNS = 5
_CELLS = 64
"""Cells of the smoothed histogram along each axis."""
_MAX_POINTS = 600


@dataclass(frozen=True)
class RowsAndDraws:
    """Rows of p and draws of q, and the range of each column."""

    rows: Float[Tensor, "n d"]
    draws: Float[Tensor, "m d"]
    names: tuple[str, ...]

    @property
    def has_atoms(self) -> list[bool]:
        """Whether each column holds few distinct whole numbers: categories and small counts."""
        return list(map(has_atoms, self.rows.T))

    def range(self, j: int) -> tuple[float, float]:
        """The middle 99 % of a column, of rows and of draws, with some room."""
        tails = torch.tensor([0.005, 0.995], dtype=torch.float64, device="cpu")
        ends = torch.stack([part[:, j].quantile(tails) for part in (self.rows, self.draws)])
        low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
        room = 0.6 if self.has_atoms[j] else 0.08 * (high - low) or 1.0
        return low - room, high + room


def has_atoms(x: Float[Tensor, " n"]) -> bool:
    """Whether a column holds few distinct whole numbers."""
    values = x.unique()
    return len(values) <= _MAX_ATOMS and bool((values == values.round()).all())


def data(fit: Fit, most: int = 20_000) -> Block | None:
    """Return rows of a fit's target: its samples, fresh draws, or the rows that were held out; None where there are none.

    Weighted rows are drawn by their weights, so that all returned rows have the same weight.
    """
    held, target = fit.diagnostics.held, fit.target
    generator = torch.Generator().manual_seed(fit.seed)
    if target is not None and target.samples is not None:
        w = torch.ones(len(target.samples), dtype=torch.float64, device="cpu") if target.weights is None else target.weights.cpu()
        block, weighted = Block(target.samples, w, target.context), target.weights is not None
    elif target is not None and target.sampler is not None:
        x = target.draws(1000, seed=fit.seed)
        block, weighted = Block(x, torch.ones(len(x), dtype=torch.float64, device="cpu")), False
    elif held is not None:
        block, weighted = held, bool((held.w != held.w[0]).any())
    else:
        return None
    if weighted:
        rows = torch.multinomial(block.w.double(), most, replacement=True, generator=generator)
        block = block.take(rows)
    elif len(block) > most:
        block = block.take(torch.randperm(len(block), generator=generator, device="cpu")[:most])
    context = None if block.context is None else block.context.cpu()
    return Block(block.x.cpu().to(torch.float64), block.w.cpu(), context)


def draws(fit: Fit, model: Distribution, n: int = 4000) -> Float[Tensor, "n d"]:
    """Draw from a model; the same fit gives the same draws."""
    with seeded(fit.seed), torch.no_grad():
        x: Tensor = model.sample(torch.Size((n,)))
    return x.reshape(n, -1).cpu().to(torch.float64)


def rows_and_draws(fit: Fit) -> RowsAndDraws | None:
    """Return rows and draws of a fit that isn't conditional; None where there are no rows."""
    rows = data(fit)
    if rows is None or not isinstance(fit.model, Distribution):
        return None
    return RowsAndDraws(rows.x, draws(fit, fit.model, _DRAWS), fit.names)


def margins(fit: Fit, most: int = MAX_MARGINS) -> list[Figure]:
    """Draw a histogram of each column with the model's margin; none where the rows aren't available."""
    both = rows_and_draws(fit)
    figures: list[Figure] = []
    if both is None:
        return figures
    for j, name in enumerate(both.names[:most]):
        figure, ends = new_figure(), both.range(j)
        add_margins(figure, fit, both, j, ends)
        small(figure, name)
        figure.update_xaxes(range=short(ends), nticks=6)
        figure.update_xaxes(**label_ticks(fit, name))
        figure.update_yaxes(rangemode="tozero", nticks=5)
        figures.append(figure)
    return figures


def label_ticks(fit: Fit, name: str) -> dict[str, Any]:
    """Return the ticks of a column of categories, its labels instead of their codes; nothing for a column of numbers."""
    labels = fit.reading.categories.get(name, ())
    codes = range(0, len(labels), max(1, math.ceil(len(labels) / _MAX_LABELS)))
    texts = [html.escape(shorten(labels[i], _MAX_LABEL)) for i in codes]
    return {"tickvals": list(codes), "ticktext": texts} if labels else {}


def add_margins(figure: Any, fit: Fit, both: RowsAndDraws, j: int, ends: tuple[float, float], **place: Any) -> None:
    """Draw both margins of a column as densities, or as shares where it has atoms."""
    has_atoms = both.has_atoms[j]
    add_bars(figure, *margin_steps(both.rows[:, j], ends, has_atoms), name="rows of p", **place)
    draw = add_points if has_atoms else add_line
    draw(figure, *margin_curve(fit, both, j, ends), fit.objective.name, "q", **place)


def margin_steps(x: Tensor, ends: tuple[float, float], has_atoms: bool) -> tuple[list[float], list[float], float]:
    """Middles, heights and the width of a histogram's steps; shares of whole numbers for atoms."""
    if has_atoms:
        values, counts = x.unique(return_counts=True)
        return values.tolist(), short((counts / len(x)).tolist()), 0.8
    low, high = ends
    spread = float(x.quantile(0.75) - x.quantile(0.25)) or (high - low) / 4
    # Freedman and Diaconis's width; a lower bound keeps several bumps, which widen the quartiles, apart
    count = min(60, max(8, min(30, len(x) // 6), math.ceil((high - low) / (2 * spread / len(x) ** (1 / 3)))))
    width = (high - low) / count
    counts = torch.histc(x[(x >= low) & (x <= high)], count, low, high)
    middles = low + width * (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5)
    return short(middles.tolist()), short((counts / (len(x) * width)).tolist()), width


def margin_curve(fit: Fit, both: RowsAndDraws, j: int, ends: tuple[float, float]) -> tuple[list[float], list[float]]:
    """The model's margin: differences of its distribution function where that is known, else of its draws."""
    draws, (low, high) = both.draws[:, j], ends
    if both.has_atoms[j]:
        values, counts = draws.round().unique(return_counts=True)  # of a density, what is within ½ of each number
        inside = (values >= low) & (values <= high)
        return values[inside].tolist(), short((counts[inside] / len(draws)).tolist())
    grid = torch.linspace(low, high, _GRID_POINTS, dtype=torch.float64, device="cpu")
    below = _distribution_function(fit, j, grid, both)
    if below is None:
        grid = torch.linspace(low, high, 62, dtype=torch.float64, device="cpu")
        below = torch.searchsorted(draws.sort().values, grid).double() / len(draws)
    density, middles = below.diff() / grid.diff(), (grid[1:] + grid[:-1]) / 2
    return short(middles.tolist()), short(density.tolist())


def _distribution_function(fit: Fit, j: int, grid: Tensor, both: RowsAndDraws) -> Tensor | None:
    """F of the column at the grid, where its closed form is known; the other columns stay at some draw."""
    if not isinstance(fit.model, Distribution):
        return None
    rows = both.draws[:1].repeat(len(grid), 1)
    rows[:, j] = grid
    with torch.no_grad():
        try:
            below = margin_laws(fit.model, rows)
        except (RuntimeError, ValueError):  # the grid leaves the support
            return None
    return None if below is None or not bool(below[:, j].isfinite().all()) else below[:, j].double()


def pairs(fit: Fit, most: int = MAX_COLUMNS) -> Figure | None:
    """Draw every pair of columns: rows of p with the model's 50 % and 90 % regions below, draws of q above the diagonal.

    Of more columns than `most`, those with the worst calibration are drawn. None where the rows aren't available, or there is
    one column.
    """
    both = rows_and_draws(fit)
    if both is None or len(both.names) < 2:
        return None
    calibration = fit.diagnostics.calibration
    gaps = {} if calibration is None else {one.name: one.distance for one in calibration.columns}
    # the worst by calibration, in the order of the data
    keep = sorted(sorted(range(len(both.names)), key=lambda j: -gaps.get(fit.names[j], 0.0))[:most])
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
    _axes(figure, fit, both, keep, ranges)
    return figure


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


def _axes(figure: Any, fit: Fit, both: RowsAndDraws, keep: list[int], ranges: dict[int, tuple[float, float]]) -> None:
    """Show names and numbers only at the left and below."""
    d = len(keep)
    ticks = {"nticks": 4 if d > 3 else 6, "tickangle": 0, "tickfont": {"size": 10 if d > 3 else 12}}
    names = {j: html.escape(one if len(one) < 16 else one[:14] + "…") for j, one in enumerate(both.names)}
    for row, i in enumerate(keep, 1):
        for col, j in enumerate(keep, 1):
            x = {**AXIS, **ticks, **label_ticks(fit, both.names[j]), "range": short(ranges[j]), "showticklabels": row == d}
            y = {**AXIS, **ticks, "showticklabels": col == 1 and row > 1}
            y |= {"rangemode": "tozero"} if row == col else {"range": short(ranges[i]), **label_ticks(fit, both.names[i])}
            for axis, name in ((x, names[j] if row == d else ""), (y, names[i] if col == 1 else "")):
                axis["title"] = {"text": name, "standoff": 4, "font": {"size": 12}}
            figure.update_xaxes(x, row=row, col=col)
            figure.update_yaxes(y, row=row, col=col)
