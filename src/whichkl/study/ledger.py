"""Ledger: a folder in which every finished cell is kept whole, so that a study killed anywhere goes on where it was."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, IntegrityError, ResourceError, cannot, plain, write_whole
from whichkl.study.cell import Outcome
from whichkl.study.measures import HEAD

_STUDY, _CELLS, _DONE, _LOCK, _TEMPORARY = "study.json", "cells", "DONE", ".lock", ".new-"
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

    A cell's files are written to a temporary folder beside the others, each synced; the folder is renamed to the cell's
    hash, and `DONE`, which holds the hashes of the files, is written last. What has no `DONE` never happened. That is left to
    threads, since a disk takes milliseconds to sync, in which the next cells are worked on; their errors come up with the next
    cell, or at the end.
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
        """Lock the folder, hold its study against `config`, drop what a kill left half-written, and check every cell.

        Args:
            folder: of the study; made where it isn't there.
            config: of the whole study.
            recompute: whether to drop cells that are corrupt, and those that failed, instead of refusing or keeping them.

        Raises:
            InputError: the folder holds another study; the message shows what differs.
            ResourceError: it can't be written, or another run is using it.
            IntegrityError: a cell isn't what was written.
        """
        ledger = cls(folder)
        write_folder(folder)
        with _locked(folder / _LOCK):
            ledger._settle(config)
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
        for path in sorted((self.folder / _CELLS).glob("[0-9a-f]*")):
            if not (path / _DONE).exists():
                continue
            try:
                stored = _read(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
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
            instead = "Run again with `--recompute` (recompute=True), which computes such cells anew"
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
        fresh = self.folder / _CELLS / f"{_TEMPORARY}{key[:16]}"
        try:
            for name, data in outcome.files.items():
                _write_synced(fresh / name, data)
            for one in {(fresh / name).parent for name in outcome.files} | {fresh}:
                _sync(one)
            fresh.rename(final)
            _sync(final.parent)
            hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(outcome.files.items())}
            text = json.dumps({"files": hashes, "seconds": outcome.seconds}, indent=1)
            _write_synced(final / f".{_DONE}", text.encode())
            (final / f".{_DONE}").rename(final / _DONE)
            _sync(final)
        except OSError as error:
            with contextlib.suppress(OSError):
                shutil.rmtree(fresh, ignore_errors=True)
                if not (final / _DONE).exists():
                    shutil.rmtree(final, ignore_errors=True)
            raise _unwritable(final, error) from error

    def _settle(self, config: dict[str, Any]) -> None:
        """Write down what is studied, or compare it with what was."""
        path, mine = self.folder / _STUDY, json.loads(json.dumps(plain(config)))
        (self.folder / _CELLS).mkdir(exist_ok=True)
        if not path.exists():
            write_whole(path, json.dumps(mine, indent=1, allow_nan=False).encode())
            return
        theirs = read_config(self.folder)
        if theirs != mine:
            shown = "; ".join(differences(theirs, mine))
            because = f"`{self.folder}` holds another study: {shown}"
            raise InputError(cannot("go on with this study", because, "Undo the change, or name another folder with `--out`"))

    def _clean(self) -> None:
        for path in (self.folder / _CELLS).iterdir():
            if path.name.startswith(_TEMPORARY) or not (path / _DONE).exists():
                _remove(path)


def read_config(folder: Path) -> dict[str, Any]:
    """Return what a folder's study is.

    Raises:
        InputError: there is no study.
        IntegrityError: its configuration can't be read.
    """
    try:
        found: dict[str, Any] = json.loads((folder / _STUDY).read_bytes())
    except FileNotFoundError as error:
        raise InputError(cannot(f"read a study from `{folder}`", f"it has no {_STUDY}", "Correct the path")) from error
    except ValueError as error:
        because = f"{_STUDY} isn't what was written ({error})"
        raise IntegrityError(cannot(f"read `{folder}`", because, "Name another folder")) from error
    return found


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


def write_folder(folder: Path) -> None:
    """Make a folder, and see that it can be written.

    Raises:
        ResourceError: it can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _read(path: Path) -> Stored:
    done = json.loads((path / _DONE).read_bytes())
    files = {}
    for name, digest in done["files"].items():
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} has changed (SHA-256 differs)")
        files[name] = data
    return stored_of(path.name, files, done["seconds"], path)


def _number(name: str, value: Any) -> Any:
    """Infinities and NaN are text in JSON."""
    return float(value) if isinstance(value, str) and name not in _TEXT else value


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    import fcntl

    try:
        file = path.open("a+")
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise _unwritable(path, error) from error
            file.seek(0)
            who = file.read().strip() or "?"
            because = f"another run is working in `{path.parent}` (process {who})"
            raise ResourceError(cannot("start this study", because, "Wait for it, or name another folder with `--out`")) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _write_synced(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a cell, `DONE` first, so that it's never taken for a whole one."""
    if not path.exists():
        return
    (path / _DONE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _unwritable(path: Path, error: OSError) -> ResourceError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    instead = "Free some space, and run the same command again" if full else "Name another folder"
    return ResourceError(cannot(f"write `{path}`", error.strerror or str(error), instead))
