"""Arrow: record batches of an IPC (Feather) file, mapped into memory one after another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, require
from whichkl.process.memory import check_memory
from whichkl.samples.arrow_messages import BatchSize, batch_sizes
from whichkl.samples.columns import check_names, check_types, floats, rows_from
from whichkl.samples.shard import FilePart, Shard, block_rows, decoding, refuse_broken, refuse_damaged, stamp


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

    def decoded(self) -> Iterator[Float[Tensor, "m d"]]:
        """Map the file anew for every batch, so that pages that have been read are let go."""
        step = block_rows(len(self.names))
        for number in range(*self.batches):
            with decoding(self.path, partial(refuse_damaged, self.path, f"record batch {number}")):
                batch = self._batch(number)
                for start in range(0, len(batch), step):
                    few = batch.slice(start, step)
                    yield rows_from([floats(column) for column in few.columns], 0, len(few))

    def _batch(self, number: int) -> Any:
        with require("pyarrow", "app").memory_map(self.path) as pages:
            batch = require("pyarrow.ipc", "app").open_file(pages).get_batch(number)
            batch.validate()
            return batch


@dataclass(frozen=True)
class ArrowShard(Shard):
    """An Arrow file, as its metadata tell it."""

    counts: tuple[int, ...] = field(repr=False)
    """The rows of each record batch."""

    def parts(self, rows: int) -> Sequence[ArrowPart]:
        """Put as many record batches together as hold so many rows on average."""
        if not self.rows:
            return []
        step = max(1, rows * len(self.counts) // self.rows)
        cuts = [(i, min(i + step, len(self.counts))) for i in range(0, len(self.counts), step)]
        return [ArrowPart(self.path, self.size, self.changed, self.names, sum(self.counts[slice(*cut)]), cut) for cut in cuts]


def open_arrow(path: str) -> ArrowShard:
    """Read an Arrow file's schema, and the sizes of its record batches.

    Raises:
        InputError: it isn't a whole Arrow file, or a column holds no numbers.
        ResourceError: a compressed record batch needs more memory than is free.
    """
    kind = os.path.splitext(path)[1][1:].lower()
    with decoding(path, partial(refuse_broken, path, kind)):
        schema, sizes = _metadata(path)
        names = tuple(schema.names)
    check_names(path, names)
    counts = tuple(one.rows for one in sizes)
    if any(counts):
        check_types(path, names, schema.types)
    most = max((one.decompressed for one in sizes), default=0)
    check_memory(most, f"read `{path}`", "Write it in smaller record batches: one is decompressed as a whole")
    return ArrowShard(*stamp(path), names, tuple(str(kind) for kind in schema.types), sum(counts), counts)


def _metadata(path: str) -> tuple[Any, list[BatchSize]]:
    """Return the schema and the sizes of all record batches.

    Raises:
        InputError: it's of the first version of Feather.
        ValueError: the footer and the messages disagree.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"FEA1":
            because = "it is of the first version of Feather, which has been given up"
            raise InputError(cannot(f"read `{path}`", because, "Write it with `pyarrow.feather.write_feather`"))
    with require("pyarrow", "app").memory_map(path) as pages:
        reader = require("pyarrow.ipc", "app").open_file(pages)
        schema, told = reader.schema, reader.num_record_batches
    sizes = batch_sizes(path)
    if len(sizes) != told or any(one.rows < 0 for one in sizes):
        raise ValueError(f"its footer tells of {told:,} record batches, and it holds {len(sizes):,}")
    return schema, sizes
