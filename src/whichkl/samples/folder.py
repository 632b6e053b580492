"""Folder: a stream over one file, or many of one format and the same columns."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from whichkl._checks import InputError, cannot
from whichkl.samples.file_formats import FORMATS, check_file, open_file
from whichkl.samples.shard import FilePart, Shard
from whichkl.samples.stream import PART, Stream

_MAX_ROWS_PER_PART = 2**20
_PARTS = 1_024
"""Number of parts of a stream, where that makes them neither smaller than `PART` rows nor larger than `_MAX_ROWS_PER_PART`."""


class Shards(Stream):
    """Files of one format and one schema, in the order given, cut into parts by their sizes alone.

    Args:
        paths: the files.

    Raises:
        InputError: a file is missing, broken, or has other columns than the first one, or they all are empty.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Read the metadata of every file, and compare them."""
        files = [Path(os.path.abspath(path)) for path in paths]
        if not files:
            raise InputError(cannot("read this list of files", "it is empty", "Give at least one path"))
        twice = next((file for file, count in Counter(files).items() if count > 1), None)
        if twice is not None:
            raise InputError(cannot("read this list of files", f"`{twice}` is in it twice", "Name each file once"))
        kinds = {check_file(file): file for file in files}
        if len(kinds) > 1:
            (_, a), (_, b), *_ = kinds.items()
            raise InputError(cannot("read these files together", f"`{a}` and `{b}` differ in format", "Give files of one format"))
        with ThreadPoolExecutor(min(8, len(files))) as pool:
            self.shards = tuple(pool.map(open_file, files))
        full = [shard for shard in self.shards if shard.rows != 0]
        if not full:
            because = f"`{files[0]}` holds no rows" if len(files) == 1 else f"none of the {len(files)} files holds a row"
            raise InputError(cannot("read these samples", because, "Write at least one row of numbers"))
        for shard in self.shards:
            _compare(full[0], shard)
        self.names = full[0].names

    @cached_property
    def rows(self) -> int | None:
        """The number of rows; None for CSV, which doesn't state it."""
        counts = [shard.rows for shard in self.shards]
        return None if None in counts else sum(count for count in counts if count is not None)

    @cached_property
    def bytes_in_memory(self) -> int:
        """Bytes of all rows in float64."""
        return sum(shard.bytes_in_memory for shard in self.shards)

    @cached_property
    def parts(self) -> Sequence[FilePart]:
        """Every file's parts, one after another."""
        most = min(_MAX_ROWS_PER_PART, max(PART, (self.rows or 0) // _PARTS))
        return tuple(part for shard in self.shards for part in shard.parts(most))


def shards_in(folder: str | os.PathLike[str]) -> list[Path]:
    """List the sample files of a folder, by name; names that begin with a dot or an underscore are ignored."""
    path = Path(folder)
    try:
        entries = [entry for entry in path.iterdir() if not entry.name.startswith((".", "_"))]
    except OSError as error:
        because = (error.strerror or str(error)).lower()
        raise InputError(cannot(f"read the folder `{path}`", because, "Correct the path or its permissions")) from error
    if not entries:
        raise InputError(cannot(f"read the folder `{path}`", "it is empty", "Name the folder that holds the files"))
    entries.sort(key=lambda entry: entry.name)
    for entry in entries:
        if os.path.isdir(entry) or entry.suffix.lower() not in FORMATS:
            kind = "is a folder" if os.path.isdir(entry) else f"isn't one of {', '.join(FORMATS)}"
            instead = "Move it elsewhere, or give a list of files"
            raise InputError(cannot(f"read the folder `{path}`", f"`{entry.name}` {kind}", instead))
    return entries


def _compare(first: Shard, other: Shard) -> None:
    """Refuse a shard whose columns aren't the first one's."""
    if first.names == other.names and (other.rows == 0 or first.types == other.types):
        return
    a, b, what = f"`{first.path}`", f"`{other.path}`", "columns"
    missing, extra = ([name for name in one.names if name not in set(two.names)] for one, two in ((first, other), (other, first)))
    if missing:
        because = f"column `{missing[0]}` of {a} isn't in {b}"
    elif extra:
        because = f"column `{extra[0]}` of {b} isn't in {a}"
    elif first.names != other.names:
        i, here, there = _first_difference(first.names, other.names)
        because = f"column {i + 1} is `{here}` in {a} and `{there}` in {b}"
    else:
        i, here, there = _first_difference(first.types, other.types)
        because, what = f"column `{first.names[i]}` holds {here} in {a} and {there} in {b}", "types"
    raise InputError(cannot("read these files together", because, f"Write them with the same {what}"))


def _first_difference(here: Sequence[str], there: Sequence[str]) -> tuple[int, str, str]:
    return next((i, x, y) for i, (x, y) in enumerate(zip(here, there, strict=True)) if x != y)
