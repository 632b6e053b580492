"""NPY: one matrix in a file, its rows mapped into memory a few at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError
from whichkl.arrays import check_whole, default_names
from whichkl.process.lock import without_warnings
from whichkl.samples.faults import Faults, unreadable
from whichkl.samples.reading import Reading, select
from whichkl.samples.shard import FilePart, Shard, block_rows, decoding, stamp

_BLOCKS_PER_MAP = 16
_MAX_COLUMNS = 2**22
"""Largest number of columns: their names take 60 bytes each."""


class Header(NamedTuple):
    """The header of an NPY file, compared with the file's size."""

    dtype: np.dtype[Any]
    shape: tuple[int, int]
    order: Any
    """"C" where rows are contiguous, "F" where columns are."""
    offset: int
    """Bytes before the numbers."""

    def mapped(self, path: str) -> np.ndarray:
        """Map the matrix into memory."""
        return np.memmap(path, self.dtype, "r", self.offset, self.shape, self.order) if min(self.shape) else np.empty(self.shape)


@dataclass(frozen=True)
class NpyPart(FilePart):
    """Consecutive rows of an NPY file."""

    stop: int
    header: Header

    @property
    def label(self) -> str:
        """The file and its rows."""
        return f"`{self.path}`, rows {self.start:,} to {self.stop - 1:,}"

    def decoded(self) -> Iterator[Float[Tensor, "m d"]]:
        """Map the file again every few blocks, so that pages that have been read are released."""
        step = block_rows(self.header.shape[1])
        for first in range(self.start, self.stop, _BLOCKS_PER_MAP * step):
            with decoding(self.path, partial(_refuse, self.path)):
                values = self.header.mapped(self.path)[first : min(first + _BLOCKS_PER_MAP * step, self.stop)]
            for start in range(0, len(values), step):
                with np.errstate(all="ignore"):  # what is wider than float64 becomes infinite, which is refused later
                    check_whole(values[start : start + step], "samples")
                    block = np.array(values[start : start + step], dtype=np.float64, order="C")
                yield select(torch.from_numpy(block), default_names(self.header.shape[1]), self.names)

    def faults(self) -> Faults:
        """Examine all cells."""
        faults, start = Faults("row", self.reading.missing == "drop"), self.start
        for x in self.decoded():
            faults.add_matrix(x, self.names, start)
            start += len(x)
        return faults


def open_npy(path: str, reading: Reading) -> Shard:
    """Read an NPY file's header; the shape (n,) is read as (n, 1)."""
    with decoding(path, partial(_refuse, path)), open(path, "rb") as file:
        header = _header(path, file)
    names = default_names(header.shape[1])
    if not names:
        raise unreadable(path, "it has no columns", "Write at least one column of numbers")
    if reading.categories:
        raise unreadable(path, "its columns hold numbers, and categories are labels", "Leave `categories` out")
    all_names, names = names, reading.chosen(names, f"`{path}`")
    where = (*stamp(path), names)
    kinds, cut = (str(header.dtype),) * len(names), partial(_cut, where, header, reading=reading)
    return Shard(*where, kinds, header.shape[0], cut, reading=reading, all_names=all_names)


def _cut(where: tuple[str, int, int, tuple[str, ...]], header: Header, rows: int, reading: Reading) -> list[NpyPart]:
    count = header.shape[0]
    cuts = [(i, min(i + rows, count)) for i in range(0, count, rows)]
    return [NpyPart(*where, stop - start, start, stop, header, reading=reading) for start, stop in cuts]


def _refuse(path: str, reason: str) -> InputError:
    return unreadable(path, f"it isn't a whole NPY file of numbers ({reason})", "Write it again")


def _header(path: str, file: BinaryIO) -> Header:
    """Read the header of a file, and compare what it claims with the file's size before anything is allocated."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"its version is {version[0]}")
    # the header of a matrix is ASCII, and then the third version is the second one
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with without_warnings():  # NumPy warns of headers that Python 2 wrote
        shape, is_fortran, dtype = read(file)
    if dtype.kind not in "biuf":
        raise _refuse(path, f"its type is `{dtype}`, not a number")
    if any(type(one) is not int or not 0 <= one < 2**63 for one in shape):
        raise ValueError(f"its shape is `{shape}`, not whole numbers")
    if len(shape) not in (1, 2):
        raise unreadable(path, f"its shape is `{shape}`, not (n, d)", "Save one row a draw")
    rows, columns = (*shape, 1)[:2]
    if columns > _MAX_COLUMNS:
        raise unreadable(path, f"it has {columns:,} columns, and at most {_MAX_COLUMNS:,} are read", "Save one row a draw")
    offset = file.tell()
    size = os.fstat(file.fileno()).st_size - offset
    if rows * columns * dtype.itemsize != size:
        raise ValueError(f"{rows:,} × {columns:,} numbers are {rows * columns * dtype.itemsize:,} bytes, and it has {size:,}")
    return Header(dtype, (rows, columns), "F" if is_fortran else "C", offset)
