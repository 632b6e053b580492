"""Shard: one file of a stream, its columns, and the parts that it is cut into."""

from __future__ import annotations

import itertools
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, ResourceError, WhichklError, cannot
from whichkl.samples.faults import Faults, unreadable
from whichkl.samples.reading import Reading
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
    """The columns that are used."""
    count: int | None
    """The number of its rows, where the file's metadata state it."""
    start: int
    """The number of its first row in the file, from 0."""
    reading: Reading = field(default=Reading(), kw_only=True)
    unit: ClassVar[str] = "row"
    """What `numbers` counts."""

    @abstractmethod
    def decoded(self) -> Iterator[Float[Tensor, "m d"]]:
        """Decode its rows in order, in float64, `block_rows` at once, into new memory; a missing cell is NaN."""

    @abstractmethod
    def faults(self) -> Faults:
        """Count the cells of each column that can't be used."""

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
            raise unreadable(self.path, f"{self.label} holds {held} rows, and its metadata state {self.count:,}", REWRITE)

    def numbers(self) -> Iterator[int]:
        """Yield the number of each row, as messages and scores give it: from 0 in the file; the line of a text file."""
        return itertools.count(self.start)

    def place(self, row: int) -> str:
        """Return where the row of this number in this part is in the file, for messages."""
        return f"row {self.start + row:,} of `{self.path}`"

    def numbered(self) -> Iterator[tuple[Block, np.ndarray]]:
        """Yield its blocks, each with the numbers of its rows as `numbers` gives them."""
        numbers, start = self.numbers(), 0
        for block in self.blocks():
            count = len(block) + block.left_out
            of_block = np.fromiter(itertools.islice(numbers, count), np.int64, count)
            yield block, of_block if block.numbers is None else of_block[block.numbers.numpy() - start]
            start += count

    def blocks(self) -> Iterator[Block]:
        """Read its rows; refuse a cell that isn't finite, and leave out rows with a missing cell if that was chosen."""
        start, weights = 0, torch.ones(_MAX_ROWS_PER_BLOCK, dtype=torch.float64, device="cpu")
        for x in self.rows():
            total, numbers, left_out = x.sum(0), None, len(x)
            if not math.isfinite(total.sum().item()):  # a sum can also overflow, so look closely
                x, numbers = self._repaired(x, start)
                total = x.sum(0)
            start, left_out = start + left_out, left_out - len(x)
            w = weights[: len(x)] if len(x) <= _MAX_ROWS_PER_BLOCK else torch.ones(len(x), dtype=torch.float64, device="cpu")
            yield Block(x, w, fresh=True, total=total, numbers=numbers, left_out=left_out)

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

    def _repaired(self, x: Float[Tensor, "m d"], start: int) -> tuple[Float[Tensor, "k d"], Int[Tensor, " k"] | None]:
        """Return the rows that are kept, and their numbers in this part if some are left out."""
        numbers = None
        if self.reading.missing == "drop":
            is_whole = ~x.isnan().any(1)
            x, numbers = x[is_whole], start + is_whole.nonzero()[:, 0]
        if not bool(x.isfinite().all()):
            raise self.faults().error(self.label)
        return x, numbers


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
    reading: Reading = field(default=Reading(), kw_only=True)
    all_names: tuple[str, ...] = field(default=(), kw_only=True)
    """All columns of the file, also those that aren't used."""

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


REWRITE = "Write it again; a copy may have been damaged"


def refuse_broken(path: str, kind: str, reason: str) -> InputError:
    """Return the error for a file that isn't of the format of its suffix, or isn't whole."""
    return unreadable(path, f"it isn't a whole {kind} file ({reason})", "Write it again; a copy may have been cut short")


def refuse_damaged(path: str, place: str, reason: str) -> InputError:
    """Return the error for a file that is broken in one place."""
    return unreadable(path, f"{place} is broken ({reason})", REWRITE)
