"""Margins: every column of the data with the model's margin over it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import require
from whichkl.fitting import Fit
from whichkl.goodness.margin_laws import margins as margin_laws
from whichkl.plots.rows import Sight, sight
from whichkl.plots.style import COLORS, SOFT, short, small

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST = 12
_GRID = 161


def margins(fit: Fit, most: int = MOST) -> list[Figure]:
    """Draw a histogram of each column with the model's margin; none where the rows aren't at hand."""
    both, go = sight(fit), require("plotly.graph_objects", "app")
    figures: list[Figure] = []
    if both is None:
        return figures
    for j, name in enumerate(both.names[:most]):
        figure, ends, atoms = go.Figure(), both.range(j), both.atoms[j]
        x, height, width = margin_steps(both.rows[:, j], ends, atoms)
        figure.add_bar(x=x, y=height, width=width, marker={"color": SOFT["target"], "line": {"width": 0}}, name="rows of p")
        x, y = margin_curve(fit, both, j, ends)
        color = COLORS[fit.objective.name]
        if atoms:
            figure.add_scatter(x=x, y=y, mode="markers", marker={"color": color, "size": 8}, name="q")
        else:
            figure.add_scatter(x=x, y=y, mode="lines", line={"color": color, "width": 2.2}, name="q")
        small(figure, name)
        figure.update_xaxes(range=short(ends), nticks=6)
        figure.update_yaxes(rangemode="tozero", nticks=5)
        figures.append(figure)
    return figures


def margin_steps(x: Tensor, ends: tuple[float, float], atoms: bool) -> tuple[list[float], list[float], float]:
    """Middles, heights and the width of a histogram's steps; shares of whole numbers for atoms."""
    if atoms:
        values, counts = x.unique(return_counts=True)
        return values.tolist(), short((counts / len(x)).tolist()), 0.8
    low, high = ends
    spread = float(x.quantile(0.75) - x.quantile(0.25)) or (high - low) / 4
    # Freedman and Diaconis's width; at least so many steps that several bumps, which widen the quartiles, don't melt together
    count = min(60, max(8, min(30, len(x) // 6), math.ceil((high - low) / (2 * spread / len(x) ** (1 / 3)))))
    width = (high - low) / count
    counts = torch.histc(x[(x >= low) & (x <= high)], count, low, high)
    middles = low + width * (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5)
    return short(middles.tolist()), short((counts / (len(x) * width)).tolist()), width


def margin_curve(fit: Fit, both: Sight, j: int, ends: tuple[float, float]) -> tuple[list[float], list[float]]:
    """The model's margin: differences of its distribution function where that is known, else of its draws."""
    draws, (low, high) = both.draws[:, j], ends
    if both.atoms[j]:
        values, counts = draws.unique(return_counts=True)
        inside = (values >= low) & (values <= high)
        return values[inside].tolist(), short((counts[inside] / len(draws)).tolist())
    grid = torch.linspace(low, high, _GRID, dtype=torch.float64, device="cpu")
    below = _distribution_function(fit, j, grid, both)
    if below is None:
        grid = torch.linspace(low, high, 62, dtype=torch.float64, device="cpu")
        below = torch.searchsorted(draws.sort().values, grid).double() / len(draws)
    density, middles = below.diff() / grid.diff(), (grid[1:] + grid[:-1]) / 2
    return short(middles.tolist()), short(density.tolist())


def _distribution_function(fit: Fit, j: int, grid: Tensor, both: Sight) -> Tensor | None:
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
