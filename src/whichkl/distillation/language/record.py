"""Record: what a run of `language_model` has done so far, in the folder of its journal: measurements and checkpoints.

transformers writes the checkpoints. Each is followed by a JSON file with the SHA-256 of its files, so that one without it isn't
whole. Its weights are safetensors; optimizer, schedule and random states are pickles, which transformers reads with torch's
`weights_only=True`, so that no code in them is run.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import transformers
from torch import nn

from whichkl._checks import IntegrityError, cannot, plain
from whichkl.distillation.language.result import Measured
from whichkl.files.journal import Journal, tensors_behind
from whichkl.files.reading import checked, read_json
from whichkl.files.saving import checksum
from whichkl.files.writing import TEMPORARY, remove_own, write_whole
from whichkl.solvers.descent import state_of

_MIN_SECONDS_BETWEEN_CHECKPOINTS = 30.0
_MAX_SHARE_OF_TIME = 0.05
"""Largest share of the time that checkpoints may take."""
_KEPT = 2
_FOLDER = re.compile(r"checkpoint-(\d+)")
_CHECKPOINT_FILE = re.compile(r"[\w.-]+\.(json|jinja|txt|model|md|safetensors|pt|pth|bin)")
"""Names of files that transformers writes into a checkpoint."""


class Noting(Protocol):
    """What a checkpoint keeps besides the trainer's own state."""

    def __call__(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        ...


@dataclass(frozen=True)
class Record:
    """The record of one run; without a journal nothing is kept."""

    journal: Journal | None

    @property
    def folder(self) -> Path | None:
        """Where checkpoints are."""
        return None if self.journal is None else self.journal.folder / self.journal.key

    def measured(self, name: str, measure: Callable[[], Measured]) -> Measured:
        """Return a measurement from the journal; otherwise make it, and keep it."""
        if self.journal is None:
            return measure()
        found: Measured | None = self.journal.load(name, lambda _, notes: checked(Measured, notes))
        if found is None:
            found = measure()
            self.journal.save(name, {}, found.to_dict())
        return found

    def trained(self, student: nn.Module) -> dict[str, Any] | None:
        """Give a student the weights of a training that ended, and return what was noted then; None if there was none."""
        if self.journal is None:
            return None
        like = state_of(student)
        found = self.journal.load("trained", lambda tensors, notes: (tensors_behind("", tensors, like), notes))
        if found is None:
            return None
        student.load_state_dict(found[0])
        return found[1]

    def keep_trained(self, student: nn.Module, notes: Mapping[str, Any]) -> None:
        """Write the weights at the end of training; checkpoints aren't needed afterwards."""
        if self.journal is not None:
            self.journal.save("trained", state_of(student), notes)
            self._remove(keep=0)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the last whole checkpoint and its notes.

        Raises:
            IntegrityError: one of its files isn't what was written.
        """
        if self.folder is None or self.journal is None:
            return None
        for step, manifest in self._manifests(self.journal, self.folder):
            folder = self.folder / f"checkpoint-{step}"
            try:
                fields = read_json(manifest.read_bytes())
                if checksum(fields) != fields.get("checksum"):
                    raise ValueError("its checksum differs")
            except (OSError, ValueError, AttributeError) as error:
                raise self._damaged(manifest, str(error)) from error
            if not folder.is_dir():
                continue
            for name, digest in fields["files"].items():
                if not (folder / name).is_file() or _digest(folder / name) != digest:
                    why = "its SHA-256 differs" if (folder / name).is_file() else "it is missing"
                    raise self._damaged(folder / name, why)
            return folder, dict(fields["notes"])
        return None

    def keeper(self, note: Noting) -> Keeper:
        """Return the callback that decides when checkpoints are written, and completes them."""
        return Keeper(self, note)

    def complete(self, step: int, notes: Mapping[str, Any]) -> None:
        """Write the hashes of a checkpoint, and remove all but the last ones."""
        if self.journal is not None and self.folder is not None:
            folder = self.folder / f"checkpoint-{step}"
            files = {one.name: _digest(one) for one in sorted(folder.iterdir()) if one.is_file()}
            body = {"files": files, "notes": plain(dict(notes))}
            manifest = self.folder / f"{folder.name}.{self.journal.key}.json"
            write_whole(manifest, json.dumps({**body, "checksum": checksum(body)}).encode())
            self._remove(keep=_KEPT)

    def clear(self) -> None:
        """Remove the record; call it after the result is written."""
        if self.journal is not None:
            self._remove(keep=0)
            self.journal.clear()

    def _manifests(self, journal: Journal, folder: Path) -> list[tuple[int, Path]]:
        """Return the steps of whole checkpoints with the files of their hashes, the last one first."""
        name = re.compile(rf"{_FOLDER.pattern}\.{journal.key}\.json")
        found = [(name.fullmatch(one.name), one) for one in folder.iterdir()] if folder.is_dir() else []
        return sorted(((int(match[1]), one) for match, one in found if match), reverse=True)

    def _remove(self, keep: int) -> None:
        """Remove all but the last whole checkpoints, the hashes first, and what a killed process left."""
        if self.journal is None or self.folder is None or not self.folder.is_dir():
            return
        whole = self._manifests(self.journal, self.folder)
        kept = {step for step, _ in whole[:keep]}
        for _, manifest in whole[keep:]:
            remove_own(manifest, lambda name: True)
        for entry in sorted(self.folder.iterdir()):
            found = _FOLDER.fullmatch(entry.name)
            if found and int(found[1]) not in kept:
                remove_own(entry, lambda name: _CHECKPOINT_FILE.fullmatch(name) is not None)
            elif entry.name.startswith(f"{TEMPORARY}checkpoint-"):
                remove_own(entry, lambda name: True)

    def _damaged(self, path: Path, why: str) -> IntegrityError:
        instead = f"Restore it, or remove `{self.folder}` to train from the start"
        return IntegrityError(cannot("resume", f"`{path}` isn't what was written ({why})", instead))


class Keeper(transformers.TrainerCallback):  # type: ignore[misc]
    """Has checkpoints written from time to time, and completes them."""

    def __init__(self, record: Record, note: Noting) -> None:
        self.record, self.note = record, note
        self.last, self.cost = time.monotonic(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint where one is due."""
        now, interval = time.monotonic(), max(_MIN_SECONDS_BETWEEN_CHECKPOINTS, self.cost / _MAX_SHARE_OF_TIME)
        if args.save_strategy == "no" and now - self.last >= interval:
            control.should_save = True
        if control.should_save:
            self.last = now
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the end of training to `keep_trained`: a trainer that resumed from there would make one more step."""
        if control.should_training_stop:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the hashes of the checkpoint that was just written."""
        if args.should_save:
            self.record.complete(state.global_step, self.note())
        self.cost, self.last = time.monotonic() - self.last, time.monotonic()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
