"""Results folder: what `--out` names is checked before the work; afterwards the result is saved, printed and reported."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whichkl._checks import InputError, ResourceError, WhichklError, cannot, require
from whichkl.commands import console, exits
from whichkl.files.locks import locked
from whichkl.files.writing import check_writable, is_demo, is_report, refuse_foreign
from whichkl.process.memory import shown_bytes

if TYPE_CHECKING:
    from whichkl.files.saving import Saved

_MIN_FREE_BYTES = 16 * 10**6
"""Bytes that must be free before the work begins: a report with plotly in it takes 5 MB, and is written twice."""
_IS_OWN = {"report.html": is_report, "report.md": is_report, "report.json": is_demo}
"""Tests of content by file name: they recognise a file that whichkl wrote."""


def check_results_folder(folder: Path, *files: str) -> None:
    """Refuse a folder before the work if its report couldn't be written there.

    Args:
        folder: what `--out` names.
        files: names of files that will be written there.

    Raises:
        InputError: a package that reports need isn't installed, or whichkl didn't write a file of that name.
        ResourceError: the folder can't be written, or the disk is nearly full.
    """
    check_writable(folder)
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
    if free < _MIN_FREE_BYTES:
        because = f"its disk has {shown_bytes(free)} left, and the report alone takes 5 MB"
        raise ResourceError(cannot(f"write to `{folder}`", because, "Free some space, or name another folder with `--out`"))


def prepare_results(saved: Saved, folder: Path) -> None:
    """Refuse a folder in which a result can't be saved, and say so if an earlier result will be replaced.

    Raises:
        InputError: the folder is a link, or holds anything but such a result.
    """
    if folder.is_symlink():
        raise InputError(cannot(f"save {saved.what} in `{folder}`", "it is a link", "Remove the link, or name another `--out`"))
    saved.refuse_other(folder)
    if (folder / saved.file).exists():
        console.note(f"{folder} holds an earlier result. It is replaced when this one is finished.")


def deliver(result: Any, folder: Path | None, what: str, show: Callable[[], None]) -> None:
    """Save a result and print it; if saving fails, the result is printed all the same.

    Args:
        result: it has a method `save`.
        folder: where it is saved; None for nowhere.
        what: what is saved, such as ``"The fit"``.
        show: prints the result.

    Raises:
        WhichklError: the result couldn't be saved.
    """
    failure: Exception | None = None
    if folder is not None:
        try:
            result.save(folder)
            exits.KEPT.saved.append(f"{what} is saved in `{folder}`")
        except (WhichklError, OSError) as error:
            failure = error
    show()
    if failure is not None:
        raise failure


def locked_results(folder: Path | None, do: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a results folder, if there is one."""
    return contextlib.nullcontext() if folder is None else locked(folder, f"{do} into `{folder}`")


def journal_of(folder: Path | None) -> Path | None:
    """Return the folder of a command's journal, and note it if an interrupted run left its state there."""
    if folder is None:
        return None
    journal = folder / ".journal"
    if next(journal.glob("*/*.safetensors"), None) is not None:
        console.note(f"An interrupted run left its state in {folder}. If this is the same run, it resumes from there.")
    return journal


def write_report(result: Any, page: Path, *, quiet: bool) -> None:
    """Write the report of a result, and print its path unless `quiet`.

    Raises:
        ResourceError: it can't be written.
    """
    with console.ERR.status("writing the report", spinner="line"):
        from whichkl.reporting import report

        report(result, page)
    if not quiet:
        console.say(f"Report: {page}")
