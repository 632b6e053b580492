"""Margins: a histogram of each column with the model's margin over it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl.fitting import Fit
from whichkl.goodness.margin_laws import margins as margin_laws
from whichkl.plots.rows import RowsAndDraws, rows_and_draws
from whichkl.plots.style import Figure, add_bars, add_line, add_points, new_figure, short, small

MAX_MARGINS = 12
_GRID_POINTS = 161


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
        figure.update_yaxes(rangemode="tozero", nticks=5)
        figures.append(figure)
    return figures


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
        values, counts = draws.unique(return_counts=True)
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
