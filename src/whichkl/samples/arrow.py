"""Arrow: record batches of an IPC (Feather) file, mapped into memory one after another."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from whichkl._checks import require
from whichkl.process.memory import check_memory
from whichkl.samples.faults import unreadable
from whichkl.samples.reading import Reading
from whichkl.samples.shard import Shard, decoding, refuse_broken, refuse_damaged
from whichkl.samples.table_part import GroupedPart

_MAGIC_BYTES = 8
"""Bytes before the first message: ARROW1 and two of padding."""
_RECORD_BATCH_FIELD = 2
"""Number of the field of a message that holds its record batch."""
_LENGTH, _BUFFERS, _COMPRESSION = 0, 2, 3
"""Numbers of the fields of a record batch."""


class BatchSize(NamedTuple):
    """The rows of a record batch, and its bytes after decompression; 0 where it isn't compressed."""

    rows: int
    decompressed: int


@dataclass(frozen=True)
class ArrowPart(GroupedPart):
    """Consecutive record batches of an Arrow file; a worker holds one at a time, so that the largest bounds its memory."""

    group_name = ("record batch", "record batches")

    def batches(self, names: Sequence[str]) -> Iterator[Any]:
        """Map the file again for every batch, so that pages that have been read are released."""
        for number in range(*self.groups):
            with decoding(self.path, partial(refuse_damaged, self.path, f"record batch {number}")):
                yield self._batch(number)

    def _batch(self, number: int) -> Any:
        with require("pyarrow", "app").memory_map(self.path) as pages:
            batch = require("pyarrow.ipc", "app").open_file(pages).get_batch(number)
            batch.validate()
            return batch


def open_arrow(path: str, reading: Reading) -> Shard:
    """Read an Arrow file's schema, and the sizes of its record batches."""
    arrow, ipc = require("pyarrow", "app"), require("pyarrow.ipc", "app")
    with decoding(path, partial(refuse_broken, path, os.path.splitext(path)[1][1:].lower())), arrow.memory_map(path) as pages:
        if pages.read(4) == b"FEA1":
            because = "it is of the first version of Feather, which is no longer supported"
            raise unreadable(path, because, "Write it with `pyarrow.feather.write_feather`")
        reader = ipc.open_file(pages)
        sizes = list(_batch_sizes(pages))
        if len(sizes) != reader.num_record_batches or any(one.rows < 0 for one in sizes):
            raise ValueError(f"its footer states {reader.num_record_batches:,} record batches, and it holds {len(sizes):,}")
        most = max((one.decompressed for one in sizes), default=0)
        check_memory(most, f"read `{path}`", "Write it in smaller record batches: one is decompressed as a whole")
        return ArrowPart.shard(path, reader.schema, tuple(one.rows for one in sizes), reading)


def _batch_sizes(pages: Any) -> Iterator[BatchSize]:
    """Read the sizes of all record batches of a file from its metadata, without decompressing them.

    pyarrow returns the rows of a batch only after decompression. The metadata are flat buffers: a table begins with the distance
    back to a list of the places of its fields.

    Source: https://arrow.apache.org/docs/format/Columnar.html, Message.fbs.
    """
    ipc = require("pyarrow.ipc", "app")
    pages.seek(_MAGIC_BYTES)
    with suppress(EOFError):
        while True:
            message = ipc.read_message(pages)
            if message.type == "record batch":
                yield _size(message)


def _size(message: Any) -> BatchSize:
    data = message.metadata
    batch = _follow(data, _place(data, _follow(data, 0), _RECORD_BATCH_FIELD))
    length = _place(data, batch, _LENGTH)
    rows = 0 if length is None else _number("<q", data, length)
    if _place(data, batch, _COMPRESSION) is None or message.body is None:
        return BatchSize(rows, 0)
    buffers, total = _follow(data, _place(data, batch, _BUFFERS)), 0
    for i in range(_number("<I", data, buffers)):
        start, size = struct.unpack_from("<qq", data, buffers + 4 + 16 * i)
        if size >= 8:
            total += max(0, _number("<q", message.body, start))  # -1 marks a buffer that isn't compressed
    return BatchSize(rows, total)


def _number(form: str, data: Any, place: int) -> int:
    if place < 0:
        raise struct.error("a place before the start")
    return int(struct.unpack_from(form, data, place)[0])


def _place(data: Any, table: int, field: int) -> int | None:
    """Return where a field of a table is; None where it has its default."""
    places = table - _number("<i", data, table)
    entry = 4 + 2 * field
    offset = _number("<H", data, places + entry) if entry < _number("<H", data, places) else 0
    return table + offset if offset else None


def _follow(data: Any, place: int | None) -> int:
    """Return the place that the offset at a place leads to."""
    if place is None:
        raise struct.error("a field is missing")
    return place + _number("<I", data, place)
