"""Opening: a path, a folder, several paths or a DataLoader becomes a table in memory, or a stream."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from whichkl._checks import InputError, cannot
from whichkl.process.memory import check_memory
from whichkl.samples.file_formats import open_file
from whichkl.samples.folder import Shards, shards_in
from whichkl.samples.loader import Loaded
from whichkl.samples.shard import Shard, unreadable
from whichkl.samples.stream import Stream

IN_MEMORY = 256 * 2**20
"""A single file is read into memory if it has fewer bytes, and its values in float64 have, too."""
_ALL_ROWS = 2**62
"""A part with at least this many rows holds all of them."""


@dataclass(frozen=True)
class Table:
    """The content of a sample file: float64 values (n, d) and d column names."""

    values: np.ndarray
    names: tuple[str, ...]


def read_samples(path: str | os.PathLike[str]) -> Table:
    """Read a file of samples, one row a draw; its suffix names the format.

    A CSV whose first line is all numbers has no header, and its columns are called x1, x2, …

    Raises:
        InputError: the file is missing, empty, truncated, damaged, ragged or of another format, or a column holds text; the
            message names the file, the line and the column.
        ResourceError: its values need more memory than is free.
    """
    return _table_of(open_file(path))


def open_samples(obj: Any, *, is_whole: bool = False) -> Table | Stream | None:
    """Open what `obj` names: a table for one file below `IN_MEMORY` bytes, else a stream; None where it's something else.

    Args:
        obj: a path, a list of paths, a DataLoader, a Dataset, a stream, or anything else.
        is_whole: whether to read a single file of any size into memory.

    Raises:
        InputError: a file can't be read, or files don't fit together.
        ResourceError: it must be read into memory, and needs more than is free.
    """
    if not _is_named(obj):
        return None
    if isinstance(obj, (str, os.PathLike)) and not os.path.isdir(obj):
        shard = open_file(obj)
        if is_whole or max(shard.size, shard.bytes_in_memory) < IN_MEMORY:
            return _table_of(shard)
    return open_stream(obj)


def open_stream(obj: Any) -> Stream:
    """Open a sample file, a folder of them, a list of paths, a DataLoader or a Dataset as a stream.

    Raises:
        InputError: it is none of these, or can't be read.
    """
    if isinstance(obj, Stream):
        return obj
    if not _is_named(obj):
        because = f"a `{type(obj).__name__}` is neither a path, a list of paths, a DataLoader nor a Dataset"
        raise InputError(cannot("open it as a stream", because, "Give one of these"))
    if isinstance(obj, (DataLoader, Dataset)):
        return Loaded(obj)
    if isinstance(obj, list):
        return Shards(obj)
    return Shards(shards_in(obj) if os.path.isdir(obj) else [obj])


def _is_named(obj: Any) -> bool:
    paths = isinstance(obj, list) and len(obj) > 0 and all(isinstance(one, (str, os.PathLike)) for one in obj)
    return paths or isinstance(obj, (str, os.PathLike, DataLoader, Dataset, Stream))


def _table_of(shard: Shard) -> Table:
    """Read all rows of an open file into memory."""
    check_memory(2 * shard.bytes_in_memory, f"read `{shard.path}` into memory", "Give a part of it")
    blocks = (x.numpy() for part in shard.parts(_ALL_ROWS) for x in part.rows())
    values = _filled(blocks, shard.rows, len(shard.names))
    if values.size == 0:
        because = f"it holds {values.shape[0]} rows and {values.shape[1]} columns"
        raise unreadable(shard.path, because, "Write at least one row of numbers")
    return Table(values, shard.names)


def _filled(blocks: Iterable[np.ndarray], rows: int | None, columns: int) -> np.ndarray:
    """Copy blocks into one matrix; all blocks are in memory at once only where the number of rows isn't known."""
    if rows is None:
        blocks = list(blocks)
        rows = sum(map(len, blocks))
    values, start = np.empty((rows, columns)), 0
    for block in blocks:
        values[start : start + len(block)] = block
        start += len(block)
    return values
