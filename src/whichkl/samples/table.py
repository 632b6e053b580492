"""Table: a sample file read into one float64 matrix with column names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from whichkl._checks import InputError, cannot
from whichkl.process.memory import check_memory
from whichkl.samples.file_formats import open_file
from whichkl.samples.shard import Shard


@dataclass(frozen=True)
class Table:
    """What a sample file holds: float64 values (n, d) and d column names."""

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
    return table_of(open_file(path))


def table_of(shard: Shard) -> Table:
    """Read all rows of an open file into memory.

    Raises:
        InputError: it is damaged, or has no rows.
        ResourceError: its values need more memory than is free.
    """
    check_memory(2 * shard.bytes_in_memory, f"read `{shard.path}` into memory", "Give a part of it")
    blocks = (x.numpy() for part in shard.parts(_ALL) for x in part.rows())
    values = _joined(list(blocks), len(shard.names)) if shard.rows is None else _filled(blocks, (shard.rows, len(shard.names)))
    if values.size == 0:
        because = f"it holds {values.shape[0]} rows and {values.shape[1]} columns"
        raise InputError(cannot(f"read `{shard.path}`", because, "Write at least one row of numbers"))
    return Table(values, shard.names)


def _joined(blocks: list[np.ndarray], columns: int) -> np.ndarray:
    values = np.empty((sum(map(len, blocks)), columns))
    return np.concatenate(blocks, out=values) if blocks else values


def _filled(blocks: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    values, start = np.empty(shape), 0
    for block in blocks:
        values[start : start + len(block)] = block
        start += len(block)
    return values


_ALL = 2**62
"""Rows of a part: one part holds them all."""
