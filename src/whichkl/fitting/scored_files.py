"""Scored files: the scores of all rows are written to a new file, block by block, in memory that doesn't grow with the rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from whichkl._checks import plain, require
from whichkl.files.writing import written_new
from whichkl.fitting.scoring import ScoredBlock


@contextlib.contextmanager
def scores_written(path: Path | None) -> Iterator[Callable[[ScoredBlock], None]]:
    """Yield a function that appends the scores of a block to a new file: .csv, .parquet or .json, a list of objects.

    Without a path the function does nothing.

    Raises:
        InputError: the file exists.
        ResourceError: it can't be written.
    """
    if path is None:
        yield lambda block: None
        return
    kind = path.suffix.lower()
    with written_new(path) as stream:
        if kind == ".json":
            first = True
            stream.write(b"[")

            def write_json(block: ScoredBlock) -> None:
                nonlocal first
                columns = _columns(block)
                for values in zip(*columns.values(), strict=True):
                    text = json.dumps(plain(dict(zip(columns, values, strict=True))), allow_nan=False)
                    stream.write(("\n " if first else ",\n ").encode() + text.encode())
                    first = False

            yield write_json
            stream.write(b"\n]\n")
            return
        arrow, writer = require("pyarrow", "app"), None

        def write_table(block: ScoredBlock) -> None:
            nonlocal writer
            batch = arrow.RecordBatch.from_pydict(_columns(block))
            if writer is None:
                module = require("pyarrow.csv" if kind == ".csv" else "pyarrow.parquet", "app")
                writer = (module.CSVWriter if kind == ".csv" else module.ParquetWriter)(stream, batch.schema)
            writer.write_batch(batch)

        yield write_table
        if writer is not None:
            writer.close()


def _columns(block: ScoredBlock) -> dict[str, list[Any]]:
    files = {"file": [block.source] * len(block.numbers)} if block.source else {}
    scores = {"log_density": block.log_density.tolist(), "rank": block.rank.tolist()}
    return {**files, block.unit: block.numbers.tolist(), **scores}
