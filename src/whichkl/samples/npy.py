"""NPY: one matrix in a file, its rows mapped into memory a few at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.samples.shard import FilePart, Shard, block_rows, stamp

_BLOCKS = 16
"""Blocks that are mapped at once."""


@dataclass(frozen=True)
class NpyPart(FilePart):
    """Consecutive rows of an NPY file."""

    start: int
    stop: int

    @property
    def label(self) -> str:
        """The file and its rows."""
        return f"`{self.path}`, rows {self.start:,} to {self.stop - 1:,}"

    def place(self, row: int) -> str:
        """Name the row of the file."""
        return f"row {self.start + row:,} of `{self.path}`"

    def rows(self) -> Iterator[Float[Tensor, "m d"]]:
        """Map the file anew every few blocks, so that pages that have been read are let go."""
        step = block_rows(len(self.names))
        for first in range(self.start, self.stop, _BLOCKS * step):
            values = open_array(self.path, mapped="r")[first : min(first + _BLOCKS * step, self.stop)]
            for start in range(0, len(values), step):
                yield torch.from_numpy(np.array(values[start : start + step], dtype=np.float64, order="C"))


@dataclass(frozen=True)
class NpyShard(Shard):
    """An NPY file, as its header tells it."""

    def parts(self, rows: int) -> Sequence[NpyPart]:
        """Cut after every so many rows."""
        count = self.rows or 0
        return [NpyPart(self.path, self.size, self.changed, self.names, i, min(i + rows, count)) for i in range(0, count, rows)]


def open_npy(path: str) -> NpyShard:
    """Read an NPY file's header.

    Raises:
        InputError: it isn't a whole NPY file of numbers.
    """
    values = open_array(path, mapped="r")
    names = tuple(f"x{i + 1}" for i in range(values.shape[1]))
    if not names:
        raise InputError(cannot(f"read `{path}`", "it has no columns", "Write at least one column of numbers"))
    return NpyShard(*stamp(path), names, (str(values.dtype),) * len(names), len(values))


def open_array(path: str | os.PathLike[str], mapped: Literal["r"] | None = None) -> np.ndarray:
    """Read an NPY file of numbers as a matrix of its own type, or map it into memory; (n,) becomes (n, 1).

    Raises:
        InputError: it is cut short, pickled, not of numbers, or has more than two axes.
    """
    try:
        values: np.ndarray = np.load(path, mmap_mode=mapped, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(cannot(f"read `{path}`", f"it isn't a whole NPY file of numbers ({error})", "Write it anew")) from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        kind = f"its type is `{values.dtype}`, not a number" if isinstance(values, np.ndarray) else "it is an archive of arrays"
        raise InputError(cannot(f"read `{path}`", kind, "Save one array of floats"))
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise InputError(cannot(f"read `{path}`", f"its shape is {values.shape}, not (n, d)", "Save one row a draw"))
    return values
