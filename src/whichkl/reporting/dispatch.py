"""Dispatch: the report of whatever a function of this library returned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot
from whichkl.distillation import Distillation
from whichkl.fitting import Fit
from whichkl.process.torch_modes import plain_modes
from whichkl.reporting.distillation_report import report_distillation
from whichkl.reporting.fit_report import report_fit
from whichkl.reporting.study_report import report_study
from whichkl.study import Study


@plain_modes()
def report(result: Any, path: str | os.PathLike[str]) -> Path:
    """Write the report of a fit, a study or a distillation as one HTML file; of a study also as Markdown beside it.

    Args:
        result: what `fit`, `compare` or `distill` returned.
        path: where to.

    Raises:
        InputError: the result is none of these, or the `app` extra isn't installed.
        ResourceError: the file can't be written.
    """
    if isinstance(result, Fit):
        return report_fit(result, path)
    if isinstance(result, Study):
        return report_study(result, path)
    if isinstance(result, Distillation):
        return report_distillation(result, path)
    because = f"it is a `{type(result).__name__}`"
    raise InputError(cannot("report on this", because, "Pass what whichkl.fit, whichkl.compare or whichkl.distill returned"))
