"""Scored files: files of any size are scored block by block, and the scores of all rows are written to a new file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from whichkl._checks import plain, require
from whichkl.files.writing import written_new
from whichkl.fitting.scores import ScoredRow, resolution
from whichkl.fitting.scoring import ScoredBlock, Scorer, Strangest, check_any_row, naming_cells, notes_of
from whichkl.process.torch_modes import plain_modes

if TYPE_CHECKING:
    from whichkl.fitting.result import Fit


@dataclass(frozen=True)
class FileScores:
    """What is known of a scored file."""

    count: int
    """The number of rows that have scores."""
    outside: int
    """How many of them lie outside the support of the model."""
    draws: int
    rows: tuple[ScoredRow, ...]
    """The strangest rows, the strangest first."""
    notes: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the ranks count, and the notes."""
        outside = (f"Rows outside the support of the model: {self.outside:,}.",) if self.outside else ()
        return (resolution(self.draws), *outside, *(f"{note[0].upper()}{note[1:]}." for note in self.notes))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        counts = {"rows": self.count, "outside_support": self.outside, "draws": self.draws, "resolution": 1 / self.draws}
        return {**counts, "top": [one.to_dict() for one in self.rows], "notes": list(self.notes)}


@plain_modes()
def score_file(
    fit: Fit,
    samples: Path,
    *,
    top: int = 20,
    seed: int = 0,
    missing: str | None = None,
    out: Path | None = None,
    tell: Callable[[str, float], None] = lambda step, done: None,
) -> FileScores:
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
    scorer = Scorer(fit, seed)
    tell("opening the rows", math.nan)
    strangest, count, outside, left_out = Strangest(scorer, top), 0, 0, 0
    with naming_cells():
        source, unused = scorer.opened(samples, missing)
    has_files = len(getattr(source, "shards", ())) > 1
    with torch.no_grad(), naming_cells(), _no_writer() if out is None else _writer(out, has_files) as write:
        for block in scorer.blocks(source):
            tell(f"scoring, {count:,} rows done", math.nan)
            strangest.add(block)
            write(block)
            count += len(block.numbers)
            left_out += block.left_out
            outside += int((block.log_density == -math.inf).sum())
        check_any_row(count)
        return FileScores(count, outside, scorer.draws, strangest.rows(), notes_of(unused, left_out, count))


@contextlib.contextmanager
def _no_writer() -> Iterator[Callable[[ScoredBlock], None]]:
    yield lambda block: None


@contextlib.contextmanager
def _writer(path: Path, has_files: bool) -> Iterator[Callable[[ScoredBlock], None]]:
    """Yield a function that appends the scores of a block to a new file."""
    kind = path.suffix.lower()
    with written_new(path) as stream:
        if kind == ".json":
            first = True
            stream.write(b"[")

            def write_json(block: ScoredBlock) -> None:
                nonlocal first
                columns = _columns(block, has_files)
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
            batch = arrow.RecordBatch.from_pydict(_columns(block, has_files))
            if writer is None:
                module = require("pyarrow.csv" if kind == ".csv" else "pyarrow.parquet", "app")
                writer = (module.CSVWriter if kind == ".csv" else module.ParquetWriter)(stream, batch.schema)
            writer.write_batch(batch)

        yield write_table
        if writer is not None:
            writer.close()


def _columns(block: ScoredBlock, has_files: bool) -> dict[str, list[Any]]:
    files = {"file": [block.source] * len(block.numbers)} if has_files else {}
    scores = {"log_density": block.log_density.tolist(), "rank": block.rank.tolist()}
    return {**files, block.unit: block.numbers.tolist(), **scores}
