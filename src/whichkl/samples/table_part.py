"""Table part: a piece of a file whose rows come as record batches, which a reading turns into numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import require
from whichkl.samples.faults import Faults
from whichkl.samples.reading import Reading
from whichkl.samples.shard import FilePart, block_rows

_MAX_ROWS_EXAMINED = 1_000_000
"""Largest number of rows whose cells are examined for an error."""


@dataclass(frozen=True)
class TablePart(FilePart):
    """A piece of a CSV, Parquet or Arrow file."""

    @abstractmethod
    def batches(self, names: Sequence[str]) -> Iterator[Any]:
        """Yield its rows in order, as record batches with at least these columns."""

    def decoded(self) -> Iterator[Float[Tensor, "m d"]]:
        """Turn each batch into numbers."""
        step, invalid = block_rows(len(self.names)), require("pyarrow", "app").ArrowInvalid
        for batch in self.batches(self.names):
            for start in range(0, len(batch), step):
                rows = batch.slice(start, step) if len(batch) > step else batch
                try:
                    x = self.reading.matrix(rows, self.names)
                except invalid as error:
                    raise self.faults().error(self.label) from error
                yield x

    def faults(self) -> Faults:
        """Examine the cells of its first rows."""
        faults, start = Faults("row", self.reading.missing == "drop"), 0
        for batch in self.batches(self.names):
            self.reading.faults_in(batch, self.names, faults, self.start + start)
            start += len(batch)
            if start >= _MAX_ROWS_EXAMINED:
                faults.reach = f"; only the first {start:,} rows were examined"
                break
        return faults


def refuse_types(part: TablePart | None, kinds: Sequence[Any]) -> None:
    """Refuse columns that the reading can't turn into numbers, by an error that names every fault of the table."""
    if part is not None and not all(map(part.reading.reads, part.names, kinds)):
        raise part.faults().error(f"`{part.path}`")


def labelled(reading: Reading, parts: Sequence[TablePart]) -> Reading:
    """Find the labels of the categories that have none, by reading these columns of all parts."""
    wanted = [name for name, labels in reading.categories.items() if not labels]
    return reading.with_labels(batch for part in parts for batch in part.batches(wanted))
