"""Dispatch: the report of whatever a function of this library returned; that of a distillation is here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot
from whichkl.distillation import Distillation, LanguageDistillation
from whichkl.files.writing import is_report, write_whole
from whichkl.fitting import Fit
from whichkl.plots.curves import loss_curve, reliability_curves
from whichkl.printable import as_sentence, printable
from whichkl.process.torch_modes import plain_modes
from whichkl.reporting.fit_report import fit_page
from whichkl.reporting.language_report import language_page
from whichkl.reporting.page import Block, Page, Section, configuration_section, markdown, write_page
from whichkl.reporting.study_report import study_page
from whichkl.study import Study


@plain_modes()
@typed
def report(result: Any, path: str | os.PathLike[str]) -> Path:
    """Write the report of a fit, a study or a distillation as one HTML file; for a study also as Markdown next to it.

    What a fit left out, so that judging costs no more than the fit, is measured first (`Fit.check`).

    Args:
        result: what `fit`, `compare`, `distill` or `language_model` returned.
        path: the HTML file.

    Raises:
        InputError: the result is none of these, or the `app` extra isn't installed.
        ResourceError: the file can't be written.
    """
    if isinstance(result, Fit):
        is_checked = result.parts is None or not result.diagnostics.left_out
        return write_page(path, *fit_page(result if is_checked else result.check()))
    if isinstance(result, Distillation):
        return write_page(path, *distillation_page(result))
    if isinstance(result, LanguageDistillation):
        return write_page(path, *language_page(result))
    if isinstance(result, Study):
        page = study_page(result)
        write_whole(Path(path).with_suffix(".md"), printable(markdown(*page)).encode(), is_own=is_report)
        return write_page(path, *page)
    because = f"it is a `{type(result).__name__}`"
    raise InputError(cannot("report on this", because, "Pass what whichkl.fit, whichkl.compare or whichkl.distill returned"))


def distillation_page(result: Distillation) -> Page:
    """Return the report of a distillation."""
    fields = {name: value for name, value in result.to_dict().items() if name != "history"}
    fields["scores"] = {name: value for name, value in fields["scores"].items() if name != "reliability"}
    configuration = configuration_section({**fields, "student": str(result.student)})
    what = f"A student was trained on a teacher by {result.loss}."
    sections = [scores_section(result), _training(result), configuration]
    return Page("Distillation", what, sections, "Written by whichkl. Divergences are in nats.")


def scores_section(result: Distillation, *, has_pictures: bool = True) -> Section:
    """Compare student and teacher on unseen examples, with the reliability diagram if it `has_pictures`."""
    s = result.scores
    blocks = [Block.warning(as_sentence(note), "note") for note in result.notes]
    rows = [
        (name, one.student.number, one.teacher.number, "–" if one.difference is None else one.difference.number)
        for name, one in result.contrasts
    ]
    if rows:
        columns = ("measure", "student", "teacher", "student − teacher")
        blocks.append(Block.table(columns, rows, "± one standard error; differences in pairs."))
    else:
        blocks.append(Block.paragraph("There were no labels, so that only student and teacher are compared."))
    between = [
        ("agreement", s.agreement.number, "share of examples in which both find the same class likeliest"),
        ("forward KL", s.forward_kl.number, "KL(teacher‖student): what the teacher holds possible and the student misses"),
        ("reverse KL", s.reverse_kl.number, "KL(student‖teacher): what the student holds possible and the teacher doesn't"),
    ]
    blocks.append(Block.table(("between the two", "number", "meaning"), between))
    figure = reliability_curves(result) if has_pictures else None
    if figure is not None:
        caption = "Accuracy against confidence; a larger point holds more predictions. On the dotted line confidence is right."
        blocks.append(Block.chart(figure, caption))
    lead = f"On {s.rows:,} examples that neither training nor stopping saw, at temperature 1."
    return Section("Student against teacher", lead, tuple(blocks))


def _training(result: Distillation) -> Section:
    ended = f"It {result.status} after {result.epochs} of {result.settings['epochs']} epochs"
    chart = Block.chart(loss_curve(result), "The loss; the dotted line marks the weights that were kept.")
    return Section("Training", f"{ended}; the weights are those of epoch {result.best_epoch}.", (chart,))
