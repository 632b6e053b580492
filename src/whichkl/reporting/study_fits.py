"""The section of a study's report that shows fits: over the target, every optimum, and what each arm misses."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributions import Distribution

from whichkl._checks import WhichklError
from whichkl.fitting import Fit
from whichkl.plots import components_curve, pairs, plot
from whichkl.plots.arms import training
from whichkl.reporting.page import Block, Section
from whichkl.reporting.study_tables import MOST_ARMS, arms_shown
from whichkl.study import Study, Verdict
from whichkl.study.arms import arm_of
from whichkl.study.ledger import Stored
from whichkl.study.wording import listed

MOST_FITS = 6
TRAINING = (
    "How the loss fell: of networks trained on rows the least so far on rows set aside, round by round; else that of the best "
    "start, iteration by iteration. It may rise where nodes were doubled, or where all rows followed some. Losses are up to the "
    "objective's constant."
)
_MOST_PAIRS = 4
_MOST_LOSSES = 12


def fits_section(study: Study, verdict: Verdict) -> Section | None:
    """Show the fit of the first finished seed of each of the first arms; None where no cell has finished."""
    cells: dict[str, Stored] = {}
    everything: dict[str, list[Stored]] = {}
    for cell in study.cells:
        if cell.row["status"] != "failed":
            cells.setdefault(arm_of(cell.row), cell)
            everything.setdefault(arm_of(cell.row), []).append(cell)
    shown = [name for name in arms_shown(verdict) if name in cells]
    if not shown:
        return None
    fits = {name: fit for name in shown[:MOST_FITS] if (fit := _fit(study, cells[name])) is not None}
    blocks = [*_figures(study, fits), *_curves(fits), *_trained({name: cells[name] for name in shown[:MOST_FITS]})]
    blocks += _optima({name: everything[name] for name in shown})
    blocks += _missed({name: cells[name] for name in shown})
    more = f" of the first {len(fits)} of {len(cells):,} arms" if len(fits) < len(cells) else ""
    lead = f"The first finished seed{more}; study.fit(cell) has any other."
    return Section("The fits", lead, tuple(blocks)) if blocks else None


def _fit(study: Study, cell: Stored) -> Fit | None:
    """The fit behind a cell, over the study's target; None where it can't be read, as of a module of the user's own."""
    if cell.folder is None and not cell.files:
        return None
    try:
        return replace(study.fit(cell), target=study.target)
    except WhichklError:
        return None


def _figures(study: Study, fits: Mapping[str, Fit]) -> list[Block]:
    small: list[Any] = []
    wide: list[Block] = []
    for name, fit in fits.items():
        if not isinstance(fit.model, Distribution):
            continue
        many = len(fit.names) > 2
        figure = (pairs(fit, _MOST_PAIRS) if many else None) or plot(fit)
        if many:
            wide.append(Block.chart(figure, f"{name}: {_SAID_OF_PAIRS if figure.layout.meta else _SAID_OF_INTERVALS}"))
            continue
        heading = {"text": html.escape(name), "font": {"size": 13}, "x": 0.02, "xanchor": "left", "y": 0.98, "yanchor": "top"}
        figure.update_layout(title=heading, showlegend=False, height=300, margin={"l": 10, "r": 10, "t": 34, "b": 10})
        small.append(figure)
    if not small:
        return wide
    planar = len(next(iter(fits.values())).names) == 2
    grey = "Grey: the target p." if study.target is not None else "The target isn't at hand: report where the study was made."
    said = (
        "one and two standard deviations, or the regions of 50 % and 90 %; dotted, its other optima"
        if planar
        else "dashed, its local optima"
    )
    return [Block.charts(small, f"{grey} Lines: q; {said}."), *wide]


_SAID_OF_PAIRS = (
    "below the diagonal p, with the smallest regions that hold 50 % and 90 % of q; above it as many draws of q; on it both "
    "margins."
)
_SAID_OF_INTERVALS = "median and 95 % interval of each coordinate under q."


def _curves(fits: Mapping[str, Fit]) -> list[Block]:
    """How held-out loss fell with the number of components, where a family chose it."""
    blocks = []
    for name, fit in fits.items():
        figure = components_curve(fit)
        if figure is not None:
            blocks.append(Block.chart(figure, f"{name}: held-out −log q for each number of components; lower is better."))
    return blocks


def _trained(cells: Mapping[str, Stored]) -> list[Block]:
    histories = {name: [float(one) for one in cell.details.get("training", [])] for name, cell in cells.items()}
    figure = training(histories)
    return [] if figure is None else [Block.chart(figure, TRAINING)]


def _optima(cells: Mapping[str, list[Stored]]) -> list[Block]:
    rows = []
    for name, mine in cells.items():
        counts = sorted(len(cell.details.get("optima", [])) for cell in mine)
        if not counts or counts[-1] == 0:
            continue
        best = max(mine, key=lambda cell: len(cell.details.get("optima", [])))
        found: list[dict[str, Any]] = best.details["optima"]
        losses = [f"{_loss(one['loss'])}{' (local)' if not one['is_global'] else ''}" for one in found[:_MOST_LOSSES]]
        more = f", and {len(found) - _MOST_LOSSES} more" if len(found) > _MOST_LOSSES else ""
        count = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        ended = sum(cell.row["status"] == "converged" for cell in mine)
        rows.append((name, count, ", ".join(losses) + more, f"{ended} of {len(mine)}"))
    if not rows:
        return []
    caption = "Every distinct optimum of the seed that found most; losses are up to the objective's constant."
    return [Block.table(("arm", "optima a seed", "their losses", "converged"), rows[:MOST_ARMS], caption)]


def _missed(cells: Mapping[str, Stored]) -> list[Block]:
    rows = []
    for name, cell in cells.items():
        missed = cell.details.get("coverage", {}).get("missed", [])
        if missed:
            parts = [f"{one['share']:.1%} about ({', '.join(f'{c:.3g}' for c in one['centre'][:4])})" for one in missed]
            rows.append((name, str(cell.row["seed"]), listed(parts)))
    caption = "Groups of at least 1 % of p's draws that lie where q never goes."
    return [Block.table(("arm", "seed", "what it misses"), rows, caption)] if rows else []


def _loss(value: Any) -> str:
    return f"{float(value):.4f}"
