"""Parquet pages: the memory that a row group needs, since a page is decompressed as a whole, however few rows are read at once.

Most row groups are small enough that their pages needn't be looked at. The headers of pages are Thrift's compact protocol; of a
header only the two sizes are read, which are its fields 2 and 3.

Source: https://parquet.apache.org/docs/file-format/metadata/, PageHeader in parquet.thrift.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

from whichkl.memory_limits import available_memory, check_memory

_SMALL = 2**28
"""Bytes of a row group that are decompressed without looking at its pages."""
_MAX_HEADER = 2**16
"""Most bytes of a page's header."""
_COPIES = 2
"""A page is decompressed, and then decoded."""


def check_pages(path: str, footer: Any, groups: Iterable[int]) -> None:
    """Refuse row groups whose largest pages, one of each column, need more memory than is free.

    Raises:
        ResourceError: a row group does.
        ValueError: a page's header is broken.
    """
    for number in groups:
        group = footer.row_group(number)
        if group.total_byte_size < _SMALL or _COPIES * group.total_byte_size < available_memory():
            continue
        with open(path, "rb") as file:
            largest = sum(_largest_page(file, group.column(i)) for i in range(group.num_columns))
        instead = "Write it with smaller pages: one is decompressed as a whole"
        check_memory(_COPIES * largest, f"read row group {number} of `{path}`", instead)


class _Page(NamedTuple):
    header: int
    """Bytes of its header."""
    compressed: int
    decompressed: int


def _largest_page(file: BinaryIO, chunk: Any) -> int:
    """Return the decompressed bytes of a column's largest page."""
    place = chunk.data_page_offset if not chunk.has_dictionary_page else chunk.dictionary_page_offset
    end, largest = place + chunk.total_compressed_size, 0
    while place < end:
        file.seek(place)
        page = _page(file.read(_MAX_HEADER))
        largest = max(largest, page.decompressed)
        place += page.header + page.compressed
    return largest


def _page(data: bytes) -> _Page:
    reader = _Compact(data)
    sizes = reader.struct()
    if min(sizes.get(2, -1), sizes.get(3, -1)) < 0:
        raise ValueError("a page's header has no sizes")
    return _Page(reader.place, sizes[3], sizes[2])


class _Compact:
    """Reads values of Thrift's compact protocol one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """Read a struct; return its whole numbers by the number of their field."""
        if depth > 10:
            raise ValueError("a page's header is nested too deep")
        found: dict[int, int] = {}
        field = 0
        while (head := self._byte()) != 0:
            delta, kind = head >> 4, head & 15
            field = field + delta if delta else self._whole()
            if kind in (4, 5, 6):
                found[field] = self._whole()
            else:
                self._pass_over(kind, depth)
        return found

    def _pass_over(self, kind: int, depth: int) -> None:
        if kind in (1, 2):  # true and false are kinds of their own
            return
        if kind == 12:
            self.struct(depth + 1)
        elif kind in (3, 7, 8):
            self.place += {3: 1, 7: 8}.get(kind) or self._unsigned()
        else:
            raise ValueError(f"a page's header has a field of kind {kind}")

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
