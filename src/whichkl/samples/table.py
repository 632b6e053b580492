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
    """Whether an object is a DataFrame."""
    return hasattr(obj, "select_dtypes") and hasattr(obj, "columns")


def as_frame(obj: Any) -> Any:
    """Return a pandas Series as a DataFrame of its column, and anything else unchanged."""
    if is_frame(obj) or not (hasattr(obj, "to_frame") and hasattr(obj, "name")):
        return obj
    return obj.to_frame("x1" if obj.name is None else obj.name)


def read_frame(frame: Any, reading: Reading) -> Table:
    """Read a DataFrame with columns of any types.

    Raises:
        InputError: a cell isn't a number, or is missing; the message names every such column.
    """
    what = "this DataFrame"
    if twice := [str(name) for name in frame.columns[frame.columns.duplicated()]]:
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
