"""Dispatch: which figure shows a fit, or several fits of one target over each other."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot
from whichkl.fitting import Fit
from whichkl.plots.fitted import (
    add_ellipses,
    add_regions,
    add_rows,
    add_target_area,
    add_target_bars,
    density,
    figure_of,
    gaussian_parts,
    grid_over,
    intervals,
    on_equal_axes,
    shares,
)
from whichkl.plots.rows import RowsAndDraws, data, draws
from whichkl.plots.style import COLORS, MAX_LEGEND_LENGTH, Figure, add_line, new_figure, style
from whichkl.printable import shorten
from whichkl.process.torch_modes import plain_modes
from whichkl.samples import Block

_CYCLE = ("forward_kl", "reverse_kl", "other", "jeffreys")
"""Colours of fits of which several have the same objective."""
_DASHES = ("solid", "dash", "dot", "dashdot")


@plain_modes()
def plot(fit: Any) -> Figure:
    """Draw a fit, or a list of fits of one target over each other.

    One dimension has density curves, two have points with ellipses or regions, more have intervals; a fit of q(y|x) has its
    predictions. Coordinates whose intervals differ much in length have an axis each, and two coordinates have one scale, unless
    their spreads differ by more than a factor of four.

    Args:
        fit: what `fit` returned, or several of them: their legends name what differs, objective or family.

    Raises:
        InputError: it isn't a fit, plotly isn't installed, a conditional fit has lost its rows, or the fits of a list are of
            different coordinates or conditional.

    >>> from whichkl import fit, problems
    >>> both = [fit(problems.bimodal(), objective=name) for name in ("forward_kl", "reverse_kl")]
    >>> [one.name for one in plot(both).data]
    ['target p', 'forward_kl', 'reverse_kl']
    """
    if isinstance(fit, Fit):
        return figure_of(fit)
    fits = list(fit) if isinstance(fit, (list, tuple)) else []
    if not fits or not all(isinstance(one, Fit) for one in fits):
        what = "an empty list" if fit in ([], ()) else f"a `{type(fit).__name__}`{' that holds something else' if fits else ''}"
        raise InputError(cannot("draw this", f"it is {what}", "Pass what whichkl.fit returned, or a list of that"))
    for one in fits:
        if one.names != fits[0].names or not isinstance(one.model, Distribution):
            names = [", ".join(each.names[:4]) for each in (fits[0], one)]
            because = "one is a conditional model" if names[0] == names[1] else f"one is of {names[0]}, another of {names[1]}"
            raise InputError(cannot("draw these fits together", because, "Draw each with whichkl.plot"))
    labelled = dict(zip(_labels(fits), fits, strict=True))
    colors = dict(zip(labelled, _colors(fits), strict=True))
    rows = next((block for one in fits if (block := data(one, 5_000)) is not None), None)
    dim = len(fits[0].names)
    if dim == 1:
        return _on_the_line(labelled, colors, rows)
    return _on_the_plane(labelled, colors, rows) if dim == 2 and fits[0].bijection.is_real else intervals(labelled, colors)


def _labels(fits: Sequence[Fit]) -> list[str]:
    """Return what differs between the fits: the objective, the family, or only their number."""
    parts = [[fit.objective.spec for fit in fits], [str(fit.family) for fit in fits]]
    differing = [part for part in parts if len(set(part)) > 1]
    labels = [shorten(", ".join(one), 2 * MAX_LEGEND_LENGTH) for one in zip(*differing, strict=True)] or [parts[0][0]] * len(fits)
    return labels if len(set(labels)) == len(fits) else [f"{label} ({i})" for i, label in enumerate(labels, 1)]


def _colors(fits: Sequence[Fit]) -> list[str]:
    own = [fit.objective.name for fit in fits]
    is_distinct = len({COLORS[name] for name in own}) == len(fits)
    return own if is_distinct else [_CYCLE[i % len(_CYCLE)] for i in range(len(fits))]


def _on_the_line(fits: dict[str, Fit], colors: dict[str, str], rows: Block | None) -> Figure:
    first, drawn = next(iter(fits.values())), {label: draws(fit, fit.model)[:, 0] for label, fit in fits.items()}
    if rows is not None and RowsAndDraws(rows.x, torch.cat(list(drawn.values()))[:, None], first.names).has_atoms[0]:
        return shares(first, rows.x[:, 0], drawn, list(colors.values()))
    figure, x = new_figure(), grid_over(first, list(drawn.values()))
    add_target_area(figure, first, x)
    for i, (label, fit) in enumerate(fits.items()):
        dash = _DASHES[i // len(_CYCLE) % len(_DASHES)]
        add_line(figure, x.tolist(), density(fit.model, x), colors[label], label, width=2.5, dash=dash)
    add_target_bars(figure, first, rows)
    return style(figure, html.escape(first.names[0]), "density")


def _on_the_plane(fits: dict[str, Fit], colors: dict[str, str], rows: Block | None) -> Figure:
    figure = new_figure()
    add_rows(figure, rows)
    for label, fit in fits.items():
        if gaussian_parts(fit.diagnostics.optima[0].model):
            add_ellipses(figure, fit, colors[label], label, has_others=False)
        else:
            add_regions(figure, fit, colors[label], label, rows)
    return on_equal_axes(figure, next(iter(fits.values())), rows)
