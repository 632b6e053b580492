"""Journal: the state of a long fit in a folder, so that an interrupted fit can resume."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from whichkl._checks import InputError, cannot, plain
from whichkl.files.reading import read_json
from whichkl.files.writing import TEMPORARY, remove_own, write_whole

T = TypeVar("T")
_log = logging.getLogger("whichkl")
_COUNTS = "evaluations"
"""Name under which an entry's notes hold the counts."""


@dataclass(frozen=True)
class Journal:
    """Entries by name, each written whole or not at all; every fit has a folder of its own.

    Args:
        folder: what holds the journals of all fits.
        key: SHA-256 of the fit's data, functions, family, objective, solver, seed and version. Its entries are in a folder of
            this name, and no other fit reads or removes them.
        prefix: start of the name of every entry, set by `under`.
    """

    folder: Path
    key: str
    prefix: str = ""
    counts: dict[str, int] | None = None
    """What the target was used for so far; every entry holds it, so that a resumed fit reports the same counts."""

    @classmethod
    def of(cls, folder: str | os.PathLike[str], what: Mapping[str, Any], counts: dict[str, int] | None = None) -> Journal:
        """Open the journal of the fit that `what` describes."""
        path, given = Path(folder), os.fspath(folder)
        if not given or ((path.exists() or path.is_symlink()) and not path.is_dir()):
            because = "it isn't a folder" if given else "it has no name"
            raise InputError(cannot(f"keep a journal in `{given}`", because, "Name a new or empty folder"))
        text = json.dumps(plain(dict(what)), sort_keys=True, default=str)
        return cls(path, hashlib.sha256(text.encode()).hexdigest()[:16], counts=counts)

    def under(self, prefix: str) -> Journal:
        """Return this journal with another prefix, for a part of the work."""
        return replace(self, prefix=f"{self.prefix}{prefix}-")

    def save(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write an entry; it replaces an earlier one of that name."""
        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        text = json.dumps(plain({**notes, _COUNTS: self.counts or {}}))
        write_whole(self.path(name), save(content, metadata={"notes": text, "sha256": _digest(content, text)}))

    def load(self, name: str, read: Callable[[dict[str, Tensor], dict[str, Any]], T]) -> T | None:
        """Read an entry; None if there is none, or if it isn't what was written, which is logged.

        `read` turns tensors and notes into a result, or raises an error if they can't be those of this fit.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata.get("sha256") != _digest(tensors, metadata["notes"]):
                raise ValueError("its checksum differs")
            notes = dict(read_json(metadata["notes"].encode()))
            counts = {key: int(value) for key, value in notes.pop(_COUNTS).items()}
            found = read(tensors, notes)
        except (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            _log.warning("The journal's entry `%s` isn't what was written (%s). Its work is repeated.", path, why)
            return None
        if self.counts is not None:
            self.counts.update(counts)
        return found

    def clear(self) -> None:
        """Remove this fit's entries and the folders that are then empty; call it after the result is written."""
        try:
            own = self.folder / self.key
            entry = rf"[^/]+\.{self.key}\.safetensors"
            names = re.compile(rf"{entry}|{re.escape(TEMPORARY)}{entry}-\w{{8}}")
            if own.is_dir() and remove_own(own, lambda name: names.fullmatch(name) is not None):
                remove_own(self.folder, lambda name: False)  # only if nothing is left in it, such as journals of other fits
        except OSError as error:
            _log.warning("The journal in `%s` can't be removed (%s).", self.folder, error.strerror or error)

    def path(self, name: str) -> Path:
        """Return where an entry is."""
        return self.folder / self.key / f"{self.prefix}{name}.{self.key}.safetensors"


def tensors_behind(prefix: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, on the devices of `like`; a `ValueError` if names or shapes differ."""
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in like.items()}:
        raise ValueError(f"the tensors `{prefix}…` are those of another network")
    return {name: value.to(like[name].device) for name, value in found.items()}


def optimizer_state(prefix: str, tensors: Mapping[str, Tensor], weights: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return an optimizer's state for each weight, as `torch.optim` numbers them; a `ValueError` if one is of no weight."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            number, key = name.removeprefix(prefix).split(".", 1)
            if not 0 <= int(number) < len(weights) or value.shape not in (weights[int(number)].shape, ()):
                raise ValueError(f"the tensor `{name}` isn't the state of a weight")
            found.setdefault(int(number), {})[key] = value
    return found


def _digest(tensors: Mapping[str, Tensor], notes: str) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, and of the notes."""
    digest = hashlib.sha256(notes.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        flat = value.flatten().clone(memory_format=torch.contiguous_format)  # an axis of size 1 may have any stride
        digest.update(flat.view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
