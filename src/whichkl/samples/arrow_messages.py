"""Arrow messages: how large the record batches of an IPC file are, from their metadata and without decompressing them.

pyarrow tells a batch's rows only once it has decompressed it (or, since version 26, of a whole file). The metadata are flat
buffers: a table begins with the distance back to a list of the places of its fields.

Source: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc, Message.fbs.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from whichkl._checks import require

_MAGIC = 8
"""Bytes before the first message: ARROW1 and two of padding."""
_HEADER = 2
"""Number of the field of a message that holds its record batch."""
_LENGTH, _BUFFERS, _COMPRESSION = 0, 2, 3
"""Numbers of the fields of a record batch."""


class BatchSize(NamedTuple):
    """The rows of a record batch, and the bytes that its decompression makes; none where it isn't compressed."""

    rows: int
    decompressed: int


def batch_sizes(path: str) -> list[BatchSize]:
    """Read the metadata of all record batches of a file, in order.

    Raises:
        ArrowException: a message isn't whole.
        struct.error: its metadata are broken.
    """
    ipc = require("pyarrow.ipc", "app")
    found: list[BatchSize] = []
    with require("pyarrow", "app").memory_map(path) as pages:
        pages.seek(_MAGIC)
        while True:
            try:
                message = ipc.read_message(pages)
            except EOFError:
                return found
            if message.type == "record batch":
                found.append(_size(message))


def _size(message: Any) -> BatchSize:
    data = message.metadata
    batch = _follow(data, _place(data, _follow(data, 0), _HEADER))
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
    """Return the place that the offset at a place leads to.

    Raises:
        struct.error: there is no such field.
    """
    if place is None:
        raise struct.error("a field is missing")
    return place + _number("<I", data, place)
