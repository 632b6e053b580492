"""Stream: samples as an ordered list of parts, each read block by block, so that memory doesn't grow with the rows."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.printable import brief
from whichkl.samples.reading import Reading

BLOCK = 16_384
"""Rows that are processed at once: few enough for the processor's cache, many enough for its matrix units."""
PART = 65_536
"""Rows of a part of samples in memory."""


@dataclass(frozen=True)
class Block:
    """Rows of samples, their weights, and what they are conditioned on, if anything."""

    __repr__ = brief

    x: Float[Tensor, "m d"]
    w: Float[Tensor, " m"]
    context: Float[Tensor, "m c"] | None = None
    first: int = 0
    """The number of its first row within its part; it decides which rows are held out."""
    fresh: bool = False
    """Whether its x was allocated for this reading, so that its reader may overwrite it."""
    total: Float[Tensor, " d"] | None = None
    """The column sums of x, where all weights are 1 and the reader computed them to check that x is finite."""
    log_p: Float[Tensor, " m"] | None = None
    """Log p of the rows, where a solver reads both."""
    keys: Int[Tensor, " m"] | None = None
    """Numbers that rows share which must be held out together: equal rows, or stretches of chains."""
    numbers: Int[Tensor, " m"] | None = None
    """The numbers of its rows within their part, where some rows are left out."""
    left_out: int = 0
    """The number of rows that are left out, since a cell was missing."""

    def __len__(self) -> int:
        return self.x.shape[0]

    def take(self, rows: Tensor) -> Block:
        """Return some of the rows: their numbers, or a mask."""
        context, log_p, keys = (None if one is None else one[rows] for one in (self.context, self.log_p, self.keys))
        return Block(self.x[rows], self.w[rows], context, self.first, log_p=log_p, keys=keys)

    def thinned(self, most: int) -> Block:
        """Return `most` of the rows, evenly; all if there are fewer."""
        step = len(self) / most
        return self if step <= 1 else self.take((step * torch.arange(most, dtype=torch.float64, device="cpu")).long())


class Part(ABC):
    """A piece of a stream that one worker reads; it is small when pickled if its rows are in a file."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The source of its rows for messages, such as ``"`a.parquet`, row group 3"``."""

    def place(self, row: int) -> str:
        """Return where the row of this number in this part is, for messages; rows count from 0."""
        return f"row {row:,} of {self.label}"

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Read its rows in order, in blocks of some ten thousand rows, in floating point and finite; the same each time.

        Raises:
            InputError: a file is missing or broken, or a cell isn't finite; the message names file, row group and column.
        """


class Stream(ABC):
    """Samples in parts. Names and sizes are read once, from metadata and from the first rows."""

    names: tuple[str, ...]
    """The d column names."""
    context_names: tuple[str, ...] = ()
    """The c names of what the rows are conditioned on; none where its blocks have no context."""

    reading: Reading = Reading()
    """How it is read, with the labels of its categories."""

    @property
    def left_out(self) -> int:
        """The number of rows that are left out, since a cell is missing."""
        return 0

    @property
    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """All parts, in a fixed order."""

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """The number of rows, where it is known without reading them all."""

    @property
    def about(self) -> int:
        """The number of rows, or a guess at it."""
        return 1_000_000 if self.rows is None else self.rows

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of all rows in float64, or a guess at them."""
        return 8 * self.about * (len(self.names) + len(self.context_names))

    @property
    def identity(self) -> str:
        """A hash that identifies this stream: its parts, with the size and time of their files."""
        return hashlib.sha256("\n".join(repr(part) for part in self.parts).encode()).hexdigest()

    @cached_property
    def first(self) -> Block:
        """The first block of the first part that has rows."""
        for part in self.parts:
            for block in part.blocks():
                if len(block):
                    return block
        raise ValueError("an empty stream")


@dataclass(frozen=True)
class Slice(Part):
    """Rows that are in memory."""

    block: Block
    start: int = 0

    @property
    def label(self) -> str:
        """The numbers of its rows."""
        return f"rows {self.start:,} to {self.start + len(self.block) - 1:,}"

    def blocks(self) -> Iterator[Block]:
        """Cut the rows into blocks."""
        b = self.block
        for i in range(0, len(b), BLOCK):
            yield b.take(slice(i, i + BLOCK))  # type: ignore[arg-type]


def joined(blocks: Sequence[Block]) -> Block:
    """Put blocks together into one, with their contexts and keys."""
    context = [block.context for block in blocks if block.context is not None]
    keys = [block.keys for block in blocks if block.keys is not None]
    x, w = torch.cat([block.x for block in blocks]), torch.cat([block.w for block in blocks])
    return Block(x, w, torch.cat(context) if context else None, keys=torch.cat(keys) if keys else None)


def slices(block: Block, size: int = PART) -> tuple[Slice, ...]:
    """Cut rows in memory into even parts of at most `size` rows, so that threads have as much to do.

    They are the same on every machine, and so are sums over them.
    """
    count = max(1, -(-len(block) // size))
    count += count > 1 and count % 2  # pairs of parts
    size = max(1, -(-len(block) // count))
    return tuple(Slice(block.take(slice(i, i + size)), i) for i in range(0, len(block), size))  # type: ignore[arg-type]
