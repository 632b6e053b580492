"""Dispatch: which figure shows a fit, or several fits of one target over each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributions import Distribution

from whichkl._checks import InputError, cannot
from whichkl.fitting import Fit
from whichkl.plots.fitted import Layer, figure_of, figure_of_layers
from whichkl.plots.rows import data
from whichkl.plots.style import COLORS, MAX_LEGEND_LENGTH, Figure
from whichkl.printable import shorten
from whichkl.process.torch_modes import plain_modes

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
        what = f"a `{type(fit).__name__}`{' that holds something else' if fits else ''}"
        what = "an empty list" if isinstance(fit, (list, tuple)) and not fit else what
        raise InputError(cannot("draw this", f"it is {what}", "Pass what whichkl.fit returned, or a list of that"))
    for one in fits:
        if one.names != fits[0].names or not isinstance(one.model, Distribution):
            names = [", ".join(each.names[:4]) for each in (fits[0], one)]
            because = "one is a conditional model" if names[0] == names[1] else f"one is of {names[0]}, another of {names[1]}"
            raise InputError(cannot("draw these fits together", because, "Draw each with whichkl.plot"))
    rows = next((block for one in fits if (block := data(one, 5_000)) is not None), None)
    looks = zip(_labels(fits), fits, _colors(fits), strict=True)
    dashes = [_DASHES[i // len(_CYCLE) % len(_DASHES)] for i in range(len(fits))]
    return figure_of_layers(
        [Layer(name, one, one.model, color, dash) for (name, one, color), dash in zip(looks, dashes, strict=True)], rows
    )


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
