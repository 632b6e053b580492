"""Parquet: row groups read column by column through small buffers, so that memory doesn't grow with their size."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from whichkl._checks import InputError, require
from whichkl.samples.columns import check_columns, check_names, is_plain
from whichkl.samples.reading import Reading
from whichkl.samples.shard import Shard, block_rows, decoding, refuse_broken, refuse_damaged, stamp
from whichkl.samples.table_part import TablePart, refuse_types

_PLAIN_READING = Reading()
_MIN_BUFFER, _MAX_BUFFER = 4_096, 65_536
"""Bounds of the bytes that are read at once of each column."""
_ALL_BUFFERS = 2**28
"""Bytes that are read at once of all columns together."""


@dataclass(frozen=True)
class ParquetPart(TablePart):
    """Consecutive row groups of a Parquet file."""

    groups: tuple[int, int]
    """The first one, and the one after the last."""

    @property
    def label(self) -> str:
        """The file and its row groups."""
        first, end = self.groups
        which = f"row group {first}" if end == first + 1 else f"row groups {first} to {end - 1}"
        return f"`{self.path}`, {which}"

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
        names, counts = tuple(schema.names), tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        _check_footer(footer, schema, counts)
    check_names(path, names)
    all_names, names = names, reading.chosen(names, f"`{path}`")
    kinds = [schema.field(name).type for name in names]
    where = (*stamp(path), names)
    cut = partial(_cut, where, counts, reading=reading)
    refuse_types(next(iter(cut(footer.num_rows)), None), kinds)
    return Shard(*where, tuple(str(kind) for kind in kinds), footer.num_rows, cut, reading=reading, all_names=all_names)


def _cut(
    where: tuple[str, int, int, tuple[str, ...]], counts: Sequence[int], rows: int, reading: Reading = _PLAIN_READING
) -> list[ParquetPart]:
    """Join row groups to parts of at most this many rows; a larger row group is a part of its own."""
    found, first, have = [], 0, 0
    for group, count in enumerate(counts):
        if have and have + count > rows:
            found.append((first, group))
            first, have = group, 0
        have += count
    if have:
        found.append((first, len(counts)))
    return [ParquetPart(*where, sum(counts[slice(*one)]), sum(counts[: one[0]]), one, reading=reading) for one in found]


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
