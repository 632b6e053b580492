"""Dispatch: the report of whatever a function of this library returned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot
from whichkl.distillation import Distillation
from whichkl.files.writing import is_report, write_whole
from whichkl.fitting import Fit
from whichkl.printable import printable
from whichkl.process.torch_modes import plain_modes
from whichkl.reporting.distillation_report import distillation_page
from whichkl.reporting.fit_report import fit_page
from whichkl.reporting.markdown import markdown
from whichkl.reporting.page import write_page
from whichkl.reporting.study_report import study_page
from whichkl.study import Study


@plain_modes()
def report(result: Any, path: str | os.PathLike[str]) -> Path:
    """Write the report of a fit, a study or a distillation as one HTML file; for a study also as Markdown next to it.

    Args:
        result: what `fit`, `compare` or `distill` returned.
        path: the HTML file.

    Raises:
        InputError: the result is none of these, or the `app` extra isn't installed.
        ResourceError: the file can't be written.
    """
    if isinstance(result, Fit):
        return write_page(path, *fit_page(result))
    if isinstance(result, Distillation):
        return write_page(path, *distillation_page(result))
    if isinstance(result, Study):
        page = study_page(result)
        write_whole(Path(path).with_suffix(".md"), printable(markdown(*page)).encode(), is_own=is_report)
        return write_page(path, *page)
    because = f"it is a `{type(result).__name__}`"
    raise InputError(cannot("report on this", because, "Pass what whichkl.fit, whichkl.compare or whichkl.distill returned"))
