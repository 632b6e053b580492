"""Pairing: the columns of samples, in memory or streamed, are split into x, which is given, and y, which is modelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from whichkl._checks import InputError, cannot
from whichkl.arrays import read_matrix, read_names
from whichkl.process.seeds import seeded
from whichkl.samples import Block, Loaded, Part, Stream, Table
from whichkl.samples.loader import LoaderPart


def columns_of(given: str | Sequence[str], names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the numbers of the columns of x, in the given order, and of the remaining columns, y.

    >>> columns_of(["dose"], ["visits", "dose"])
    ([1], [0])
    """
    wanted = [given] if isinstance(given, str) else [str(name) for name in given]
    do = f"use `given={wanted}`"
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        shown = ", ".join(f"`{name}`" for name in names[:20]) + (", …" if len(names) > 20 else "")
        because = f"there is no column `{missing[0]}`, but {shown}" if missing else "it names no column"
        raise InputError(cannot(do, because, "Name the columns of x"))
    if len(set(wanted)) < len(wanted):
        raise InputError(cannot(do, "a column appears twice", "Name each column once"))
    x = [list(names).index(name) for name in wanted]
    y = [i for i in range(len(names)) if i not in x]
    if not y:
        raise InputError(cannot(do, "no column is left for y", "Name fewer columns"))
    return x, y


@dataclass(frozen=True)
class PairedPart(Part):
    """A part of another stream, as pairs."""

    part: Part
    x: tuple[int, ...]
    y: tuple[int, ...]

    @property
    def label(self) -> str:
        """The label of the part."""
        return self.part.label

    def blocks(self) -> Iterator[Block]:
        """Read the part's rows as pairs."""
        for block in self.part.blocks():
            yield replace(block, x=block.x[:, list(self.y)], context=block.x[:, list(self.x)])


class Paired(Stream):
    """A stream of pairs (x, y): x are columns of another stream, y are its other columns.

    Args:
        stream: rows of all columns.
        given: the names of the columns of x.

    Raises:
        InputError: a column doesn't exist, or none is left for y.
    """

    def __init__(self, stream: Stream, given: str | Sequence[str]) -> None:
        """Split the columns."""
        if stream.context_names:
            raise InputError(cannot("use `given=` here", "the samples are pairs (x, y) already", "Leave it out"))
        x, y = columns_of(given, stream.names)
        self._stream, self._x, self._y = stream, tuple(x), tuple(y)
        self.names = tuple(stream.names[i] for i in y)
        self.context_names = tuple(stream.names[i] for i in x)

    @property
    def parts(self) -> Sequence[Part]:
        """As in the other stream."""
        return [PairedPart(part, self._x, self._y) for part in self._stream.parts]

    @property
    def rows(self) -> int | None:
        """As in the other stream."""
        return self._stream.rows

    @property
    def bytes_in_memory(self) -> int:
        """As in the other stream."""
        return self._stream.bytes_in_memory


def has_flat_response(stream: Stream) -> bool:
    """Whether y is a scalar: a loader gives it as (n,), or it is the only column besides those of x.

    The blocks of a stream are matrices, so the first item of a loader is read to see its shape.
    """
    if not isinstance(stream, Loaded):
        return isinstance(stream, Paired) and len(stream.names) == 1
    (part,) = stream.parts
    if not stream.context_names or not isinstance(part, LoaderPart):
        return False
    with seeded(0):
        data: Any = part.loader.dataset
        is_whole = part.loader.batch_size is None or isinstance(data, IterableDataset)
        batch = next(iter(part.loader)) if is_whole else part.loader.collate_fn([data[0]])
    return bool(np.ndim(batch[1]) == 1)


def split_columns(
    found: Table | Stream | None, samples: Any, names: Sequence[str] | None, given: str | Sequence[str]
) -> tuple[Stream | None, Any, tuple[str, ...], tuple[str, ...]]:
    """Return the stream of pairs or the pair (x, y) in memory, and the names of y and of x; a single column y is (n,).

    Args:
        found: the opened samples, if they are files or a stream.
        samples: otherwise an array or a DataFrame.
        names: the names of all columns; by default their own, or x1, x2, …
        given: the names of the columns of x.
    """
    if isinstance(found, Stream):
        stream = Paired(found, given)
        return stream, None, stream.names, stream.context_names
    if samples is None or isinstance(samples, tuple):
        because = "there are no samples" if samples is None else "the samples are pairs (x, y) already"
        raise InputError(cannot("use `given=` here", because, "Leave it out, or pass one table of samples"))
    table = read_matrix(samples)
    known = read_names(names, samples, table.shape[1])
    x, y = columns_of(given, known)
    of_y = table[:, y[0]] if len(y) == 1 else table[:, y]
    return None, (table[:, x], of_y), tuple(known[i] for i in y), tuple(known[i] for i in x)
