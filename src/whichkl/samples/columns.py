"""Columns: which columns of a file hold numbers, and how they become float64."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import require
from whichkl.arrays import check_whole
from whichkl.samples.faults import unreadable

_MAX_COLUMNS = 2**17
"""Largest number of columns of a table: each costs its reader up to 10 kB, whatever it holds. A matrix in NPY costs nothing."""


def check_names(file: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Refuse columns without a name, names that appear twice, and more columns than a table can have."""
    check_columns(file, len(names))
    if not names:
        raise unreadable(file, "it has no columns", "Write at least one column of numbers")
    if any(not name.strip() or name == "__index_level_0__" for name in names):
        because = "a column has no name: it may be an index that pandas wrote next to the data"
        raise unreadable(file, because, "Write it with index=False, or name the column")
    if len(set(names)) != len(names):
        doubled = sorted(name for name, count in Counter(names).items() if count > 1)
        shown = ", ".join(repr(name[:40]) for name in doubled[:5]) + (", …" if len(doubled) > 5 else "")
        raise unreadable(file, f"the column names [{shown}] appear twice", "Rename them")


def check_columns(file: str | os.PathLike[str], count: int) -> None:
    """Refuse a table of very many columns."""
    if count > _MAX_COLUMNS:
        because = f"it has {count:,} columns, and a table can have at most {_MAX_COLUMNS:,}"
        raise unreadable(file, because, "Save one matrix, as .npy")


def holds_numbers(kind: Any) -> bool:
    """Whether an Arrow type holds numbers: floats, integers, booleans, decimals, or nothing but nulls."""
    types = require("pyarrow", "app").types
    return bool(is_plain(kind) or types.is_boolean(kind) or types.is_decimal(kind) or types.is_null(kind))


_PLAIN = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"float", "double", "halffloat"}


def is_plain(kind: Any) -> bool:
    """Whether an Arrow type is one of whole or floating numbers, whose memory NumPy can read directly."""
    return str(kind) in _PLAIN


def floats(column: Any) -> np.ndarray:
    """Return the numbers of an Arrow column, without a copy where possible; a null becomes NaN."""
    if column.null_count or not is_plain(column.type):
        types = require("pyarrow", "app").types
        if types.is_integer(column.type):  # a null would make float64 of it, with fewer digits
            check_whole(column.drop_null().to_numpy(zero_copy_only=False), "samples")
        column = column.cast("float64", safe=False)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def matrix_of(columns: Sequence[np.ndarray], rows: int) -> Float[Tensor, "m d"]:
    """Copy columns into one float64 tensor, which lies in memory column by column."""
    values = np.empty((len(columns), rows))
    with np.errstate(all="ignore"):  # a NaN that signals is refused as any other
        for out, column in zip(values, columns, strict=True):
            check_whole(column, "samples")
            out[:] = column
    return torch.from_numpy(values).T
