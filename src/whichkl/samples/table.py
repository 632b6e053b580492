"""Sample files: CSV, Parquet, Arrow and NPY, read into one float64 matrix with column names."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from whichkl._checks import InputError, cannot, require

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
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        because = f"its suffix is `{suffix}`" if suffix else "it has no suffix"
        raise InputError(cannot(f"read `{file}`", because, f"Use one of {', '.join(FORMATS)}"))
    if not file.is_file():
        because = "it is a folder" if file.is_dir() else "there is no such file"
        raise InputError(cannot(f"read `{file}`", because, "Correct the path"))
    if file.stat().st_size == 0:
        raise InputError(cannot(f"read `{file}`", "the file is empty", "Write at least one row"))
    table = _read_npy(file) if suffix == ".npy" else _read_arrow(file, suffix)
    if table.values.size == 0:
        because = f"it holds {table.values.shape[0]} rows and {table.values.shape[1]} columns"
        raise InputError(cannot(f"read `{file}`", because, "Write at least one row of numbers"))
    return table


def _read_npy(file: Path) -> Table:
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(cannot(f"read `{file}`", f"it isn't a whole NPY file of numbers ({error})", "Write it anew")) from error
    if values.dtype.kind not in "biuf":
        raise InputError(cannot(f"read `{file}`", f"its type is `{values.dtype}`, not a number", "Save floats"))
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise InputError(cannot(f"read `{file}`", f"its shape is {values.shape}, not (n, d)", "Save one row a draw"))
    return Table(values.astype(np.float64), tuple(f"x{i + 1}" for i in range(values.shape[1])))


def _read_arrow(file: Path, suffix: str) -> Table:
    arrow = require("pyarrow", "app")
    headerless = False
    try:
        if suffix == ".csv":
            headerless = _is_headerless(file)
            module = require("pyarrow.csv", "app")
            options = module.ReadOptions(autogenerate_column_names=headerless)
            table = module.read_csv(file, read_options=options)
        elif suffix == ".parquet":
            table = require("pyarrow.parquet", "app").read_table(file)
        else:
            table = require("pyarrow.feather", "app").read_table(file)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        if suffix == ".csv":
            _explain_csv(file, str(error))
        reason = " ".join(str(error).split())
        because = f"it isn't a whole {suffix[1:]} file ({reason})"
        raise InputError(cannot(f"read `{file}`", because, "Write it anew; a copy may have been cut short")) from error
    names = tuple(f"x{i + 1}" for i in range(table.num_columns)) if headerless else tuple(table.column_names)
    if any(not name.strip() or name == "__index_level_0__" for name in names):
        because = "a column has no name: it may be an index that pandas wrote beside the data"
        raise InputError(cannot(f"read `{file}`", because, "Write it with index=False, or name the column"))
    if len(set(names)) != len(names):
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise InputError(cannot(f"read `{file}`", f"the column names {doubled} stand twice", "Rename them"))
    for name, column in zip(names, table.columns, strict=True):
        kind = column.type
        is_number = arrow.types.is_floating(kind) or arrow.types.is_integer(kind) or arrow.types.is_boolean(kind)
        if not (is_number or arrow.types.is_decimal(kind) or arrow.types.is_null(kind)):
            if suffix == ".csv":
                _explain_csv(file, f"column `{name}` holds {kind}")
            because = f"column `{name}` holds {kind}, not numbers"
            raise InputError(cannot(f"read `{file}`", because, "Drop or encode that column"))
    return Table(np.column_stack([_floats(column) for column in table.columns]), names)


def _floats(column: Any) -> np.ndarray:
    """Cast an Arrow column to float64, a null to NaN (which the target then refuses with its place)."""
    return np.asarray(column.cast("float64").to_numpy(), dtype=np.float64)


def _is_headerless(file: Path) -> bool:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        first = next(csv.reader(lines), [])
    if len(first) > 1 and [cell.strip() for cell in first] == [str(i) for i in range(len(first))]:
        because = "its first line is 0, 1, …: the names that pandas gives nameless columns, or a row"
        raise InputError(cannot(f"read `{file}`", because, "Name the columns, or write 0.0 and 1.0 if it's a row"))
    return bool(first) and all(_is_number(cell) for cell in first)


def _explain_csv(file: Path, reason: str) -> NoReturn:
    """Find the line that broke a CSV, and say it.

    Raises:
        InputError: always.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            _find_fault(file, lines)
    except UnicodeDecodeError as error:
        because = f"byte {error.start} isn't UTF-8"
        raise InputError(cannot(f"read `{file}`", because, "Save it as UTF-8")) from error
    raise InputError(cannot(f"read `{file}`", " ".join(reason.split()), "Correct it"))


def _find_fault(file: Path, lines: Any) -> None:
    reader = csv.reader(lines)
    header = next(reader, [])
    if header and header[0].startswith("#"):
        raise InputError(cannot(f"read `{file}`", "its first line is a comment", "Delete it; the first line holds the names"))
    for mark, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            raise InputError(cannot(f"read `{file}`", f"its fields are separated by {word}", "Separate them by commas"))
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            because = f"line {reader.line_num} has {len(row)} fields and the first line has {len(header)}"
            raise InputError(cannot(f"read `{file}`", because, "Mend that line; the file may have been cut short"))
        if row == header:
            because = f"line {reader.line_num} repeats the header"
            raise InputError(cannot(f"read `{file}`", because, "Delete that line"))
        for name, cell in zip(header, row, strict=True):
            if cell.strip() and not _is_number(cell):
                because = f"column `{name}` holds the text `{cell[:40]}` on line {reader.line_num}"
                thousands = _is_number(cell.replace(",", "")) or _is_number(cell.replace(".", "").replace(",", "."))
                hint = "Write numbers without thousands separators" if thousands else "Drop or encode that column"
                raise InputError(cannot(f"read `{file}`", because, hint))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
