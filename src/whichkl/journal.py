"""Journal: what a long fit has done so far, in a folder, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from whichkl._checks import plain, write_whole


@dataclass(frozen=True)
class Journal:
    """Entries by name, each written whole or not at all, and kept apart by what they belong to.

    Args:
        folder: where the entries of all fits lie.
        key: what this fit is: data, family, objective, solver, seed. Another key never reads these entries.
        prefix: put before every name, by `under`.
    """

    folder: Path
    key: str
    prefix: str = ""

    @classmethod
    def of(cls, folder: str | os.PathLike[str], what: Mapping[str, Any]) -> Journal:
        """Open the journal of the fit that `what` describes."""
        text = json.dumps(plain(dict(what)), sort_keys=True, default=str)
        return cls(Path(folder), hashlib.sha256(text.encode()).hexdigest()[:16])

    def under(self, prefix: str) -> Journal:
        """Return this journal with another prefix, for a part of the work."""
        return Journal(self.folder, self.key, f"{self.prefix}{prefix}-")

    def save(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write an entry, in place of an earlier one of that name.

        Raises:
            ResourceError: it can't be written.
        """
        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        write_whole(self._path(name), save(content, metadata={"notes": json.dumps(plain(dict(notes)))}))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read an entry; None where there is none, or where it isn't whole."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["notes"])
                return {key: file.get_tensor(key) for key in file.keys()}, notes  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def clear(self) -> None:
        """Delete the entries of every fit in this folder: the result has been written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / self.key / f"{self.prefix}{name}.safetensors"
