"""NPY: one matrix in a file, its rows mapped into memory a few at a time."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError
from whichkl.arrays import check_whole
from whichkl.samples.shard import FilePart, Shard, block_rows, decoding, stamp, unreadable

_BLOCKS_PER_MAP = 16
_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000
"""Largest header in bytes, as in NumPy; that of one matrix has 118."""
_MAX_COLUMNS = 2**22
"""Largest number of columns: their names take 60 bytes each."""
_KEYS = {"descr", "fortran_order", "shape"}
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f(2|4|8|12|16))")
_PYTHON_2_INTEGER = re.compile(r"(?<=\d)L\b")


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

    start: int
    stop: int
    header: Header

    @property
    def label(self) -> str:
        """The file and its rows."""
        return f"`{self.path}`, rows {self.start:,} to {self.stop - 1:,}"

    def place(self, row: int) -> str:
        """Name the row of the file."""
        return f"row {self.start + row:,} of `{self.path}`"

    def decoded(self) -> Iterator[Float[Tensor, "m d"]]:
        """Map the file again every few blocks, so that pages that have been read are released."""
        step = block_rows(len(self.names))
        for first in range(self.start, self.stop, _BLOCKS_PER_MAP * step):
            with decoding(self.path, partial(_refuse, self.path)):
                values = self.header.mapped(self.path)[first : min(first + _BLOCKS_PER_MAP * step, self.stop)]
            for start in range(0, len(values), step):
                with np.errstate(all="ignore"):  # what is wider than float64 becomes infinite, which is refused later
                    check_whole(values[start : start + step], "samples")
                    block = np.array(values[start : start + step], dtype=np.float64, order="C")
                yield torch.from_numpy(block)


@dataclass(frozen=True)
class NpyShard(Shard):
    """The metadata of an NPY file."""

    header: Header

    def parts(self, rows: int) -> Sequence[NpyPart]:
        """Cut into parts of this many rows."""
        count = self.rows or 0
        cuts = [(i, min(i + rows, count)) for i in range(0, count, rows)]
        where = (self.path, self.size, self.changed, self.names)
        return [NpyPart(*where, stop - start, start, stop, self.header) for start, stop in cuts]


def open_npy(path: str) -> NpyShard:
    """Read an NPY file's header; the shape (n,) is read as (n, 1)."""
    with decoding(path, partial(_refuse, path)), open(path, "rb") as file:
        header = _header(path, file)
    names = tuple(f"x{i + 1}" for i in range(header.shape[1]))
    if not names:
        raise unreadable(path, "it has no columns", "Write at least one column of numbers")
    return NpyShard(*stamp(path), names, (str(header.dtype),) * len(names), header.shape[0], header)


def _refuse(path: str, reason: str) -> InputError:
    return unreadable(path, f"it isn't a whole NPY file of numbers ({reason})", "Write it again")


def _header(path: str, file: BinaryIO) -> Header:
    """Read the header of a file, and compare what it claims with the file's size before anything is allocated."""
    fields, offset = _literal(file)
    if not isinstance(fields, dict) or set(fields) != _KEYS or type(fields["fortran_order"]) is not bool:
        raise ValueError("its header isn't one of NPY")
    kind, shape = fields["descr"], fields["shape"]
    if not isinstance(kind, str) or not _NUMBERS.fullmatch(kind):
        raise _refuse(path, f"its type is `{kind}`, not a number")
    if not isinstance(shape, tuple) or any(type(one) is not int or not 0 <= one < 2**63 for one in shape):
        raise ValueError(f"its shape is `{shape}`, not whole numbers")
    if len(shape) not in (1, 2):
        raise unreadable(path, f"its shape is `{shape}`, not (n, d)", "Save one row a draw")
    rows, columns = (*shape, 1)[:2]
    if columns > _MAX_COLUMNS:
        raise unreadable(path, f"it has {columns:,} columns, and at most {_MAX_COLUMNS:,} are read", "Save one row a draw")
    dtype, size = np.dtype(kind), os.fstat(file.fileno()).st_size - offset
    if rows * columns * dtype.itemsize != size:
        raise ValueError(f"{rows:,} × {columns:,} numbers are {rows * columns * dtype.itemsize:,} bytes, and it has {size:,}")
    return Header(dtype, (rows, columns), "F" if fields["fortran_order"] else "C", offset)


def _literal(file: BinaryIO) -> tuple[Any, int]:
    """Return the content of a header, and where it ends. It is a literal of Python: nothing in it is run."""
    start = file.read(len(_MAGIC) + 2)
    if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + 2:
        raise ValueError("it doesn't begin as one")
    version, wide = start[len(_MAGIC)], 2 if start[len(_MAGIC)] == 1 else 4
    if version not in (1, 2, 3):
        raise ValueError(f"its version is {version}")
    length = int.from_bytes(file.read(wide), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"its header has {length:,} bytes")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("its header is cut short")
    written = text.decode("utf-8" if version == 3 else "latin-1").strip()
    return ast.literal_eval(written if version == 3 else _PYTHON_2_INTEGER.sub("", written)), file.tell()
