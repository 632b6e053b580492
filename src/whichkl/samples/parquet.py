"""Parquet: row groups read column by column through small buffers, so that memory doesn't grow with their size."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from whichkl._checks import InputError, require
from whichkl.samples.columns import check_columns, is_plain
from whichkl.samples.reading import Reading
from whichkl.samples.shard import Shard, block_rows, decoding, refuse_broken, refuse_damaged
from whichkl.samples.table_part import GroupedPart

_MIN_BUFFER, _MAX_BUFFER = 4_096, 65_536
"""Bounds of the bytes that are read at once of each column."""
_ALL_BUFFERS = 2**28
"""Bytes that are read at once of all columns together."""


@dataclass(frozen=True)
class ParquetPart(GroupedPart):
    """Consecutive row groups of a Parquet file."""

    group_name = ("row group", "row groups")

    def batches(self, names: Sequence[str]) -> Iterator[Any]:
        """Decode the row groups, one thread for all columns: others work on other parts."""
        options: dict[str, Any] = {"batch_size": block_rows(len(names)), "row_groups": range(*self.groups)}
        try:
            with decoding(self.path, self._explain), self._open() as file:
                if len(names) < file.metadata.num_columns:  # to look up very many names takes long
                    options["columns"] = list(names)
                yield from file.iter_batches(**options, use_threads=False)
        finally:
            require("pyarrow", "app").default_memory_pool().release_unused()

    def _open(self) -> Any:
        footer = _footer(self.path, self.size, self.changed)
        module = require("pyarrow.parquet", "app")
        buffer = max(_MIN_BUFFER, min(_MAX_BUFFER, _ALL_BUFFERS // len(self.names)))
        return module.ParquetFile(
            self.path, metadata=footer, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True
        )

    def _explain(self, reason: str) -> InputError:
        """Find the broken column by bisection: read the row groups again, and half the columns of a broken one."""
        for group in range(*self.groups):
            names = list(self.names)
            error = self._error(group, names)
            while error is not None and len(names) > 1:
                half = len(names) // 2
                of_half = self._error(group, names[:half])
                names, error = (names[half:], self._error(group, names[half:])) if of_half is None else (names[:half], of_half)
            if error is not None:
                return error
        return refuse_broken(self.path, "parquet", reason)

    def _error(self, group: int, names: list[str]) -> InputError | None:
        """Read some columns of a row group, and return the error that this raises."""
        try:
            with decoding(self.path, partial(refuse_damaged, self.path, f"column `{names[0]}` of row group {group}")):
                with self._open() as file:
                    for _ in file.iter_batches(batch_size=4_096, row_groups=[group], columns=names, use_threads=False):
                        pass
        except InputError as error:
            return error
        return None


def open_parquet(path: str, reading: Reading) -> Shard:
    """Read a Parquet file's footer."""
    with decoding(path, partial(refuse_broken, path, "parquet")):
        footer = require("pyarrow.parquet", "app").read_metadata(path)
        check_columns(path, footer.num_columns)
        schema = footer.schema.to_arrow_schema()
        counts = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        _check_footer(footer, schema, counts)
        return ParquetPart.shard(path, schema, counts, reading)


def _check_footer(footer: Any, schema: Any, counts: Sequence[int]) -> None:
    """Refuse a footer that contradicts itself, since no checksum covers it.

    A footer that Arrow wrote holds the types of its columns twice; uint32 can be stored as int64. The metadata of single columns
    aren't read: pyarrow ends the process where they are damaged.
    """
    if sum(counts) != footer.num_rows or any(count < 0 for count in counts):
        raise ValueError(f"its footer states {footer.num_rows:,} rows, and its row groups {sum(counts):,}")
    written = (footer.metadata or {}).get(b"ARROW:schema")
    if written is None:
        return
    arrow, ipc = require("pyarrow", "app"), require("pyarrow.ipc", "app")
    original = ipc.read_schema(arrow.BufferReader(base64.b64decode(written)))
    for name, here, there in zip(schema.names, schema.types, original.types, strict=True):
        if here != there and is_plain(here) and is_plain(there) and (str(here), str(there)) != ("int64", "uint32"):
            raise ValueError(f"column `{name}` is of type {here} in its schema, and was written as {there}")


@lru_cache(maxsize=16)
def _footer(path: str, size: int, changed: int) -> Any:
    """Read a footer once for all parts of a file; another size or date means another file."""
    return require("pyarrow.parquet", "app").read_metadata(path)
