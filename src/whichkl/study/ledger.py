"""Ledger: a folder with `study.json` that keeps every finished cell whole, so that an interrupted study can resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

from whichkl._checks import InputError, IntegrityError, cannot, plain
from whichkl.files.locks import LOCK, locked
from whichkl.files.reading import checked, read_file, read_json
from whichkl.files.saving import checksum
from whichkl.files.writing import (
    TEMPORARY,
    foreign_entry,
    make_folder,
    remove_own,
    rename_new,
    sync_folder,
    unwritable,
    write_new,
    write_whole,
)
from whichkl.study.cell import Outcome
from whichkl.study.measures import TEXT_FIELDS
from whichkl.study.plan import config_hash

STUDY = "study.json"
_CELLS, _DONE = "cells", "DONE"
_FIT = r"fit/([a-z_]+\.json|(model|student)-[0-9a-f]{16}\.safetensors)"
_CELL_FILE = re.compile(rf"({re.escape(TEMPORARY)})?{_DONE}|\.{_DONE}|cell\.json|fit/|{_FIT}")
"""Names of a cell's files. Earlier versions wrote `.DONE` where this one writes a temporary name."""
_CELL_FOLDER = re.compile(r"[0-9a-f]{64}")
_UNFINISHED_FOLDER = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{16}}")
_FIRST_ENTRIES = (STUDY, _CELLS, LOCK, ".lock")
"""Entries of a study's folder before its first cell; `.lock` is the lock of earlier versions."""
_MAX_WAITING = 16
"""Largest number of cells that wait to be written."""
_WRITERS = 8
"""Threads that write cells: most of the time is spent waiting for a disk to sync, and disks sync several files at once."""


class DoneFields(TypedDict):
    """The fields of `DONE`."""

    files: Mapping[str, str]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Stored:
    """A finished cell."""

    key: str
    row: dict[str, Any]
    details: dict[str, Any]
    """Everything that isn't one number: estimates, tests, missed modes, optima."""
    config: dict[str, Any]
    seconds: dict[str, float]
    folder: Path | None = None
    files: Mapping[str, bytes] | None = None
    """Its files, where the study has no folder."""


class Ledger:
    """The cells of one study. `opened` returns one that is locked, checked and clean.

    A cell's files are written to a temporary folder next to the others, each synced. The folder is renamed to the cell's hash,
    and `DONE`, which holds the hashes of the files, is written last. A cell without `DONE` never happened. Threads write the
    cells, because a disk takes milliseconds to sync, in which the next cells are worked on. An error of a thread is raised with
    the next cell, or at the end. Only entries that have a study's names are ever removed.
    """

    def __init__(self, folder: Path) -> None:
        """Take the study's folder; nothing is read or written yet."""
        self.folder = folder
        self.cells: dict[str, Stored] = {}
        """The finished ones, by their keys."""
        self._writer: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, config: dict[str, Any], *, recompute: bool = False) -> Iterator[Ledger]:
        """Lock the folder, compare its study with `config`, remove half-written cells, and check every cell.

        With more seeds than the study in the folder has, that study grows. Where `recompute` is True, cells that failed or are
        corrupt are removed, and a corrupt `study.json` is replaced. Otherwise failed cells are kept, and the rest is refused.
        """
        ledger = cls(folder)
        refuse_other(folder)
        with locked(folder, "start this study"):
            ledger._check_config(config, recompute=recompute)
            # a process that was killed may have left cells half-written
            for path in (*_entries(folder / _CELLS, _UNFINISHED_FOLDER), *_entries(folder / _CELLS, _CELL_FOLDER)):
                if path.name.startswith(TEMPORARY) or not (path / _DONE).exists():
                    _remove(path)
            ledger.load(recompute=recompute)
            with ThreadPoolExecutor(_WRITERS) as ledger._writer:  # which ends when all is written
                yield ledger
                ledger.settle()

    def load(self, *, recompute: bool = False) -> None:
        """Read every finished cell, and check its hashes."""
        corrupt = []
        for path in _entries(self.folder / _CELLS, _CELL_FOLDER):
            if not path.is_symlink() and not (path / _DONE).exists():
                continue
            try:
                stored = _read(path)
            except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
                corrupt.append((path, _why(error)))
                continue
            if recompute and stored.row["status"] == "failed":
                _remove(path)
            else:
                self.cells[stored.key] = stored
        if recompute:
            for path, _ in corrupt:
                _remove(path)
        elif corrupt:
            path, why = corrupt[0]
            more = f", nor {len(corrupt) - 1} more" if len(corrupt) > 1 else ""
            because = f"`{path}` isn't what was written{more}: {why}"
            instead = "Run again with `--recompute` (recompute=True), which computes such cells again"
            raise IntegrityError(cannot("trust this study", because, instead))

    def write(self, key: str, outcome: Outcome) -> Stored:
        """Have a thread write a cell, whole or not at all."""
        if self._writer is None:
            raise ValueError("the ledger isn't open")
        self.settle(_MAX_WAITING)
        self._waiting.append(self._writer.submit(self._commit, key, outcome))
        self.cells[key] = stored_of(key, outcome.files, outcome.seconds, self.folder / _CELLS / key)
        return self.cells[key]

    def settle(self, max_waiting: int = 0) -> None:
        """Wait until at most this many cells wait to be written."""
        while self._waiting and (len(self._waiting) > max_waiting or self._waiting[0].done()):
            self._waiting.popleft().result()

    def _commit(self, key: str, outcome: Outcome) -> None:
        final = self.folder / _CELLS / key
        fresh = self.folder / _CELLS / f"{TEMPORARY}{key[:16]}"
        try:
            for name, data in outcome.files.items():
                write_new(fresh / name, data)
            for one in {(fresh / name).parent for name in outcome.files} | {fresh}:
                sync_folder(one)
            rename_new(fresh, final)
            hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(outcome.files.items())}
            text = json.dumps({"files": hashes, "seconds": outcome.seconds}, indent=1)
            write_new(final / f"{TEMPORARY}{_DONE}", text.encode())
            rename_new(final / f"{TEMPORARY}{_DONE}", final / _DONE)
        except OSError as error:
            with contextlib.suppress(OSError):
                remove_own(fresh, _is_own)
                if not (final / _DONE).exists():
                    remove_own(final, _is_own)
            raise unwritable(final, error) from error

    def _check_config(self, config: dict[str, Any], *, recompute: bool) -> None:
        """Write `study.json`, or compare the configuration with that of the folder."""
        mine = json.loads(json.dumps(plain(config)))
        make_folder(self.folder / _CELLS)
        if (self.folder / STUDY).exists():
            try:
                theirs = read_config(self.folder)
            except IntegrityError:
                if not recompute:
                    raise
                theirs = {}  # every cell holds its own configuration
            if theirs and not grows(theirs, mine):
                shown = "; ".join(differences(theirs, mine))
                because = f"`{self.folder}` holds another study: {shown}"
                raise InputError(cannot("continue this study", because, "Undo the change, or name another folder with `--out`"))
            if theirs == mine:
                return
        write_config(self.folder, mine)


def refuse_other(folder: Path) -> None:
    """Refuse a folder that isn't empty and holds no study, so that a study never touches files of somebody else."""
    if (folder / _CELLS).is_symlink():
        because = f"`{_CELLS}` in it is a link, and a study removes nothing behind a link"
        raise InputError(cannot(f"start a study in `{folder}`", because, "Name another folder with `--out`"))
    if (folder / STUDY).exists() and not is_study(folder / STUDY):
        because = f"there is a `{STUDY}` in it that whichkl didn't write"
        raise InputError(cannot(f"start a study in `{folder}`", because, "Name another folder with `--out`"))
    if not folder.is_dir() or (folder / STUDY).exists():
        return
    names = sorted(one.name for one in folder.iterdir() if not one.name.startswith(TEMPORARY))
    other = [name for name in names if name not in _FIRST_ENTRIES]
    other += [f"{_CELLS}/{one.name}" for one in _entries(folder / _CELLS, re.compile(".*"))]
    if other:
        because = f"the folder holds something else (`{other[0]}`), and no {STUDY}"
        raise InputError(cannot(f"start a study in `{folder}`", because, "Name a new or empty folder with `--out`"))


def stored_of(key: str, files: Mapping[str, bytes], seconds: dict[str, float], folder: Path | None) -> Stored:
    """Return a cell from its files; they are kept in memory only where there is no folder."""
    body = json.loads(files["cell.json"])
    # JSON holds infinities and NaN as text
    numbers = {name: float(value) for name, value in body["row"].items() if isinstance(value, str) and name not in TEXT_FIELDS}
    return Stored(key, {**body["row"], **numbers}, body["details"], body["config"], seconds, folder, None if folder else files)


def _read(path: Path) -> Stored:
    if path.is_symlink():
        raise ValueError("it is a link")
    done = checked(DoneFields, read_json(read_file(path / _DONE)))
    files = {}
    for name, digest in done["files"].items():
        if not _CELL_FILE.fullmatch(name) or (path / name).is_symlink() or (path / name).parent.is_symlink():
            raise ValueError(f"{name[:80]!r} isn't a file of a cell")
        data = read_file(path / name)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} has changed (SHA-256 differs)")
        files[name] = data
    stored = stored_of(path.name, files, done["seconds"], path)
    if config_hash(stored.config) != path.name or stored.row.get("cell") != path.name:
        raise ValueError("it is the cell of another study, or another cell of this one")
    return stored


def _why(error: Exception) -> str:
    """Return why a cell can't be read."""
    if isinstance(error, FileNotFoundError):
        return f"{Path(str(error.filename)).name} is missing"
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


def _entries(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Return the entries of a folder whose names match, in order; others are ignored."""
    return sorted(one for one in folder.iterdir() if name.fullmatch(one.name)) if folder.is_dir() else []


def _is_own(name: str) -> bool:
    return _CELL_FILE.fullmatch(name) is not None


def _remove(path: Path) -> None:
    """Remove a cell, `DONE` first, so that a half-removed one never counts as whole."""
    other = foreign_entry(path, _is_own)
    if other is not None:
        because = f"`{other}` is a link, or something that no study writes"
        raise IntegrityError(cannot(f"compute the cell `{path}` again", because, "Move that elsewhere"))
    remove_own(path / _DONE, _is_own)
    remove_own(path, _is_own)


class RequiredFields(TypedDict):
    """The fields that every `study.json` has."""

    target: Mapping[str, Any]
    families: list[Any]
    objectives: list[str]
    seeds: list[int]


class StudyFields(RequiredFields, total=False):
    """All fields of `study.json`, except for its checksum, which earlier versions didn't write."""

    format: Any
    code: Any
    budget: Any
    metrics: Any
    held_out: Any
    draws: Any
    files: Any
    pilot: Any


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a study with its checksum."""
    text = json.dumps({**config, "checksum": checksum(config)}, indent=1, allow_nan=False)
    write_whole(folder / STUDY, text.encode())


def is_study(path: Path) -> bool:
    """Whether a file is a study's configuration, even a damaged one.

    It then has most of the names that every study has; or it is no object of JSON at all, and finished cells are next to it.
    """
    if path.is_symlink() or not path.is_file():
        return False
    content = path.read_bytes()
    if sum(f'"{name}":'.encode() in content for name in get_type_hints(RequiredFields)) > 1:
        return True
    try:
        is_object = isinstance(read_json(content), dict)
    except ValueError:
        is_object = False
    return not is_object and any((path.parent / _CELLS).glob(f"*/{_DONE}"))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the study in a folder."""
    path = folder / STUDY
    if path.exists() and not is_study(path):
        because = f"its {STUDY} isn't one that whichkl wrote"
        raise InputError(cannot(f"read a study from `{folder}`", because, "Correct the path"))
    try:
        found = read_json(read_file(path))
        if not isinstance(found, dict):
            raise ValueError("it isn't an object")
        if "checksum" in found and found.pop("checksum") != checksum(found):
            raise ValueError("its checksum differs")
        if unknown := [name for name in found if name not in get_type_hints(StudyFields)]:
            raise ValueError(f"`{unknown[0][:40]}` has no meaning there")
        return {**found, **checked(StudyFields, found)}
    except FileNotFoundError as error:
        raise InputError(cannot(f"read a study from `{folder}`", f"it has no {STUDY}", "Correct the path")) from error
    except (OSError, ValueError) as error:
        instead = "Run the study's command again with `--recompute` (recompute=True), which writes it again and keeps the cells"
        raise IntegrityError(cannot(f"read `{folder}`", f"{STUDY} isn't what was written: {error}", instead)) from error


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Return where two configurations differ, one text per difference.

    >>> differences({"seeds": [0, 1], "budget": None}, {"seeds": [0, 1, 2], "budget": None})
    ['seeds was [0, 1] and is [0, 1, 2]']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for name in dict.fromkeys([*before, *now]):
            lines += differences(before.get(name), now.get(name), f"{place}.{name}" if place else name)
        return lines
    return [] if before == now else [f"{place} was {json.dumps(before)} and is {json.dumps(now)}"]


def grows(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two studies differ only in that the new one has more seeds. Its cells stay valid: each is named by its own hash."""
    return {**before, "seeds": 0} == {**now, "seeds": 0} and set(before["seeds"]) <= set(now["seeds"])
