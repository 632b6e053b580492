"""The report of one distillation: student against teacher first, then how it was trained and the exact configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path

from whichkl.distillation import Distillation
from whichkl.plots.distilled import loss_curve, reliability_curves
from whichkl.reporting.page import Block, Section, write_page


def report_distillation(result: Distillation, path: str | os.PathLike[str]) -> Path:
    """Write the report of a distillation as one HTML file.

    Raises:
        InputError: the `app` extra isn't installed.
        ResourceError: the file can't be written.
    """
    what = f"A student was trained on a teacher by {result.loss}."
    sections = [_scores(result), _training(result), _configuration(result)]
    return write_page(path, "Distillation", what, sections, "Written by whichkl. Divergences are in nats.")


def _scores(result: Distillation) -> Section:
    s = result.scores
    rows = []
    for name, one in result.contrasts:
        gap = "–" if one.difference is None else one.difference.number
        rows.append((name, one.student.number, one.teacher.number, gap))
    blocks = [Block.warning(f"{note[:1].upper()}{note[1:]}.", "note") for note in result.notes]
    if rows:
        blocks.append(
            Block.table(
                ("measure", "student", "teacher", "student − teacher"), rows, "± one standard error; differences in pairs."
            )
        )
    else:
        blocks.append(Block.paragraph("There were no labels, so that only student and teacher are compared."))
    between = [
        ("agreement", s.agreement.number, "share of examples in which both find the same class likeliest"),
        ("forward KL", s.forward_kl.number, "KL(teacher‖student): what the teacher holds possible and the student misses"),
        ("reverse KL", s.reverse_kl.number, "KL(student‖teacher): what the student holds possible and the teacher doesn't"),
    ]
    blocks.append(Block.table(("between the two", "number", "meaning"), between))
    figure = reliability_curves(result)
    if figure is not None:
        caption = "Predictions by their confidence; the larger a point, the more of them. On the dotted line confidence is right."
        blocks.append(Block.chart(figure, caption))
    lead = f"On {s.rows:,} examples that neither training nor stopping saw, at temperature 1."
    return Section("Student against teacher", lead, tuple(blocks))


def _training(result: Distillation) -> Section:
    ended = f"It {result.status} after {result.epochs} of {result.settings['epochs']} epochs"
    lead = f"{ended}; the weights are those of epoch {result.best_epoch}."
    return Section(
        "Training", lead, (Block.chart(loss_curve(result), "The loss; the dotted line marks the weights that were kept."),)
    )


def _configuration(result: Distillation) -> Section:
    fields = {name: value for name, value in result.to_dict().items() if name != "history"}
    fields["scores"] = {name: value for name, value in fields["scores"].items() if name != "reliability"}
    text = json.dumps({**fields, "student": str(result.student)}, indent=1, ensure_ascii=False)
    return Section("Exact configuration", "What it takes to do this again.", (Block.listing(text),))
