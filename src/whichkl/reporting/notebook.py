"""Notebook: results as HTML for Jupyter: the sentence of trust, the table, the picture; nothing is fetched."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Any

from whichkl.advice import Advice
from whichkl.distillation import Distillation, HeldOutLoss, LanguageDistillation, SequenceKL
from whichkl.distillation.audit.result import Audit
from whichkl.divergences import Estimate
from whichkl.divergences.estimate import TABLE_HEADS
from whichkl.fitting import Fit
from whichkl.fitting.summary import Summary
from whichkl.objectives import OBJECTIVES
from whichkl.printable import as_sentence
from whichkl.reporting.dispatch import scores_section
from whichkl.reporting.fit_report import summary_block
from whichkl.reporting.fit_report import verdict_section as fit_verdict
from whichkl.reporting.language_report import held_out_section, language_verdict, sequence_section
from whichkl.reporting.page import Block, Section, chart_json, html_prose, html_table, html_text, plotly_script
from whichkl.reporting.study_report import verdict_section as study_verdict
from whichkl.reporting.study_tables import arms_shown, scorecard_tables
from whichkl.study import Study

_PLOTLY_HERE: set[str] = set()
"""Holds one entry once a kernel has shown Plotly's script, of 5 MB, which later outputs of the notebook use."""


def html_of(result: Any) -> str:
    """Return a result as HTML that reads on light and dark pages; without plotly it has no picture.

    In a notebook the first picture contains Plotly's script, and later ones use it.
    """
    section = _section(result)
    lead = [f'<p class="lead">{html_prose(section.lead)}</p>'] if section.lead else []
    parts = [*lead, *map(_block, section.blocks)]
    style = f"<style>{(files('whichkl.reporting') / 'notebook.css').read_text()}</style>"
    script = _plotly() if any(block.figures for block in section.blocks) else ""
    return f'<div class="whichkl">{style}{script}{"".join(parts)}</div>'


def _section(result: Any) -> Section:
    if isinstance(result, Fit):
        return _drawn(fit_verdict, result)
    if isinstance(result, Study):
        return _drawn(_study, result)
    if isinstance(result, Distillation):
        return _drawn(scores_section, result)
    if isinstance(result, LanguageDistillation):
        return _drawn(language_verdict, result)
    if isinstance(result, Summary):
        return Section("", "", (summary_block(result),))
    kinds: dict[type, Callable[[Any], Section]] = {Advice: _advice, Audit: _audit, Estimate: _estimate}
    kinds |= {SequenceKL: sequence_section, HeldOutLoss: held_out_section}
    text = Section("", "", (Block.listing(str(result)),))
    return next((make(result) for kind, make in kinds.items() if isinstance(result, kind)), text)


def _drawn(make: Callable[..., Section], result: Any) -> Section:
    """Return a section with its pictures; without them if plotly is missing, or they can't be drawn."""
    try:
        return make(result)
    except Exception:
        return make(result, has_pictures=False)


def _study(study: Study, *, has_pictures: bool = True) -> Section:
    section, verdict = study_verdict(study, has_pictures=has_pictures), study.verdict
    caption = "Means over the finished seeds, ± one standard error. ↓: lower is better; ↑: higher is better."
    scores = scorecard_tables(study, arms_shown(verdict), caption)[:1]
    first = [one for one in section.blocks if not one.figures]
    return replace(section, lead=verdict.sentence, blocks=(*first[1:], *scores, *(one for one in section.blocks if one.figures)))


def _advice(advice: Advice) -> Section:
    rows = [(one.objective.name, f"possible: {one.reason}", one.solver) for one in advice.options]
    rows += [(name, f"not possible: {why}", "–") for name, why in advice.missing.items()]
    shown = [(name, OBJECTIVES[name].formula, *rest) for name, *rest in rows]
    table = Block.table(("objective", "minimises", "possible", "solver"), shown)
    blocks = [Block.paragraph(advice.verdict), table]
    blocks += [Block.paragraph(f"Cheapest access to acquire: {advice.cheapest}")] if advice.cheapest else []
    return Section("", advice.situation, tuple(blocks))


def _audit(audit: Audit) -> Section:
    outcomes = {"pass": "pass", "not applicable": "–"}
    rows = [(one.name, one.grade or outcomes[one.outcome], one.seen, one.change or "–") for one in audit.checks]
    found = ", ".join(sorted(audit.findings)).replace("_", " ") or "none"
    make, label = (Block.finding, "Passed") if audit.passed else (Block.warning, "Not passed")
    verdict = make(f"findings: {found}.", label)
    table = Block.table(("check", "outcome", "what the loss did", "what to change"), rows)
    return Section("", f"{audit.subject} is {audit.identified}.", (verdict, table))


def _estimate(one: Estimate) -> Section:
    table = Block.table(TABLE_HEADS, [one.cells])
    notes = [Block.sentence(note) if one.reliable else Block.warning(as_sentence(note), "note") for note in one.notes]
    return Section("", one.sentence, (table, *notes))


def _block(block: Block) -> str:
    if block.kind == "table":
        caption = f'<p class="small">{html_prose(block.text)}</p>' if block.text else ""
        return f'<div class="scroll">{html_table(block)}</div>{caption}'
    if block.kind in ("finding", "warning"):
        return f'<p class="{block.kind}"><b>{html_text(block.label)}</b>: {html_prose(block.text)}</p>'
    if block.kind in ("chart", "charts"):
        boxes = "".join(map(_chart, block.figures))
        grid = f'<div class="grid">{boxes}</div>' if len(block.figures) > 1 else boxes
        return f'{grid}<p class="small">{html_prose(block.text)}</p>'
    tag = "pre" if block.kind == "listing" else "p"
    return f"<{tag}>{html_prose(block.text)}</{tag}>"


def _chart(figure: Any) -> str:
    """Return a box for a picture, and the script that draws it in the colour of the page's text."""
    name, script = f"whichkl-{secrets.token_hex(8)}", (files("whichkl.reporting") / "notebook.js").read_text().strip()
    height = int(figure.layout.height or 340)
    drawing = f"{script}(0, {json.dumps(name)}, {chart_json(figure)});"
    return f'<div class="chart" id="{name}" style="height:{height}px"></div><script>{drawing}</script>'


def _plotly() -> str:
    if "ipykernel" in sys.modules and "google.colab" not in sys.modules:  # Colab shows every output in a frame of its own
        if _PLOTLY_HERE:
            return ""
        _PLOTLY_HERE.add("shown")
    return f"<script>{plotly_script()}</script>"
