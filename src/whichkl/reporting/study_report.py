"""The report of a study: verdict first, then what it rests on, the fits over the target, what failed and the configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from whichkl._checks import plain
from whichkl.files.writing import is_report, write_whole
from whichkl.plots.arms import MOST, differences, seeds, tradeoff
from whichkl.printable import printable
from whichkl.reporting.markdown import markdown
from whichkl.reporting.page import Block, Section, write_page
from whichkl.reporting.study_fits import fits_section
from whichkl.reporting.study_tables import arms_shown, comparison_rows, cost_rows, failure_rows, need_rows, scorecard_rows
from whichkl.study import Study
from whichkl.study.arms import arm_of
from whichkl.study.needs import COST
from whichkl.study.paired import FEWEST
from whichkl.study.verdict import Verdict

_LONGEST = 100_000
"""Characters of the configuration that a page shows."""
_MEASURED = ("jeffreys", "forward_kl", "reverse_kl", "interval_gap", "coverage", "ess_q")
_HEADINGS = {
    "winner": "A winner",
    "no_detectable_difference": "No detectable difference",
    "depends": "It depends on what you need",
    "too_few_seeds": "No verdict",
    "failed": "No verdict",
}
_HOW = (
    "All arms of a seed are scored on the same draws, which no fit has seen, and are compared in pairs. A difference is detected "
    "where the paired t test finds it after Holm's correction for the number of comparisons, and flipping the signs of the "
    "differences does too (p at most {level:.0%} each); it counts where it is also large enough to matter. Under {fewest} seeds "
    "no test can find anything, and none is made. Intervals hold {share:.0%} of the time, each for itself."
)
_FRONT = (
    "Filled points are on the Pareto front: no other arm is as good in all needs and in cost, and better in one. Bars are ± one "
    "standard error."
)


def report_study(study: Study, path: str | os.PathLike[str]) -> Path:
    """Write the report of a study as one HTML file, and the same tables as Markdown beside it.

    Raises:
        InputError: the `app` extra isn't installed.
        ResourceError: a file can't be written.
    """
    verdict = study.verdict
    found = [
        _verdict(study, verdict),
        _scorecard(study, verdict),
        _certainty(study, verdict),
        fits_section(study, verdict),
        _failures(study, verdict),
        _configuration(study),
    ]
    sections = [one for one in found if one is not None]
    source = str(study.config["target"]["source"])
    title = "Which fit serves best?" if source.isidentifier() and source[:1].isupper() else f"Which fit of {source} serves best?"
    footer = "Written by whichkl. KL divergences are in nats; ± is one standard error over seeds."
    where = Path(path)
    text = printable(markdown(title, _lead(study), sections, footer))
    write_whole(where.with_suffix(".md"), text.encode(), is_own=is_report)
    return write_page(where, title, _lead(study), sections, footer)


def _lead(study: Study) -> str:
    config, failed = study.config, len(study.failed)
    parts = [_counted(len(config[name]), *words) for name, words in _WORDS.items()]
    budget = "with as many evaluations as each wants" if config["budget"] is None else f"{config['budget']:,} evaluations a cell"
    bad = f"{failed} of them failed" if failed else "none failed"
    planned = len(config["families"]) * len(config["objectives"]) * len(config["seeds"])
    missing = planned - len(study.cells)
    left = f" {missing:,} of {planned:,} weren't run." if missing > 0 else ""
    return f"{', '.join(parts[:2])} and {parts[2]}, {budget}: {_counted(len(study.cells), 'cell', 'cells')}, {bad}.{left}"


_WORDS = {"families": ("family", "families"), "objectives": ("objective", "objectives"), "seeds": ("seed", "seeds")}


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _verdict(study: Study, verdict: Verdict) -> Section:
    is_clear = verdict.outcome in ("winner", "depends", "no_detectable_difference")
    make = Block.finding if is_clear else Block.warning
    heading = _HEADINGS[verdict.outcome]
    if verdict.outcome == "no_detectable_difference" and len(verdict.winners) < sum(arm.finished > 0 for arm in verdict.arms):
        heading = "Several arms lead, and no difference between them is detectable"
    blocks = [make(verdict.sentence, heading)]
    for arm in [one for one in verdict.arms if one.failed][:3]:
        text = f"{arm.name} failed in {arm.failed} of {arm.cells} seeds, the first time so: {arm.error[:300]}"
        blocks.append(Block.warning(text, "Failed cells"))
    rows = need_rows(verdict)
    if rows:
        columns = ("you need", "that is", "take", "by")
        blocks.append(Block.table(columns, rows, "Where several arms are named, the study can't tell them apart."))
    blocks += _tradeoffs(study, verdict)
    blocks += [Block.paragraph(note) for note in verdict.notes if " failed in " not in note]
    dropped = [f"{arm} (after {count} seeds)" for arm, count in study.dropped]
    if dropped:
        blocks.append(Block.paragraph(f"Dropped by the pilot, and not judged: {', '.join(dropped)}."))
    return Section("The verdict", "What the experiment says, for each thing that you may need.", tuple(blocks))


def _tradeoffs(study: Study, verdict: Verdict) -> list[Block]:
    rows, blocks = [cell.row for cell in study.cells], []
    both = tradeoff(rows, verdict, "forward_kl", "reverse_kl")
    if both is not None:
        blocks.append(Block.chart(both, f"Coverage against precision; both are best at the lower left. {_FRONT}"))
    total = next(
        (name for name in ("jeffreys", "forward_kl", "reverse_kl") if any(row.get(name) is not None for row in rows)), None
    )
    cost = None if total is None else tradeoff(rows, verdict, COST, total)
    if cost is not None:
        blocks.append(Block.chart(cost, f"What an arm costs against what it comes to.{'' if blocks else f' {_FRONT}'}"))
    return blocks


def _scorecard(study: Study, verdict: Verdict) -> Section:
    shown = arms_shown(verdict)
    more = (
        f" The first {len(shown)} of {len(verdict.arms):,} arms, those on the Pareto front before the others; table.csv has all."
    )
    caption = "Means over the finished seeds, ± one standard error. – : not measured, or not allowed by the access."
    blocks = []
    for columns, rows in scorecard_rows(study, shown):
        blocks.append(Block.table(columns, rows, caption + (more if len(shown) < len(verdict.arms) else "")))
        caption, more = "", ""
    blocks.append(Block.table(("arm", "evaluations", "finished", "failed", "stopped early"), cost_rows(verdict, shown)))
    some = [cell.row for cell in study.cells if arm_of(cell.row) in set(shown)]
    figures = seeds(some, [name for name in _MEASURED if any(row.get(name) is not None for row in some)])
    if figures:
        first = f" The first {MOST} arms." if len(shown) > MOST else ""
        blocks.append(Block.charts(figures, f"A point for each seed.{first}"))
    return Section("The scorecard", "How each arm did, on draws that no fit has seen.", tuple(blocks))


def _certainty(study: Study, verdict: Verdict) -> Section | None:
    if not verdict.comparisons:
        return None
    caption = (
        "The arm that leads for each need is at 0; the others are as much worse as their points say. Grey band: too small to "
        "matter. Orange: detectably worse. Grey points: not told apart from the leader."
    )
    how = _HOW.format(fewest=FEWEST, level=verdict.level, share=1 - verdict.level)
    blocks = [Block.paragraph(how), Block.charts(differences(verdict), caption)]
    for choice in verdict.choices:
        rows, left = comparison_rows(verdict, choice.need)
        note = f" The {len(rows)} nearest; {left:,} more are in study.verdict.comparisons." if left else ""
        columns = (choice.need, "worse by", "interval", "pairs", "p (Holm)", "p (signs)", "says")
        blocks.append(Block.table(columns, rows, f"Beside {choice.leader}, which leads for {choice.need}.{note}"))
    return Section("How sure that is", "Each difference, over the seeds that both arms finished.", tuple(blocks))


def _failures(study: Study, verdict: Verdict) -> Section | None:
    rows, left = failure_rows(study)
    if not rows:
        return None
    note = f"{left:,} more are in table.csv." if left else ""
    table = Block.table(("arm", "cells", "seeds", "error"), rows, note)
    lead = "They are counted, and never averaged away: an arm is compared over the seeds that it finished."
    return Section("Failed cells", lead, (table,))


def _configuration(study: Study) -> Section:
    text = json.dumps(plain(study.config), indent=1, ensure_ascii=False)
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + f"\n… {len(text) - _LONGEST:,} more characters; study.json has all."
    blocks: tuple[Any, ...] = (Block.listing(text),)
    if study.folder is not None:
        blocks = (Block.paragraph("The cells, their fits and the tables lie in the study's folder."), *blocks)
    return Section("Exact configuration", "What was compared, with the versions of code and data.", blocks)
