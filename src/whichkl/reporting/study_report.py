"""The report of a study: verdict first, then its evidence, the fits over the target, what failed and the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributions import Distribution

from whichkl._checks import WhichklError
from whichkl.distillation.language.objective import LanguageObjective
from whichkl.distillation.language.target import LanguageTarget
from whichkl.fitting import Fit
from whichkl.plots import components_curve, pairs, plot
from whichkl.plots.arms import MAX_ARMS, differences, seeds, tradeoff
from whichkl.plots.curves import training
from whichkl.plots.style import with_heading
from whichkl.reporting.fit_report import TRAINING
from whichkl.reporting.page import Block, Page, Section, configuration_section
from whichkl.reporting.study_tables import arms_shown, comparison_table, cost_table, failures_table, needs_table, scorecard_tables
from whichkl.study import Study, Verdict
from whichkl.study.arms import arm_of
from whichkl.study.ledger import Stored
from whichkl.study.measures import NEEDS_OF_STUDENTS, columns_in, cost_of
from whichkl.study.paired import MIN_PAIRS
from whichkl.study.wording import listed

_MAX_FAILED_ARMS = 3
"""Largest number of failed arms that the verdict names with their errors."""
_HEADINGS = {
    "winner": "A winner",
    "no_detectable_difference": "No detectable difference",
    "depends": "It depends on what you need",
    "too_few_seeds": "No verdict",
    "failed": "No verdict",
}
_SEVERAL_LEAD = "Several arms lead, and no difference between them is detectable"
_HOW = (
    "All arms of a seed are scored on the same draws, which no fit has seen, and are compared in pairs. A difference is "
    "detected if the paired t test finds it after Holm's correction for the number of comparisons, and flipping the signs of "
    "the differences finds it too (p at most {level:.0%} each). It counts if it is also large enough to matter. With fewer than "
    "{fewest} seeds no test can find anything, and none is made. Each interval separately holds the true difference {share:.0%} "
    "of the time."
)
_BARS = "Bars are ± one standard error."
_FRONT = f"Filled points are on the Pareto front: no other arm is as good in all needs and in cost, and better in one. {_BARS}"
_WORDS = {"families": ("family", "families"), "objectives": ("objective", "objectives"), "seeds": ("seed", "seeds")}
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


def study_page(study: Study) -> Page:
    """Return the report of a study."""
    verdict = study.verdict
    failures, fits = failures_table(study), fits_section(study, verdict)
    note = "The cells, their fits and the tables are in the study's folder." if study.folder is not None else ""
    sections = [verdict_section(study), _scorecard(study, verdict)]
    if verdict.comparisons:
        sections.append(_certainty(verdict))
    if fits is not None:
        sections.append(fits)
    if failures is not None:
        lead = "They are counted, and never averaged away: an arm is compared over the seeds that it finished."
        sections.append(Section("Failed cells", lead, (failures,)))
    sections.append(configuration_section(study.config, "What was compared, with the versions of code and data.", note))
    source = str(study.config["target"]["source"])
    what = (
        "student"
        if source in NEEDS_OF_STUDENTS
        else "fit"
        if source[:1].isupper() and source.isidentifier()
        else f"fit of {source}"
    )
    title = f"Which {what} serves best?"
    footer = "Written by whichkl. KL divergences are in nats; ± is one standard error over seeds."
    return Page(title, _lead(study), sections, footer)


def _lead(study: Study) -> str:
    config, failed = study.config, len(study.failed)
    words = {**_WORDS, "families": ("student", "students")} if config["target"]["source"] in NEEDS_OF_STUDENTS else _WORDS
    families, objectives, numbers = (_counted(len(config[name]), *both) for name, both in words.items())
    unit = cost_of(study.rows).unit
    most = config["budget"]
    budget = f"with no limit of {unit}" if most is None else f"{most:,} {unit} a cell".replace(".0 ", " ")
    bad = f"{failed} of them failed" if failed else "none failed"
    planned = len(config["families"]) * len(config["objectives"]) * len(config["seeds"])
    missing = planned - len(study.cells)
    left = f" {missing:,} of {planned:,} weren't run." if missing > 0 else ""
    return f"{families}, {objectives} and {numbers}, {budget}: {_counted(len(study.cells), 'cell', 'cells')}, {bad}.{left}"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def verdict_section(study: Study, *, has_pictures: bool = True) -> Section:
    """State which arm to take for which need, and, if it `has_pictures`, draw what each arm trades for what."""
    verdict = study.verdict
    is_clear = verdict.outcome in ("winner", "depends", "no_detectable_difference")
    heading = _HEADINGS[verdict.outcome]
    if verdict.outcome == "no_detectable_difference" and len(verdict.winners) < sum(arm.finished > 0 for arm in verdict.arms):
        heading = _SEVERAL_LEAD
    blocks = [(Block.finding if is_clear else Block.warning)(verdict.sentence, heading)]
    for arm in [one for one in verdict.arms if one.failed][:_MAX_FAILED_ARMS]:
        text = f"{arm.name} failed in {arm.failed} of {arm.cells} seeds. The first error: {arm.error[:300]}"
        blocks.append(Block.warning(text, "Failed cells"))
    blocks += [*needs_table(verdict), *(_tradeoffs(study, verdict) if has_pictures else [])]
    blocks += [Block.sentence(note) for note in verdict.notes if " failed in " not in note]
    if study.config["target"]["source"] == LanguageTarget.source:
        rows = [(name, LanguageObjective.of(name).minimises) for name in study.config["objectives"]]
        blocks.append(Block.table(("objective", "minimises"), rows))
    dropped = [f"{arm} (after {count} seeds)" for arm, count in study.dropped]
    if dropped:
        blocks.append(Block.paragraph(f"Dropped by the pilot, and not judged: {', '.join(dropped)}."))
    return Section("The verdict", "What the experiment says, for each thing that you may need.", tuple(blocks))


def _tradeoffs(study: Study, verdict: Verdict) -> list[Block]:
    rows, blocks = [cell.row for cell in study.cells], []
    caption = _FRONT if verdict.front else _BARS
    both = tradeoff(rows, verdict, "forward_kl", "reverse_kl")
    if both is not None:
        blocks.append(Block.chart(both, f"Coverage against precision; both are best at the lower left. {caption}"))
    closeness = [name for name in ("jeffreys", "forward_kl", "reverse_kl") if any(row.get(name) is not None for row in rows)]
    # at equal FLOPs the time still differs
    axis = next((name for name in ("cpu_seconds",) if any(row.get(name) is not None for row in rows)), cost_of(rows).name)
    cost = tradeoff(rows, verdict, axis, closeness[0]) if closeness else None
    if cost is not None:
        blocks.append(Block.chart(cost, f"Cost against closeness.{'' if blocks else f' {caption}'}"))
    return blocks


def _scorecard(study: Study, verdict: Verdict) -> Section:
    shown = arms_shown(verdict)
    caption = "Means over the finished seeds, ± one standard error. ↓: lower is better; ↑: higher is better; –: not measured."
    if len(shown) < len(verdict.arms):
        caption += f" The first {len(shown)} of {len(verdict.arms):,} arms, those on the Pareto front first; table.csv has all."
    blocks = [*scorecard_tables(study, shown, caption), cost_table(verdict, shown)]
    rows = [cell.row for cell in study.cells if arm_of(cell.row) in set(shown)]
    figures = seeds(rows, columns_in("ranking"))
    if figures:
        first = f" The first {MAX_ARMS} arms." if len(shown) > MAX_ARMS else ""
        blocks.append(Block.charts(figures, f"A point per seed.{first}"))
    return Section("The scorecard", "How each arm did, on draws that no fit has seen.", tuple(blocks))


def _certainty(verdict: Verdict) -> Section:
    caption = (
        "The arm that leads for each need is at 0; the position of another arm is how much worse it is. Grey band: too small to "
        "matter. Orange: detectably worse. Grey points: not detectably worse."
    )
    how = _HOW.format(fewest=MIN_PAIRS, level=verdict.level, share=1 - verdict.level)
    blocks = [Block.paragraph(how), Block.charts(differences(verdict), caption)]
    blocks += [comparison_table(verdict, choice) for choice in verdict.choices]
    return Section("How sure that is", "Each difference, over the seeds that both arms finished.", tuple(blocks))


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
    curve, said = training(losses), "held-out −log q for each number of components; lower is better."
    components = [Block.chart(one, f"{name}: {said}") for name, fit in fits.items() if (one := components_curve(fit)) is not None]
    blocks = [*_figures(study, fits), *components, *([] if curve is None else [Block.chart(curve, TRAINING)])]
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
