"""Arrow: record batches of an IPC (Feather) file, mapped into memory one after another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, require
from whichkl.samples.columns import check_names, check_types, floats, rows_from
from whichkl.samples.shard import FilePart, Shard, block_rows, refuse_broken, stamp


@dataclass(frozen=True)
class ArrowPart(FilePart):
    """Consecutive record batches of an Arrow file; a worker holds one at a time, so it is they that bound its memory."""

    batches: tuple[int, int]
    """The first one, and the one after the last."""

    @property
    def label(self) -> str:
        """The file and its record batches."""
        first, end = self.batches
        which = f"record batch {first}" if end == first + 1 else f"record batches {first} to {end - 1}"
        return f"`{self.path}`, {which}"

    def rows(self) -> Iterator[Float[Tensor, "m d"]]:
        """Map the file anew for every batch, so that pages that have been read are let go."""
        step = block_rows(len(self.names))
        for number in range(*self.batches):
            columns, count = self._batch(number)
            for start in range(0, count, step):
                yield rows_from(columns, start, min(start + step, count))

    def _batch(self, number: int) -> tuple[list[Any], int]:
        arrow = require("pyarrow", "app")
        try:
            with arrow.memory_map(self.path) as pages:
                batch = require("pyarrow.ipc", "app").open_file(pages).get_batch(number)
                batch.validate()
                return [floats(column) for column in batch.columns], len(batch)
        except (arrow.ArrowException, OSError) as error:
            because = f"record batch {number} is broken ({' '.join(str(error).split())[:200]})"
            instead = "Write it anew; a copy may have been damaged"
            raise InputError(cannot(f"read `{self.path}`", because, instead)) from error


@dataclass(frozen=True)
class ArrowShard(Shard):
    """An Arrow file, as its footer tells it."""

    batches: int

    def parts(self, rows: int) -> Sequence[ArrowPart]:
        """Put as many record batches together as hold so many rows on average."""
        if not self.rows:
            return []
        step = max(1, rows * self.batches // self.rows)
        cuts = [(i, min(i + step, self.batches)) for i in range(0, self.batches, step)]
        return [ArrowPart(self.path, self.size, self.changed, self.names, cut) for cut in cuts]


def open_arrow(path: str) -> ArrowShard:
    """Read an Arrow file's footer, and the row counts of its record batches.

    Raises:
        InputError: it isn't a whole Arrow file, or a column holds no numbers.
    """
    arrow, ipc = require("pyarrow", "app"), require("pyarrow.ipc", "app")
    try:
        with arrow.memory_map(path) as pages:
            reader = ipc.open_file(pages)
            schema, batches, rows = reader.schema, reader.num_record_batches, reader.count_rows()
    except (arrow.ArrowException, OSError) as error:
        raise refuse_broken(path, os.path.splitext(path)[1][1:].lower(), str(error)) from error
    check_names(path, schema.names)
    if rows:
        check_types(path, schema.names, schema.types)
    kinds = tuple(str(kind) for kind in schema.types)
    return ArrowShard(*stamp(path), tuple(schema.names), kinds, rows, batches)
