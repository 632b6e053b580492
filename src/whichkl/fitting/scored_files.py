"""Scored files: files of any size are scored block by block, and the scores of all rows are written to a new file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whichkl._checks import plain, require
from whichkl.files.writing import written_new
from whichkl.fitting.scores import Strangest
from whichkl.fitting.scoring import ScoredBlock, score_blocks
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers.work import QUIET

if TYPE_CHECKING:
    from whichkl.fitting.result import Fit


@plain_modes()
def score_file(
    fit: Fit,
    samples: Path,
    *,
    top: int = 20,
    seed: int = 0,
    missing: str | None = None,
    out: Path | None = None,
    tell: Callable[[str, float], None] = QUIET.tell,
) -> Strangest:
    """Score the rows of a file or folder as `Fit.score` does, in memory that doesn't grow with the rows.

    Args:
        fit: the fit.
        samples: the file or folder.
        top: how many of the strangest rows are described.
        seed: fixes the draws.
        missing: ``"refuse"`` or ``"drop"``; by default as in the fit.
        out: a new file for the scores of all rows: .csv, .parquet or .json, a list of objects.
        tell: called with the current step and the fraction of it that is done.

    Raises:
        InputError: a column of the fit is missing, a cell isn't a number, there are no rows, or `out` exists.
        ResourceError: `out` can't be written.
    """
    with contextlib.nullcontext(lambda block: None) if out is None else _writer(out) as write:
        return score_blocks(fit, samples, write, top=top, seed=seed, missing=missing, tell=tell)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[ScoredBlock], None]]:
    """Yield a function that appends the scores of a block to a new file."""
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
