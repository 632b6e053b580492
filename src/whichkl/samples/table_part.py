"""Table part: a piece of a file whose rows come as record batches, which a reading turns into numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import require
from whichkl.samples.columns import check_names
from whichkl.samples.faults import Faults
from whichkl.samples.reading import Reading
from whichkl.samples.shard import FilePart, Shard, block_rows, stamp

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


@dataclass(frozen=True)
class GroupedPart(TablePart):
    """Consecutive groups of rows of a Parquet or Arrow file, which its writer made."""

    group_name: ClassVar[tuple[str, str]]
    """What the format calls a group, and several."""
    groups: tuple[int, int]
    """The first one, and the one after the last."""

    @property
    def label(self) -> str:
        """The file and its groups."""
        (first, end), (one, several) = self.groups, self.group_name
        return f"`{self.path}`, " + (f"{one} {first}" if end == first + 1 else f"{several} {first} to {end - 1}")

    @classmethod
    def cut(
        cls, where: tuple[str, int, int, tuple[str, ...]], counts: Sequence[int], reading: Reading, rows: int
    ) -> list[GroupedPart]:
        """Join groups to parts of at most this many rows; a larger group is a part of its own."""
        found, first, have = [], 0, 0
        for group, count in enumerate(counts):
            if have and have + count > rows:
                found.append((first, group))
                first, have = group, 0
            have += count
        if have:
            found.append((first, len(counts)))
        return [cls(*where, sum(counts[slice(*one)]), sum(counts[: one[0]]), one, reading=reading) for one in found]

    @classmethod
    def shard(cls, path: str, schema: Any, counts: Sequence[int], reading: Reading) -> Shard:
        """Choose the columns of a file whose groups have these numbers of rows; refuse types that can't be read."""
        all_names = tuple(schema.names)
        check_names(path, all_names)
        names = reading.chosen(all_names, f"`{path}`")
        kinds, where = [schema.field(name).type for name in names], (*stamp(path), names)
        cut = partial(cls.cut, where, counts, reading)
        refuse_types(next(iter(cut(sum(counts))), None), kinds)
        return Shard(*where, tuple(map(str, kinds)), sum(counts), cut, reading=reading, all_names=all_names)


def refuse_types(part: TablePart | None, kinds: Sequence[Any]) -> None:
    """Refuse columns that the reading can't turn into numbers, by an error that names every fault of the table."""
    if part is None:
        return
    odd = [
        f"column `{name}` holds {kind}"
        for name, kind in zip(part.names, kinds, strict=True)
        if not part.reading.reads(name, kind)
    ]
    if odd:
        raise part.faults().error(f"`{part.path}`", odd[0])
