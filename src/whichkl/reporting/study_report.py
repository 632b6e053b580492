"""The report of a study: verdict first, then its evidence, the fits over the target, what failed and the configuration."""

from __future__ import annotations

from whichkl.plots.arms import MAX_ARMS, differences, seeds, tradeoff
from whichkl.reporting.page import Block, Page, Section, configuration_section
from whichkl.reporting.study_fits import fits_section
from whichkl.reporting.study_tables import (
    arms_shown,
    comparison_table,
    cost_table,
    failures_table,
    needs_table,
    scorecard_tables,
)
from whichkl.study import Study
from whichkl.study.arms import arm_of
from whichkl.study.measures import COST, columns_in
from whichkl.study.paired import MIN_PAIRS
from whichkl.study.verdict import Verdict

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
_FRONT = (
    "Filled points are on the Pareto front: no other arm is as good in all needs and in cost, and better in one. Bars are ± one "
    "standard error."
)
_WORDS = {"families": ("family", "families"), "objectives": ("objective", "objectives"), "seeds": ("seed", "seeds")}


def study_page(study: Study) -> Page:
    """Return the report of a study."""
    verdict = study.verdict
    failures, fits = failures_table(study), fits_section(study, verdict)
    note = "The cells, their fits and the tables are in the study's folder." if study.folder is not None else ""
    sections = [_verdict(study, verdict), _scorecard(study, verdict)]
    if verdict.comparisons:
        sections.append(_certainty(verdict))
    if fits is not None:
        sections.append(fits)
    if failures is not None:
        lead = "They are counted, and never averaged away: an arm is compared over the seeds that it finished."
        sections.append(Section("Failed cells", lead, (failures,)))
    sections.append(configuration_section(study.config, "What was compared, with the versions of code and data.", note))
    source = str(study.config["target"]["source"])
    title = "Which fit serves best?" if source.isidentifier() and source[:1].isupper() else f"Which fit of {source} serves best?"
    footer = "Written by whichkl. KL divergences are in nats; ± is one standard error over seeds."
    return Page(title, _lead(study), sections, footer)


def _lead(study: Study) -> str:
    config, failed = study.config, len(study.failed)
    families, objectives, numbers = (_counted(len(config[name]), *words) for name, words in _WORDS.items())
    budget = "with no limit of evaluations" if config["budget"] is None else f"{config['budget']:,} evaluations a cell"
    bad = f"{failed} of them failed" if failed else "none failed"
    planned = len(config["families"]) * len(config["objectives"]) * len(config["seeds"])
    missing = planned - len(study.cells)
    left = f" {missing:,} of {planned:,} weren't run." if missing > 0 else ""
    return f"{families}, {objectives} and {numbers}, {budget}: {_counted(len(study.cells), 'cell', 'cells')}, {bad}.{left}"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _verdict(study: Study, verdict: Verdict) -> Section:
    is_clear = verdict.outcome in ("winner", "depends", "no_detectable_difference")
    heading = _HEADINGS[verdict.outcome]
    if verdict.outcome == "no_detectable_difference" and len(verdict.winners) < sum(arm.finished > 0 for arm in verdict.arms):
        heading = _SEVERAL_LEAD
    blocks = [(Block.finding if is_clear else Block.warning)(verdict.sentence, heading)]
    for arm in [one for one in verdict.arms if one.failed][:_MAX_FAILED_ARMS]:
        text = f"{arm.name} failed in {arm.failed} of {arm.cells} seeds. The first error: {arm.error[:300]}"
        blocks.append(Block.warning(text, "Failed cells"))
    blocks += [*needs_table(verdict), *_tradeoffs(study, verdict)]
    blocks += [Block.sentence(note) for note in verdict.notes if " failed in " not in note]
    dropped = [f"{arm} (after {count} seeds)" for arm, count in study.dropped]
    if dropped:
        blocks.append(Block.paragraph(f"Dropped by the pilot, and not judged: {', '.join(dropped)}."))
    return Section("The verdict", "What the experiment says, for each thing that you may need.", tuple(blocks))


def _tradeoffs(study: Study, verdict: Verdict) -> list[Block]:
    rows, blocks = [cell.row for cell in study.cells], []
    both = tradeoff(rows, verdict, "forward_kl", "reverse_kl")
    if both is not None:
        blocks.append(Block.chart(both, f"Coverage against precision; both are best at the lower left. {_FRONT}"))
    closeness = [name for name in ("jeffreys", "forward_kl", "reverse_kl") if any(row.get(name) is not None for row in rows)]
    cost = tradeoff(rows, verdict, COST.name, closeness[0]) if closeness else None
    if cost is not None:
        blocks.append(Block.chart(cost, f"Cost against closeness.{'' if blocks else f' {_FRONT}'}"))
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
