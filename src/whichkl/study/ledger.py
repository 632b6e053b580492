"""Ledger: a folder in which every finished cell is kept whole, so that an interrupted study resumes where it was."""

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
from typing import Any, TypedDict

from whichkl._checks import InputError, IntegrityError, cannot, plain
from whichkl.files.locks import LOCK, locked
from whichkl.files.reading import checked, read_json
from whichkl.files.saving import checksum
from whichkl.files.writing import TEMPORARY, make_folder, remove_own, rename_new, sync_folder, unwritable, write_new, write_whole
from whichkl.study.cell import Outcome
from whichkl.study.measures import HEAD
from whichkl.study.plan import config_hash

STUDY = "study.json"
_CELLS, _DONE = "cells", "DONE"
_FIT = r"fit/([a-z]+\.json|(model|student)-[0-9a-f]{16}\.safetensors)"
_OWN = re.compile(rf"({re.escape(TEMPORARY)})?{_DONE}|\.{_DONE}|cell\.json|fit/|{_FIT}")
"""Names of a cell's files. `.DONE` is what earlier versions called one that isn't whole yet."""
_CELL = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{16}}")
_BEGUN = (STUDY, _CELLS, LOCK, ".lock")
"""What a study has in its folder before it has a cell; `.lock` is the lock of earlier versions."""
_FIELDS = (
    "format",
    "code",
    "target",
    "families",
    "objectives",
    "seeds",
    "budget",
    "metrics",
    "held_out",
    "draws",
    "files",
    "pilot",
)
"""All fields of `study.json` but its checksum, which earlier versions didn't write."""
_AHEAD = 16
"""Cells that may wait to be written."""
_WRITERS = 8
"""Cells written at once: what takes time is that a disk syncs, which it does for several as fast as for one."""
_TEXT = {
    *(name for name in HEAD if name not in ("seed", "iterations", "optima")),
    "forward_kl_up_to",
    "reverse_kl_up_to",
    "notes",
}


class DoneFields(TypedDict):
    """What `DONE` holds."""

    files: Mapping[str, str]
    seconds: dict[str, float]


class StudyFields(TypedDict):
    """What every `study.json` holds, among others."""

    target: Mapping[str, Any]
    families: list[Any]
    objectives: list[str]
    seeds: list[int]


@dataclass(frozen=True)
class Stored:
    """A finished cell, as it was written."""

    key: str
    row: dict[str, Any]
    details: dict[str, Any]
    """What stands behind the columns: estimates, tests, missed modes, optima."""
    config: dict[str, Any]
    seconds: dict[str, float]
    folder: Path | None = None
    files: Mapping[str, bytes] | None = None
    """Its files, where the study has no folder."""


class Ledger:
    """The cells of one study. `opened` gives one that is locked, checked and clean.

    A cell's files are written to a temporary folder next to the others, each synced. The folder is renamed to the cell's hash,
    and `DONE`, which holds the hashes of the files, is written last. What has no `DONE` never happened. Threads do this, since a
    disk takes milliseconds to sync, in which the next cells are worked on. Their errors come up with the next cell, or at the
    end. Only entries of these names are ever removed.
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
        """Lock the folder, compare its study with `config`, remove what a kill left half written, and check every cell.

        Args:
            folder: of the study; made where it isn't there.
            config: of the whole study. It may have more seeds than the study in the folder, which then grows.
            recompute: whether to remove cells that are corrupt or failed instead of refusing or keeping them, and to write a
                corrupt `study.json` again.

        Raises:
            InputError: the folder holds another study, and the message shows what differs, or it holds something else.
            ResourceError: it can't be written, or another run is using it.
            IntegrityError: a file isn't what was written.
        """
        ledger = cls(folder)
        refuse_other(folder)
        with locked(folder, "start this study"):
            ledger._settle(config, recompute=recompute)
            ledger._clean()
            ledger.load(recompute=recompute)
            with ThreadPoolExecutor(_WRITERS) as ledger._writer:  # which ends when all is written
                yield ledger
                ledger.settle()

    def load(self, *, recompute: bool = False) -> None:
        """Read every finished cell, its hashes checked.

        Raises:
            IntegrityError: a cell isn't what was written, and isn't to be recomputed.
        """
        corrupt = []
        for path in _entries(self.folder / _CELLS, _CELL):
            if not path.is_symlink() and not (path / _DONE).exists():
                continue
            try:
                stored = _read(path)
            except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
                corrupt.append((path, str(error) or type(error).__name__))
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
        """Have a cell written, whole or not at all.

        Raises:
            ResourceError: the disk is full, or can't be written; this cell or one before isn't there.
        """
        if self._writer is None:
            raise ValueError("the ledger isn't open")
        self.settle(_AHEAD)
        self._waiting.append(self._writer.submit(self._commit, key, outcome))
        self.cells[key] = stored_of(key, outcome.files, outcome.seconds, self.folder / _CELLS / key)
        return self.cells[key]

    def settle(self, most: int = 0) -> None:
        """Wait until at most so many cells are still to be written.

        Raises:
            ResourceError: one of the others couldn't be written.
        """
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
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

    def _settle(self, config: dict[str, Any], *, recompute: bool) -> None:
        """Write down what is studied, or compare it with what was."""
        mine = json.loads(json.dumps(plain(config)))
        make_folder(self.folder / _CELLS)
        if (self.folder / STUDY).exists():
            try:
                theirs = read_config(self.folder)
            except IntegrityError:
                if not recompute:
                    raise
                theirs = {}  # every cell says itself what it belongs to
            if theirs and not _grows(theirs, mine):
                shown = "; ".join(differences(theirs, mine))
                because = f"`{self.folder}` holds another study: {shown}"
                raise InputError(cannot("go on with this study", because, "Undo the change, or name another folder with `--out`"))
            if theirs == mine:
                return
        text = json.dumps({**mine, "checksum": checksum(mine)}, indent=1, allow_nan=False)
        write_whole(self.folder / STUDY, text.encode())

    def _clean(self) -> None:
        """Remove what was being written when a process was killed."""
        cells = self.folder / _CELLS
        for path in (*_entries(cells, _UNFINISHED), *(one for one in _entries(cells, _CELL) if not (one / _DONE).exists())):
            _remove(path)


def refuse_other(folder: Path) -> None:
    """Refuse a folder that isn't empty and holds no study, so that no file of somebody else's is in a study's way.

    Raises:
        InputError: it does.
    """
    if (folder / _CELLS).is_symlink():
        because = f"`{_CELLS}` in it is a link, and a study removes nothing behind a link"
        raise InputError(cannot(f"start a study in `{folder}`", because, "Name another folder with `--out`"))
    if not folder.is_dir() or (folder / STUDY).exists():
        return
    names = sorted(one.name for one in folder.iterdir() if not one.name.startswith(TEMPORARY))
    other = [name for name in names if name not in _BEGUN]
    other += [f"{_CELLS}/{one.name}" for one in _entries(folder / _CELLS, re.compile(".*"))]
    if other:
        because = f"the folder holds something else (`{other[0]}`), and no {STUDY}"
        raise InputError(cannot(f"start a study in `{folder}`", because, "Name a new or empty folder with `--out`"))


def read_config(folder: Path) -> dict[str, Any]:
    """Return what a folder's study is.

    Raises:
        InputError: there is no study.
        IntegrityError: its configuration isn't what was written.
    """
    path = folder / STUDY
    try:
        found = read_json(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it isn't an object")
        if "checksum" in found and found.pop("checksum") != checksum(found):
            raise ValueError("its checksum differs")
        if unknown := [name for name in found if name not in _FIELDS]:
            raise ValueError(f"`{unknown[0][:40]}` has no meaning there")
        return {**found, **checked(StudyFields, found)}
    except FileNotFoundError as error:
        raise InputError(cannot(f"read a study from `{folder}`", f"it has no {STUDY}", "Correct the path")) from error
    except (OSError, ValueError) as error:
        instead = "Run the study's command again with `--recompute` (recompute=True), which writes it again and keeps the cells"
        raise IntegrityError(cannot(f"read `{folder}`", f"{STUDY} isn't what was written: {error}", instead)) from error


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Say where two configurations differ, a line each.

    >>> differences({"seeds": [0, 1], "budget": None}, {"seeds": [0, 1, 2], "budget": None})
    ['seeds was [0, 1] and is [0, 1, 2]']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for name in dict.fromkeys([*before, *now]):
            lines += differences(before.get(name), now.get(name), f"{place}.{name}" if place else name)
        return lines
    return [] if before == now else [f"{place} was {json.dumps(before)} and is {json.dumps(now)}"]


def stored_of(key: str, files: Mapping[str, bytes], seconds: dict[str, float], folder: Path | None) -> Stored:
    """Return a cell from its files; where there is a folder they stay there alone."""
    body = json.loads(files["cell.json"])
    row = {name: _number(name, value) for name, value in body["row"].items()}
    return Stored(key, row, body["details"], body["config"], seconds, folder, None if folder else files)


def _read(path: Path) -> Stored:
    if path.is_symlink():
        raise ValueError("it is a link")
    done = checked(DoneFields, read_json((path / _DONE).read_bytes()))
    files = {}
    for name, digest in done["files"].items():
        if not _OWN.fullmatch(name) or (path / name).is_symlink() or (path / name).parent.is_symlink():
            raise ValueError(f"{name[:80]!r} isn't a file of a cell")
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} has changed (SHA-256 differs)")
        files[name] = data
    stored = stored_of(path.name, files, done["seconds"], path)
    if config_hash(stored.config) != path.name or stored.row.get("cell") != path.name:
        raise ValueError("it is the cell of another study, or another cell of this one")
    return stored


def _number(name: str, value: Any) -> Any:
    """Infinities and NaN are text in JSON."""
    return float(value) if isinstance(value, str) and name not in _TEXT else value


def _grows(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a study is the same but for more seeds: its cells stay, since each is named for what it is."""
    return {**before, "seeds": 0} == {**now, "seeds": 0} and set(before["seeds"]) <= set(now["seeds"])


def _entries(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """The entries of a folder with such a name, in order; what else lies there is passed over."""
    return sorted(one for one in folder.iterdir() if name.fullmatch(one.name)) if folder.is_dir() else []


def _is_own(name: str) -> bool:
    return _OWN.fullmatch(name) is not None


def _remove(path: Path) -> None:
    """Remove a cell, `DONE` first, so that it's never taken for a whole one.

    Raises:
        IntegrityError: something lies there that the study didn't write.
    """
    if not path.is_symlink() and path.is_dir():
        remove_own(path / _DONE, _is_own)
    if not remove_own(path, _is_own):
        because = f"`{path}` is a link, or holds something that no study writes"
        raise IntegrityError(cannot("compute this cell again", because, "Move that elsewhere"))
