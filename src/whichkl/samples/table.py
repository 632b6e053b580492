"""Sample files: CSV, Parquet, Arrow and NPY, read into one float64 matrix with column names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whichkl._checks import InputError, cannot, require
from whichkl.memory_limits import check_memory, refuse_if_ran_out
from whichkl.samples.columns import check_names, check_types, floats, is_number
from whichkl.samples.csv import explain, is_headerless
from whichkl.samples.npy import open_array

FORMATS = (".csv", ".parquet", ".arrow", ".feather", ".npy")


@dataclass(frozen=True)
class Table:
    """What a sample file holds: float64 values (n, d) and d column names."""

    values: np.ndarray
    names: tuple[str, ...]


def read_samples(path: str | os.PathLike[str]) -> Table:
    """Read a file of samples, one row a draw; its suffix names the format.

    A CSV whose first line is all numbers has no header, and its columns are called x1, x2, …

    Raises:
        InputError: the file is missing, empty, truncated, ragged or of another format, or a column holds text; the
            message names the file, the line and the column.
    """
    file = Path(path)
    suffix = check_file(file)
    if suffix == ".npy":
        values = open_array(file)
        check_memory(8 * values.size, f"read the {len(values):,} rows and {values.shape[1]:,} columns of `{file}`")
        values = values.astype(np.float64, copy=False)
        table = Table(values, tuple(f"x{i + 1}" for i in range(values.shape[1])))
    else:
        table = _read_arrow(file, suffix)
    if table.values.size == 0:
        because = f"it holds {table.values.shape[0]} rows and {table.values.shape[1]} columns"
        raise InputError(cannot(f"read `{file}`", because, "Write at least one row of numbers"))
    return table


def check_file(file: Path) -> str:
    """Return a file's suffix, where it is a known one and the file is there and not empty.

    Raises:
        InputError: otherwise.
    """
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        because = f"its suffix is `{suffix}`" if suffix else "it has no suffix"
        raise InputError(cannot(f"read `{file}`", because, f"Use one of {', '.join(FORMATS)}"))
    if not file.is_file():
        because = "it is a folder" if file.is_dir() else "there is no such file"
        raise InputError(cannot(f"read `{file}`", because, "Correct the path"))
    if file.stat().st_size == 0:
        raise InputError(cannot(f"read `{file}`", "the file is empty", "Write at least one row"))
    return suffix


def _read_arrow(file: Path, suffix: str) -> Table:
    arrow = require("pyarrow", "app")
    headerless = False
    try:
        if suffix == ".csv":
            headerless = is_headerless(file)
            module = require("pyarrow.csv", "app")
            options = module.ReadOptions(autogenerate_column_names=headerless)
            table = module.read_csv(file, read_options=options)
        elif suffix == ".parquet":
            table = require("pyarrow.parquet", "app").read_table(file, partitioning=None)
        else:
            table = require("pyarrow.feather", "app").read_table(file)
    except (arrow.ArrowException, UnicodeDecodeError, OSError) as error:
        refuse_if_ran_out(error, f"read `{file}`")
        if suffix == ".csv":
            explain(file, str(error))
        reason = " ".join(str(error).split())
        because = f"it isn't a whole {suffix[1:]} file ({reason})"
        raise InputError(cannot(f"read `{file}`", because, "Write it anew; a copy may have been cut short")) from error
    names = tuple(f"x{i + 1}" for i in range(table.num_columns)) if headerless else tuple(table.column_names)
    check_names(file, names)
    if suffix == ".csv":
        for name, column in zip(names, table.columns, strict=True):
            if not is_number(column.type):
                explain(file, f"column `{name}` holds {column.type}")
    check_types(file, names, [column.type for column in table.columns])
    return Table(np.column_stack([floats(column) for column in table.columns]).astype(np.float64, copy=False), names)
