"""Parquet: row groups read column by column through small buffers, so that memory doesn't grow with their size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, require
from whichkl.samples.columns import check_names, check_types, rows_of
from whichkl.samples.shard import FilePart, Shard, block_rows, refuse_broken, stamp

_BUFFER = 65_536
"""Bytes that are read at once of each column."""


@dataclass(frozen=True)
class ParquetPart(FilePart):
    """Consecutive row groups of a Parquet file."""

    groups: tuple[int, int]
    """The first one, and the one after the last."""

    @property
    def label(self) -> str:
        """The file and its row groups."""
        first, end = self.groups
        which = f"row group {first}" if end == first + 1 else f"row groups {first} to {end - 1}"
        return f"`{self.path}`, {which}"

    def place(self, row: int) -> str:
        """Name the row group, and the row in it."""
        footer = _footer(self.path, self.size, self.changed)
        for group in range(*self.groups):
            rows = footer.row_group(group).num_rows
            if row < rows:
                return f"row {row:,} of row group {group} of `{self.path}`"
            row -= rows
        return self.label

    def rows(self) -> Iterator[Float[Tensor, "m d"]]:
        """Decode the row groups, one thread for all columns: others work on other parts."""
        arrow = require("pyarrow", "app")
        step = block_rows(len(self.names))
        try:
            with self._open() as file:
                for batch in file.iter_batches(batch_size=step, row_groups=range(*self.groups), use_threads=False):
                    yield rows_of(batch)
        except (arrow.ArrowException, OSError) as error:
            raise self._explain(str(error)) from error
        finally:
            arrow.default_memory_pool().release_unused()

    def _open(self) -> Any:
        footer = _footer(self.path, self.size, self.changed)
        module = require("pyarrow.parquet", "app")
        return module.ParquetFile(
            self.path, metadata=footer, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
        )

    def _explain(self, reason: str) -> InputError:
        """Read the row groups again, a column at a time, to find the one that is broken."""
        arrow = require("pyarrow", "app")
        for group in range(*self.groups):
            for name in self.names:
                try:
                    with self._open() as file:
                        for _ in file.iter_batches(batch_size=4_096, row_groups=[group], columns=[name], use_threads=False):
                            pass
                except (arrow.ArrowException, OSError) as error:
                    because = f"column `{name}` of row group {group} is broken ({' '.join(str(error).split())[:200]})"
                    return InputError(cannot(f"read `{self.path}`", because, "Write it anew; a copy may have been damaged"))
        return refuse_broken(self.path, "parquet", reason)


@dataclass(frozen=True)
class ParquetShard(Shard):
    """A Parquet file, as its footer tells it."""

    counts: tuple[int, ...] = field(repr=False)
    """The rows of each row group."""

    def parts(self, rows: int) -> Sequence[ParquetPart]:
        """Put row groups together until there are so many rows; a larger one stays by itself."""
        found, first, have = [], 0, 0
        for group, count in enumerate(self.counts):
            if have and have + count > rows:
                found.append((first, group))
                first, have = group, 0
            have += count
        if have:
            found.append((first, len(self.counts)))
        return [ParquetPart(self.path, self.size, self.changed, self.names, groups) for groups in found]


def open_parquet(path: str) -> ParquetShard:
    """Read a Parquet file's footer.

    Raises:
        InputError: it isn't a whole Parquet file, or a column holds no numbers.
    """
    arrow, module = require("pyarrow", "app"), require("pyarrow.parquet", "app")
    try:
        footer = module.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
    except (arrow.ArrowException, OSError) as error:
        raise refuse_broken(path, "parquet", str(error)) from error
    check_names(path, schema.names)
    if footer.num_rows:
        check_types(path, schema.names, schema.types)
    counts = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
    kinds = tuple(str(kind) for kind in schema.types)
    return ParquetShard(*stamp(path), tuple(schema.names), kinds, footer.num_rows, counts)


@lru_cache(maxsize=16)
def _footer(path: str, size: int, changed: int) -> Any:
    """Read a footer once for all parts of a file; another size or date means another file."""
    return require("pyarrow.parquet", "app").read_metadata(path)
