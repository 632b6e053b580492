"""Results folder: what is checked before the work, and how a result is saved, printed and reported after it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, ResourceError, WhichklError, cannot, require
from whichkl.commands import console, exits
from whichkl.files.writing import is_demo, is_report, refuse_foreign
from whichkl.process.memory import shown_bytes

_LEAST_FREE = 16 * 10**6
"""Free bytes that a disk must have before the work begins: a report with plotly in it takes 5 MB, and is written twice."""
_IS_OWN = {"report.html": is_report, "report.md": is_report, "report.json": is_demo}
"""By which content a file of this name is known to be whichkl's own."""


def check_results_folder(folder: Path, *files: str) -> None:
    """Refuse, before the work, a folder that its report couldn't be written to.

    Args:
        folder: what `--out` names.
        files: names of files that will be written there.

    Raises:
        InputError: a package that reports need isn't installed, or a file's name is taken by something that whichkl didn't write.
        ResourceError: the disk is nearly full.
    """
    exits.KEPT.folder = folder
    for module in ("plotly", "jinja2", "markupsafe"):
        require(module, "app")
    for name in files:
        if (folder / name).is_dir():
            because = "it is a folder"
            raise InputError(cannot(f"write `{folder / name}`", because, "Move it away, or name another folder with `--out`"))
        refuse_foreign(folder / name, _IS_OWN.get(name, lambda content: True))
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free < _LEAST_FREE:
        because = f"its disk has {shown_bytes(free)} left, and the report alone takes 5 MB"
        raise ResourceError(cannot(f"write to `{folder}`", because, "Free some space, or name another folder with `--out`"))


def deliver(save: Callable[[], None] | None, saved: str, show: Callable[[], None]) -> None:
    """Save a result and print it; it is printed too where it can't be saved.

    Args:
        save: writes the result; None where there is no folder.
        saved: sentence that says so, for the case that something fails later.
        show: prints the result.

    Raises:
        WhichklError: the result couldn't be saved.
    """
    failure: Exception | None = None
    if save is not None:
        try:
            save()
            exits.KEPT.saved.append(saved)
        except (WhichklError, OSError) as error:
            failure = error
    show()
    if failure is not None:
        raise failure


def write_report(result: Any, page: Path, *, quiet: bool) -> None:
    """Write the report of a result that has been printed, and name it unless `quiet`.

    Raises:
        ResourceError: it can't be written.
    """
    with console.ERR.status("writing the report", spinner="line"):
        from whichkl.reporting import report

        report(result, page)
    if not quiet:
        console.say(f"Report: {page}")
