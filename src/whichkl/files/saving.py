"""Saving: a result is a JSON file that names its weights; both have checksums and are replaced in one step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from whichkl._checks import InputError, IntegrityError, ResourceError, WhichklError, cannot, plain
from whichkl.files.locks import LOCK, locked
from whichkl.files.reading import checked, read_file, read_json, read_tensors
from whichkl.files.writing import TEMPORARY, remove_own, write_whole

FORMAT = 1
_SECONDS_TO_WAIT = 60.0
"""How long a save waits for another save into the same folder; a save takes milliseconds."""
_COPIES = "copies"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.(json|jinja|txt|model|md)")
"""Names that copies for other programs have."""
_MAX_READS = 1_000
"""How often a reader starts again because another process replaced the result meanwhile."""


@dataclass(frozen=True)
class Saved:
    """How one kind of result is saved: a JSON file that holds the name and the SHA-256 of a file of weights.

    Args:
        what: the kind of result, with its article, for messages.
        file: name of the JSON file.
        weights: start of the name of the file of weights.
        again: what to do if a saved result is damaged.
    """

    what: str
    file: str
    weights: str
    again: str

    def files(
        self,
        fields: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        copies: Callable[[str], Mapping[str, bytes]] = lambda weights: {},
    ) -> dict[str, bytes]:
        """Return the content of what `write` writes: the weights, the JSON file that names them, and copies for other programs.

        `copies` returns files by name, given the name of the weights. The JSON file has their SHA-256; `read` doesn't need them.
        A copy that was changed later is the user's, and isn't replaced.
        """
        weights = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata={"format": "pt"})
        digest = hashlib.sha256(weights).hexdigest()
        name = f"{self.weights}-{digest[:16]}.safetensors"
        others = copies(name)
        hashes = {one: hashlib.sha256(data).hexdigest() for one, data in others.items()}
        body = {**plain(dict(fields)), "weights": name, "sha256": digest, **({_COPIES: hashes} if others else {})}
        text = json.dumps({**body, "checksum": checksum(body)}, indent=1, allow_nan=False)
        return {name: weights, self.file: text.encode(), **others}

    def write(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Write what `files` returned. An earlier result in that folder is replaced when the new JSON file gets its name.

        If the process is killed before, the earlier result is unchanged. The only weights that are removed are those that the
        replaced JSON file named, and those of a killed save, which are named for their content.
        """
        self.refuse_other(folder)
        with locked(folder, f"save {self.what} in `{folder}`", _SECONDS_TO_WAIT):
            self.refuse_other(folder)  # again: another process may have written there before this one had the lock
            before, copies = "", self._copies(folder)
            with contextlib.suppress(OSError, ValueError):  # there may be no earlier result, or a damaged one
                before = self._weights_of(read_file(folder / self.file))
            for name, data in files.items():
                write_whole(folder / name, data)
            for entry in sorted(folder.iterdir()):
                if entry.name not in files and (entry.name == before or entry.name in copies or _is_left_over(entry)):
                    remove_own(entry, partial(self.is_own, copies=copies))

    def refuse_other(self, folder: Path) -> None:
        """Refuse a file, and a folder that holds anything but such a result; the message names one of the entries."""
        if not folder.exists():
            return
        if not folder.is_dir():
            raise InputError(cannot(f"save {self.what} in `{folder}`", "it is a file", "Name a new or empty folder"))
        copies = self._copies(folder)
        other = sorted(one.name for one in folder.iterdir() if not (_is_file_or_gone(one) and self.is_own(one.name, copies)))
        if not other and (folder / self.file).exists() and not self._wrote(folder / self.file):
            other = [self.file]
        if other:
            because = f"the folder holds something else, `{other[0]}`"
            because += ", which whichkl didn't write" if other[0] == self.file else ""
            raise InputError(cannot(f"save {self.what} in `{folder}`", because, "Name a new or empty folder"))

    def _wrote(self, path: Path) -> bool:
        """Whether a JSON file, even a damaged one, is a result's: it names weights as only a result does, or is next to them."""
        named = re.search(rf'"weights": "{self._weights_name}"'.encode(), read_file(path))
        weights = path.parent.glob(f"{self.weights}-*.safetensors")
        return named is not None or any(one.is_file() and _is_left_over(one) for one in weights)

    def is_own(self, name: str, copies: Sequence[str] = ()) -> bool:
        """Whether `write` gives files this name; a killed one leaves unfinished files of such names."""
        own = f"({'|'.join([re.escape(self.file), self._weights_name, *map(re.escape, copies)])})"
        pattern = rf"({re.escape(TEMPORARY)}|\.){own}-\w{{8}}|{own}|{re.escape(LOCK)}"
        return re.fullmatch(pattern, name) is not None

    def _copies(self, folder: Path) -> list[str]:
        """Return the names of the copies for other programs that are as the JSON file in a folder has them, if it is whole."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            fields = read_json(read_file(folder / self.file))
            if checksum(fields) == fields.get("checksum"):
                known = {name: digest for name, digest in fields.get(_COPIES, {}).items() if _PLAIN_NAME.fullmatch(name)}
                return [name for name, digest in known.items() if _is_gone_or_has(folder / name, digest)]
        return []

    @property
    def _weights_name(self) -> str:
        """Regular expression of the names of weights."""
        return rf"{self.weights}-[0-9a-f]{{16}}\.safetensors"

    def read(self, folder: Path, kind: Any) -> tuple[Any, dict[str, Tensor]]:
        """Read a saved result, with every checksum, field and number checked.

        Its fields are those of the `TypedDict` `kind`.

        Raises:
            InputError: there is no result.
            IntegrityError: a file was changed, cut short, or written by a newer version.
            ResourceError: a file can't be read.
        """
        path = folder / self.file
        try:
            text, weights = self._read_both(folder)
            return self._checked(folder, text, weights, kind), read_tensors(weights)
        except FileNotFoundError as error:
            because = f"there is no {self.what.removeprefix('a ')} in it: `{Path(str(error.filename)).name}` is missing"
            raise InputError(cannot(f"load {self.what} from `{folder}`", because, "Correct the path")) from error
        except (IsADirectoryError, NotADirectoryError) as error:
            raise self.damaged(folder, f"`{Path(str(error.filename)).name}` isn't a file") from error
        except OSError as error:
            do, because = f"read `{error.filename or path}`", error.strerror or str(error)
            raise ResourceError(cannot(do, because, "Check this path, and the disk")) from error
        except ValueError as error:
            if isinstance(error, WhichklError):
                raise
            raise self.damaged(folder, str(error)) from error

    def damaged(self, folder: Path, why: str) -> IntegrityError:
        """Return the error for a result that isn't what was saved."""
        return IntegrityError(cannot(f"load `{folder}`", f"it isn't what was saved: {why}", self.again))

    def _read_both(self, folder: Path) -> tuple[bytes, bytes]:
        """Read the JSON file and its weights; start again if another process replaced them in between."""
        text = read_file(folder / self.file)
        for _ in range(_MAX_READS):
            try:
                return text, read_file(folder / self._weights_of(text))
            except FileNotFoundError:
                now = read_file(folder / self.file)
                if now == text:
                    raise self.damaged(folder, f"`{self._weights_of(text)}` is missing") from None
                text = now
        raise ResourceError(cannot(f"read `{folder}`", "other processes keep replacing it", "Wait for them"))

    def _weights_of(self, text: bytes) -> str:
        fields = read_json(text)
        name = fields.get("weights") if isinstance(fields, dict) else None
        if not isinstance(name, str) or not re.fullmatch(self._weights_name, name):
            raise ValueError(f"{self.file} names no weights")
        return name

    def _checked(self, folder: Path, text: bytes, weights: bytes, kind: Any) -> Any:
        fields = read_json(text)
        if type(fields.get("format")) is int and fields["format"] > FORMAT:
            raise IntegrityError(cannot(f"load `{folder}`", "a newer version wrote it", "Upgrade whichkl"))
        if checksum(fields) != fields.get("checksum"):
            raise ValueError(f"the checksum of {self.file} differs")
        if fields.get("format") != FORMAT:
            raise ValueError(f"there is no format {str(fields.get('format'))[:20]}")
        if hashlib.sha256(weights).hexdigest() != fields.get("sha256"):
            raise ValueError(f"the SHA-256 of {fields['weights']} differs")
        return checked(kind, fields)


def _is_file_or_gone(entry: Path) -> bool:
    """Whether an entry is a regular file, or another process that saves into the same folder has just removed it."""
    try:
        return stat.S_ISREG(entry.lstat().st_mode)
    except FileNotFoundError:
        return True


def _is_gone_or_has(path: Path, digest: str) -> bool:
    """Whether there is no file, or one with this SHA-256."""
    return not path.exists() or (path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest)


def _is_left_over(entry: Path) -> bool:
    """Whether a killed save left a file: an unfinished one, or weights whose name is the hash of their content."""
    if entry.name.startswith((TEMPORARY, ".")):
        return entry.name != LOCK
    is_weights = entry.name.endswith(".safetensors")
    return is_weights and hashlib.sha256(entry.read_bytes()).hexdigest()[:16] == entry.stem.rpartition("-")[2]


def checksum(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the fields of a JSON file except its own checksum."""
    rest = {key: value for key, value in fields.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()
