"""Table: samples of named columns in memory, from a file, a DataFrame or a matrix, and where their rows are in their source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, require
from whichkl.arrays import numeric_columns
from whichkl.samples.faults import Faults
from whichkl.samples.reading import Reading, select
from whichkl.samples.shard import FilePart


@dataclass(frozen=True)
class Table:
    """The content of a sample file: float64 values (n, d) and d column names."""

    values: np.ndarray
    names: tuple[str, ...]
    reading: Reading = Reading()
    """How it was read, with the labels of its categories."""
    left_out: int = 0
    """The number of rows that were left out, since a cell was missing."""
    part: FilePart | None = None
    """The file, which knows the lines of its rows."""
    numbers: np.ndarray | None = None
    """The numbers of the rows in the file, where some were left out."""


def places_of_rows(table: Table | None, rows: Sequence[int]) -> str:
    """Return where rows are in the file that a table was read from, for messages, such as ``"lines 2, 7"``; else "rows 2, 7"."""
    places, unit = np.asarray(rows), "row"
    if table is not None:
        places = places if table.numbers is None else table.numbers[places]
        if table.part is not None:
            numbers = np.fromiter(itertools.islice(table.part.numbers(), int(places.max()) + 1), np.int64)
            if len(numbers) > places.max():  # else the file has changed since
                places, unit = numbers[places], table.part.unit
    return f"{unit}{'s' * (len(rows) > 1)} {', '.join(map(str, places.tolist()))}"


def is_frame(obj: Any) -> bool:
    """Whether an object is a DataFrame of pandas, or a table of another library (polars, pyarrow) that Arrow can read."""
    return _is_pandas(obj) or _is_arrow(obj)


def column_names(frame: Any) -> list[str]:
    """Return the names of the columns of a table of any library."""
    names = frame.columns if _is_pandas(frame) else _arrow_table(frame).column_names
    return [str(name) for name in names]


def as_frame(obj: Any) -> Any:
    """Return a column of pandas, polars or pyarrow as a table of one column, and anything else unchanged."""
    if is_frame(obj):
        return obj
    if hasattr(obj, "to_frame") and hasattr(obj, "name") and not isinstance(obj, type):
        return obj.to_frame(obj.name or "x1") if isinstance(obj.name or "", str) else obj.to_frame(obj.name)
    is_array = hasattr(obj, "__arrow_c_array__")
    if hasattr(obj, "shape") or isinstance(obj, type) or not (is_array or hasattr(obj, "__arrow_c_stream__")):
        return obj
    arrow = require("pyarrow", "app")
    return arrow.table({"x1": (arrow.array if is_array else arrow.chunked_array)(obj)})


def is_plain(frame: Any) -> bool:
    """Whether a DataFrame of pandas holds real numbers alone, which need no conversion."""
    return _is_pandas(frame) and len(frame.columns) > 0 and numeric_columns(frame).shape == frame.shape


def renamed(frame: Any, names: Sequence[str]) -> Any:
    """Return a table with other names of its columns."""
    if _is_pandas(frame):
        return frame.set_axis(list(names), axis=1)
    return _arrow_table(frame).rename_columns(list(names))


def _is_pandas(obj: Any) -> bool:
    return hasattr(obj, "select_dtypes") and hasattr(obj, "columns") and not isinstance(obj, type)


def _is_arrow(obj: Any) -> bool:
    is_stream = hasattr(obj, "__arrow_c_stream__") and not _is_column(obj)
    return not isinstance(obj, type) and (is_stream or hasattr(obj, "__dataframe__") or hasattr(obj, "column_names"))


def _is_column(obj: Any) -> bool:
    """Whether an object that Arrow can read is one column, which has a type where a table has columns."""
    return (hasattr(obj, "type") or hasattr(obj, "dtype")) and not hasattr(obj, "columns")


def _arrow_table(frame: Any) -> Any:
    """Return a table of another library as one of pyarrow.

    Raises:
        InputError: Arrow can't read it.
    """
    arrow = require("pyarrow", "app")
    if isinstance(frame, arrow.Table):
        return frame
    try:
        if hasattr(frame, "__arrow_c_stream__") or isinstance(frame, arrow.RecordBatch):
            return arrow.table(frame)
        return require("pyarrow.interchange", "app").from_dataframe(frame)
    except (arrow.ArrowException, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        because = f"Arrow can't read a `{type(frame).__name__}`: {' '.join(str(error).split())[:160]}"
        raise InputError(cannot("read this table", because, "Give an array, or a DataFrame of pandas or polars")) from error


def read_frame(frame: Any, reading: Reading) -> Table:
    """Read a DataFrame with columns of any types.

    Raises:
        InputError: a cell isn't a number, or is missing; the message names every such column.
    """
    what, every = "this DataFrame" if _is_pandas(frame) else "this table", column_names(frame)
    if not every:
        raise InputError(cannot(f"read {what}", "it has no columns", "Give at least one column of numbers"))
    if twice := [name for name in every if every.count(name) > 1]:
        raise InputError(cannot(f"read {what}", f"column `{twice[0]}` appears twice", "Rename one of them"))
    batch = _as_batch(frame)
    names = reading.chosen(batch.schema.names, what)
    faults, x = Faults("row", reading.missing == "drop"), None
    if reading.needs_labels:
        reading = reading.with_labels([batch])
    if all(reading.reads(name, batch.schema.field(name).type) for name in names):
        try:
            x = reading.matrix(batch, names)
        except require("pyarrow", "app").ArrowInvalid:
            x = None
    if x is None or not bool(x.isfinite().all()):
        reading.faults_in(batch, names, faults, 0)
    return _table(x, names, reading, faults, what)


def read_array(x: Float[Tensor, "n d"], names: Sequence[str], reading: Reading) -> Table:
    """Choose columns and rows of a matrix.

    Raises:
        InputError: a cell is missing or infinite; the message names every such column.
    """
    kept = reading.chosen(names, "these samples")
    values, faults = select(x.detach().cpu().to(torch.float64), names, kept), Faults("row", reading.missing == "drop")
    faults.add_matrix(values, kept)
    return _table(values, kept, reading, faults, "these samples")


def _table(x: Tensor | None, names: tuple[str, ...], reading: Reading, faults: Faults, what: str) -> Table:
    if x is None or faults:
        raise faults.error(what)
    is_whole = ~x.isnan().any(1)
    if bool(is_whole.all()):
        return Table(x.numpy(), names, reading)
    kept = is_whole.nonzero()[:, 0].numpy()
    return Table(x[is_whole].numpy(), names, reading, len(x) - len(kept), None, kept)


def _as_batch(frame: Any) -> Any:
    """Return a DataFrame of any types as one record batch; objects that Arrow can't hold become text."""
    arrow = require("pyarrow", "app")
    if not _is_pandas(frame):
        table = _arrow_table(frame).combine_chunks()
        whole = [column.combine_chunks() for column in table.columns]
        whole = [one.combine_chunks() if hasattr(one, "combine_chunks") else one for one in whole]
        return arrow.record_batch(whole, names=table.column_names)
    names = [str(name) for name in frame.columns]
    columns = []
    for name in frame.columns:
        series = frame[name]
        try:
            column = arrow.array(series, from_pandas=True)
        except (arrow.ArrowInvalid, arrow.ArrowTypeError, arrow.ArrowNotImplementedError):
            column = arrow.array([None if one is None or one != one else str(one) for one in series])
        columns.append(column.combine_chunks() if hasattr(column, "combine_chunks") else column)
    return arrow.record_batch(columns, names=names)
