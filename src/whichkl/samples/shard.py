"""Shard: one file of a stream, its columns, and the parts that it is cut into."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, ResourceError, WhichklError, cannot
from whichkl.samples.stream import Block, Part

_MAX_ROWS_PER_BLOCK = 32_768
"""Enough rows that Python's overhead per block doesn't count."""
_CACHED_VALUES = 2**19
"""Values of a block that stay in the processor's cache; a block of 512 rows or fewer may have more."""
_MAX_VALUES = 2**25
"""Largest number of values of a block, 256 MB, however many columns there are."""


def block_rows(columns: int) -> int:
    """Return the number of rows in a block of a file; wide rows make smaller blocks.

    >>> block_rows(2), block_rows(16), block_rows(1_000), block_rows(1_000_000)
    (32768, 32768, 524, 33)
    """
    return max(1, min(512, _MAX_VALUES // columns), min(_MAX_ROWS_PER_BLOCK, _CACHED_VALUES // columns))


@dataclass(frozen=True)
class FilePart(Part):
    """A piece of a file. It knows the size that the file had when the stream was opened, so that a changed file is noticed."""

    path: str
    size: int
    changed: int
    """Time of the last change in nanoseconds; it identifies data, and isn't checked, since copies on other machines differ."""
    names: tuple[str, ...]
    count: int | None
    """The number of its rows, where the file's metadata state it."""

    @abstractmethod
    def decoded(self) -> Iterator[Float[Tensor, "m d"]]:
        """Decode its rows in order, in float64, `block_rows` at once, into new memory."""

    def rows(self) -> Iterator[Float[Tensor, "m d"]]:
        """Read its rows, and refuse a part with another number of rows than the file's metadata state."""
        self._check_file()
        found = 0
        for x in self.decoded():
            found += len(x)
            if self.count is not None and found > self.count:
                break
            yield x
        if self.count is not None and found != self.count:
            held = f"more than {self.count:,}" if found > self.count else f"only {found:,}"
            raise unreadable(self.path, f"{self.label} holds {held} rows, and its metadata state {self.count:,}", _REWRITE)

    def place(self, row: int) -> str:
        """Return where the row of this number in this part is in the file, for messages."""
        return f"row {row:,} of {self.label}"

    def blocks(self) -> Iterator[Block]:
        """Read its rows, and refuse those with a value that isn't finite."""
        start, weights = 0, torch.ones(_MAX_ROWS_PER_BLOCK, dtype=torch.float64, device="cpu")
        for x in self.rows():
            total = x.sum(0)
            if not math.isfinite(total.sum().item()):  # a sum can also overflow, so look closely
                self._refuse(x, start)
            start += len(x)
            w = weights[: len(x)] if len(x) <= _MAX_ROWS_PER_BLOCK else torch.ones(len(x), dtype=torch.float64, device="cpu")
            yield Block(x, w, fresh=True, total=total)

    def _check_file(self) -> None:
        try:
            size = os.stat(self.path).st_size
        except OSError as error:
            because = f"{(error.strerror or str(error)).lower()} on this machine"
            instead = "Put it where every machine that reads it finds it under this path"
            raise unreadable(self.path, because, instead) from error
        if size != self.size:
            because = f"it has {size:,} bytes now, and had {self.size:,} when it was opened"
            raise unreadable(self.path, because, "Leave the files alone until the fit is done")

    def _refuse(self, x: Float[Tensor, "m d"], start: int) -> None:
        bad = (~x.isfinite()).nonzero()
        if len(bad) == 0:
            return
        row, column = (int(i) for i in bad[0])
        found = "missing or NaN" if bool(x[row, column].isnan()) else "infinite"
        because = f"column `{self.names[column]}` is {found} in {self.place(start + row)} (rows count from 0)"
        raise InputError(cannot("use these samples", because, "Drop or repair such rows first"))


@dataclass(frozen=True)
class Shard:
    """The metadata of a file.

    Args:
        path: the file, absolute.
        size: its bytes.
        changed: when it was last written, in nanoseconds.
        names: its column names.
        types: their types, as text that can be compared with another shard's.
        rows: how many there are; None where that isn't known without reading them all.
        parts: cuts the file into parts of about this many rows, as its format allows; always the same parts.
    """

    path: str
    size: int
    changed: int
    names: tuple[str, ...]
    types: tuple[str, ...]
    rows: int | None
    parts: Callable[[int], Sequence[FilePart]] = field(repr=False)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of its values in float64, which can be a thousand times the size of a compressed file."""
        return 8 * (self.rows or 0) * len(self.names)


def stamp(path: str) -> tuple[str, int, int]:
    """Return a file's path, its size, and when it was last written."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


@contextmanager
def decoding(path: str, refusal: Callable[[str], InputError]) -> Iterator[None]:
    """Turn whatever a decoder raises into one error that names the file.

    Raises:
        InputError: the file is broken.
        ResourceError: memory ran out.
    """
    try:
        yield
    except WhichklError:
        raise
    except MemoryError as error:
        raise ResourceError(
            cannot(f"read `{path}`", "there isn't enough memory to decode it", "Write it in smaller parts")
        ) from error
    except Exception as error:  # bytes that no writer wrote make decoders raise anything: OverflowError, KeyError, …
        raise refusal(f"{' '.join(str(error).split())[:200]}") from error


_REWRITE = "Write it again; a copy may have been damaged"


def unreadable(path: Any, because: str, instead: str) -> InputError:
    """Return the error for a file that can't be read."""
    return InputError(cannot(f"read `{path}`", because, instead))


def refuse_broken(path: str, kind: str, reason: str) -> InputError:
    """Return the error for a file that isn't of the format of its suffix, or isn't whole."""
    return unreadable(path, f"it isn't a whole {kind} file ({reason})", "Write it again; a copy may have been cut short")


def refuse_damaged(path: str, place: str, reason: str) -> InputError:
    """Return the error for a file that is broken in one place."""
    return unreadable(path, f"{place} is broken ({reason})", _REWRITE)
