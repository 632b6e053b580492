"""Parquet pages: the memory that a row group needs, since a page is decompressed as a whole, however few rows are read at once.

Most row groups are so small that their pages needn't be looked at. Of the others the footer and the headers of pages are read
here, in Thrift's compact protocol: pyarrow tells the pages of no column, and of a damaged column it ends the process.

Source: https://parquet.apache.org/docs/file-format/metadata/, parquet.thrift.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, BinaryIO

from whichkl.memory_limits import available_memory, check_memory

_SMALL = 2**28
"""Bytes of a row group that are decompressed without looking at its pages."""
_MAX_HEADER = 2**16
"""Most bytes of a page's header."""
_MAX_DEPTH = 20
"""Most structs inside each other; a footer has six."""
_COPIES = 2
"""A page is decompressed, and then decoded."""
_ROW_GROUPS, _COLUMNS, _METADATA = 4, 1, 3
"""Numbers of fields: of the footer, of a row group and of a column."""
_COMPRESSED, _DATA, _DICTIONARY = 7, 9, 11
"""Numbers of fields of a column's metadata: its bytes, and where its data and its dictionary begin."""
_PAGE, _COMPRESSED_PAGE = 2, 3
"""Numbers of fields of a page's header: its bytes, and its bytes in the file."""


def check_pages(path: str, footer: Any, groups: Iterable[int]) -> None:
    """Refuse row groups whose largest pages, one of each column, need more memory than is free.

    Raises:
        ResourceError: a row group does.
        Exception: the footer or a page's header is broken.
    """
    sizes = {number: footer.row_group(number).total_byte_size for number in groups}
    large = [number for number, size in sizes.items() if size >= _SMALL and _COPIES * size > available_memory()]
    if not large:
        return
    with open(path, "rb") as file:
        whole = _footer(file)
        for number in large:
            columns = [column[_METADATA] for column in whole[_ROW_GROUPS][number][_COLUMNS]]
            need = _COPIES * sum(_largest_page(file, column) for column in columns)
            instead = "Write it with smaller pages: one is decompressed as a whole"
            check_memory(need, f"read row group {number} of `{path}`", instead)


def _footer(file: BinaryIO) -> Any:
    end = file.seek(-8, 2)
    file.seek(end - int.from_bytes(file.read(4), "little"))
    return _Compact(file.read()).struct()


def _largest_page(file: BinaryIO, column: dict[int, Any]) -> int:
    """Return the decompressed bytes of a column's largest page."""
    place = min(column[_DATA], column.get(_DICTIONARY) or column[_DATA])
    end, largest = place + column[_COMPRESSED], 0
    while place < end:
        file.seek(place)
        header = _Compact(file.read(_MAX_HEADER))
        page = header.struct()
        if min(page[_PAGE], page[_COMPRESSED_PAGE]) < 0:
            raise ValueError("a page's size is negative")
        largest = max(largest, page[_PAGE])
        place += header.place + page[_COMPRESSED_PAGE]
    return largest


class _Compact:
    """Reads values of Thrift's compact protocol one after another; a struct becomes a dict by the numbers of its fields."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read a struct."""
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deep")
        found: dict[int, Any] = {}
        field = 0
        while (head := self._byte()) != 0:
            field = field + (head >> 4) if head >> 4 else self._whole()
            kind = head & 15
            found[field] = kind == 1 if kind in (1, 2) else self._value(kind, depth)  # of a field, a truth is a kind of its own
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._whole()
        if kind in (7, 8):
            size = 8 if kind == 7 else self._unsigned()
            self.place += size
            return self.data[self.place - size : self.place]
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"it has a value of kind {kind}")

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _whole(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
