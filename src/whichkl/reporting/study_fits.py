"""The section of a study's report that shows fits: over the target, every optimum, and what each arm misses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributions import Distribution

from whichkl._checks import WhichklError
from whichkl.fitting import Fit
from whichkl.plots import components_curve, pairs, plot
from whichkl.plots.arms import training
from whichkl.plots.style import with_heading
from whichkl.reporting.page import Block, Section
from whichkl.reporting.study_tables import arms_shown
from whichkl.study import Study, Verdict
from whichkl.study.arms import arm_of
from whichkl.study.ledger import Stored
from whichkl.study.wording import listed

TRAINING = (
    "How the loss fell. For networks trained on rows: the lowest loss so far on rows set aside, per round; otherwise that of "
    "the best start, per iteration. It may rise where nodes were doubled, or where a first part of the rows was followed by "
    "all. Losses are up to the objective's constant."
)
_GREY = {True: "Grey: the target p.", False: "The target isn't available: report where the study was made."}
_OF_PAIRS = (
    "below the diagonal p, with the smallest regions that hold 50 % and 90 % of q; above it the same number of draws of q; on it "
    "both margins."
)
_OF_INTERVALS = "median and 95 % interval of each coordinate under q."
_OF_ONE = "dashed, its local optima"
_OF_TWO = "one and two standard deviations, or the regions of 50 % and 90 %; dotted, its other optima"
_MAX_FITS = 6
_MAX_PAIR_COLUMNS = 4
_MAX_LOSSES = 12


def fits_section(study: Study, verdict: Verdict) -> Section | None:
    """Show the fit of the first finished seed of each of the first arms; None where no cell has finished."""
    cells: dict[str, list[Stored]] = {}
    for cell in study.cells:
        if cell.row["status"] != "failed":
            cells.setdefault(arm_of(cell.row), []).append(cell)
    shown = [name for name in arms_shown(verdict) if name in cells]
    first = {name: cells[name][0] for name in shown}
    few = shown[:_MAX_FITS]
    fits = {name: fit for name in few if (fit := _fit(study, first[name])) is not None}
    losses = {name: [float(one) for one in first[name].details.get("training", [])] for name in few}
    curve = training(losses)
    blocks = [*_figures(study, fits), *_component_curves(fits), *([] if curve is None else [Block.chart(curve, TRAINING)])]
    blocks += [*_optima({name: cells[name] for name in shown}), *_missed(first)]
    more = f" of the first {len(fits)} of {len(cells):,} arms" if len(fits) < len(cells) else ""
    lead = f"The first finished seed{more}; study.fit(cell) returns any other."
    return Section("The fits", lead, tuple(blocks)) if blocks else None


def _fit(study: Study, cell: Stored) -> Fit | None:
    """Return the fit of a cell, over the study's target; None where it can't be read, as with a module of the user's own."""
    if cell.folder is None and not cell.files:
        return None
    try:
        return replace(study.fit(cell), target=study.target)
    except WhichklError:
        return None


def _figures(study: Study, fits: Mapping[str, Fit]) -> list[Block]:
    """Draw fits of one or two coordinates side by side, those of more below each other."""
    small: list[Any] = []
    wide: list[Block] = []
    for name, fit in fits.items():
        if not isinstance(fit.model, Distribution):
            continue
        if len(fit.names) > 2:
            figure = pairs(fit, _MAX_PAIR_COLUMNS)
            caption = _OF_INTERVALS if figure is None else _OF_PAIRS
            wide.append(Block.chart(figure or plot(fit), f"{name}: {caption}"))
        else:
            small.append(with_heading(plot(fit), name, 300))
    if not small:
        return wide
    lines = _OF_TWO if len(next(iter(fits.values())).names) == 2 else _OF_ONE
    return [Block.charts(small, f"{_GREY[study.target is not None]} Lines: q; {lines}."), *wide]


def _component_curves(fits: Mapping[str, Fit]) -> list[Block]:
    """Draw how held-out loss fell with the number of components, where a family chose it."""
    curves = {name: components_curve(fit) for name, fit in fits.items()}
    said = "held-out −log q for each number of components; lower is better."
    return [Block.chart(figure, f"{name}: {said}") for name, figure in curves.items() if figure is not None]


def _optima(cells: Mapping[str, list[Stored]]) -> list[Block]:
    rows = []
    for name, mine in cells.items():
        counts = sorted(len(cell.details.get("optima", [])) for cell in mine)
        if counts[-1] == 0:
            continue
        best = max(mine, key=lambda cell: len(cell.details.get("optima", [])))
        found: list[dict[str, Any]] = best.details["optima"]
        losses = [f"{float(one['loss']):.4f}{'' if one['is_global'] else ' (local)'}" for one in found[:_MAX_LOSSES]]
        more = f", and {len(found) - _MAX_LOSSES} more" if len(found) > _MAX_LOSSES else ""
        count = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        ended = sum(cell.row["status"] == "converged" for cell in mine)
        rows.append((name, count, ", ".join(losses) + more, f"{ended} of {len(mine)}"))
    caption = "Every distinct optimum of the seed that found most; losses are up to the objective's constant."
    return [Block.table(("arm", "optima a seed", "their losses", "converged"), rows, caption)] if rows else []


def _missed(cells: Mapping[str, Stored]) -> list[Block]:
    rows = []
    for name, cell in cells.items():
        missed = cell.details.get("coverage", {}).get("missed", [])
        if missed:
            parts = [f"{one['share']:.1%} about ({', '.join(f'{c:.3g}' for c in one['centre'][:4])})" for one in missed]
            rows.append((name, str(cell.row["seed"]), listed(parts)))
    caption = "Groups of at least 1 % of p's draws that lie where q never goes."
    return [Block.table(("arm", "seed", "what it misses"), rows, caption)] if rows else []
