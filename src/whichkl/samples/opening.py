"""Opening: a path, a folder, several paths or a DataLoader becomes a table in memory, or a stream."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from whichkl._checks import InputError, cannot
from whichkl.process.memory import check_memory
from whichkl.samples.arrow import open_arrow
from whichkl.samples.csv import open_csv
from whichkl.samples.faults import unreadable
from whichkl.samples.loader import Loaded
from whichkl.samples.npy import open_npy
from whichkl.samples.parquet import open_parquet
from whichkl.samples.reading import Reading
from whichkl.samples.shard import FilePart, Shard
from whichkl.samples.stream import PART, Block, Stream
from whichkl.samples.table import Table

_OPENERS: dict[str, Callable[[str, Reading], Shard]] = {
    ".csv": open_csv,
    ".parquet": open_parquet,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".npy": open_npy,
}
FORMATS = tuple(_OPENERS)
IN_MEMORY = 256 * 2**20
"""A single file is read into memory if it has fewer bytes, and its values in float64 have, too."""
_ALL_ROWS = 2**62
"""A part with at least this many rows holds all of them."""
_MAX_ROWS_PER_PART = 2**20
_PARTS = 1_024
"""Number of parts of a stream, where that makes them neither smaller than `PART` rows nor larger than `_MAX_ROWS_PER_PART`."""


_PLAIN = Reading()


def read_samples(path: str | os.PathLike[str], reading: Reading = _PLAIN) -> Table:
    """Read a file of samples, one row a draw; its suffix names the format.

    A CSV whose first line is all numbers has no header, and its columns are called x1, x2, …

    Raises:
        InputError: the file is missing, empty, truncated, damaged, ragged or of another format, or a column holds text; the
            message names the file, the line and the column.
        ResourceError: its values need more memory than is free.
    """
    return _table_of(_open_all([path], reading)[0])


def open_samples(obj: Any, *, is_whole: bool = False, reading: Reading = _PLAIN) -> Table | Stream | None:
    """Open what `obj` names: a table for one file below `IN_MEMORY` bytes, else a stream; None where it's something else.

    Args:
        obj: a path, a list of paths, a DataLoader, a Dataset, a stream, or anything else.
        is_whole: whether to read a single file of any size into memory.
        reading: how tables are read.

    Raises:
        InputError: a file can't be read, or files don't fit together.
        ResourceError: it must be read into memory, and needs more than is free.
    """
    if not _is_named(obj):
        return None
    if isinstance(obj, (str, os.PathLike)) and not os.path.isdir(obj):
        (shard,) = _open_all([obj], reading)
        if is_whole or max(shard.size, shard.bytes_in_memory) < IN_MEMORY:
            return _table_of(shard)
    return open_stream(obj, reading)


def open_stream(obj: Any, reading: Reading = _PLAIN) -> Stream:
    """Open a sample file, a folder of them, a list of paths, a DataLoader or a Dataset as a stream.

    Raises:
        InputError: it is none of these, or can't be read.
    """
    if isinstance(obj, (Stream, DataLoader, Dataset)) and not reading.is_default:
        because = f"a `{type(obj).__name__}` gives rows of numbers"
        raise InputError(cannot("choose how columns are read", because, "Leave these arguments out, or give a file or DataFrame"))
    if isinstance(obj, Stream):
        return obj
    if not _is_named(obj):
        because = f"a `{type(obj).__name__}` is neither a path, a list of paths, a DataLoader nor a Dataset"
        raise InputError(cannot("open it as a stream", because, "Give one of these"))
    if isinstance(obj, (DataLoader, Dataset)):
        return Loaded(obj)
    if isinstance(obj, list):
        return Shards(obj, reading)
    return Shards(_files_in(obj) if os.path.isdir(obj) else [obj], reading)


def _is_named(obj: Any) -> bool:
    paths = isinstance(obj, list) and len(obj) > 0 and all(isinstance(one, (str, os.PathLike)) for one in obj)
    return paths or isinstance(obj, (str, os.PathLike, DataLoader, Dataset, Stream))


def _table_of(shard: Shard) -> Table:
    """Read all rows of an open file into memory."""
    check_memory(2 * shard.bytes_in_memory, f"read `{shard.path}` into memory", "Give a part of it")
    part, reading = next(iter(shard.parts(_ALL_ROWS)), None), shard.reading
    blocks: Iterable[Block] = () if part is None else part.blocks()
    rows, start, left_out, numbers = shard.rows, 0, 0, []
    if rows is None or reading.missing == "drop":  # then all blocks are in memory at once
        blocks = list(blocks)
        rows = sum(map(len, blocks))
    values = np.empty((rows, len(shard.names)))
    for block in blocks:
        values[start : start + len(block)] = block.x.numpy()
        first = start + left_out
        numbers.append(np.arange(first, first + len(block)) if block.numbers is None else block.numbers.numpy())
        left_out += block.left_out
        start += len(block)
    if values.size == 0:
        because = f"it holds {rows} rows and {len(shard.names)} columns" + " without missing cells" * (left_out > 0)
        raise unreadable(shard.path, because, "Write at least one row of numbers")
    return Table(values, shard.names, reading, left_out, part, np.concatenate(numbers) if left_out else None)


class Shards(Stream):
    """Files of one format and one schema, in the order given, cut into parts by their sizes alone.

    Args:
        paths: the files.
        reading: how they are read. To find labels, and to count the rows that are left out, takes one pass over the files each.

    Raises:
        InputError: a file is missing, broken, or has other columns than the first one, or they all are empty.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], reading: Reading = _PLAIN) -> None:
        files = [Path(os.path.abspath(path)) for path in paths]
        if not files:
            raise InputError(cannot("read this list of files", "it is empty", "Give at least one path"))
        _refuse_labels(paths)
        twice = next((file for file, count in Counter(files).items() if count > 1), None)
        if twice is not None:
            raise InputError(cannot("read this list of files", f"`{twice}` is in it twice", "Name each file once"))
        kinds = {_check_file(file): file for file in files}
        if len(kinds) > 1:
            (_, a), (_, b), *_ = kinds.items()
            raise InputError(cannot("read these files together", f"`{a}` and `{b}` differ in format", "Give files of one format"))
        self.shards = _open_all(files, reading)
        full = [shard for shard in self.shards if shard.rows != 0]
        if not full:
            because = f"`{files[0]}` holds no rows" if len(files) == 1 else f"none of the {len(files)} files holds a row"
            raise InputError(cannot("read these samples", because, "Write at least one row of numbers"))
        for shard in self.shards:
            _compare(full[0], shard)
        self.names, self.reading = full[0].names, full[0].reading
        used = set(self.names)
        self.unused = tuple(name for name in full[0].all_names if name not in used)
        """The columns of the files that aren't used."""

    @cached_property
    def left_out(self) -> int:
        """The number of rows that are left out, since a cell is missing; to count them takes one pass over the files."""
        if self.reading.missing != "drop":
            return 0
        return sum(block.left_out for part in self.parts for block in part.blocks())

    @cached_property
    def rows(self) -> int | None:
        """The number of rows; None for CSV, which doesn't state it, and where rows with missing cells are left out."""
        counts = [None if self.reading.missing == "drop" else shard.rows for shard in self.shards]
        return None if None in counts else sum(count for count in counts if count is not None)

    @cached_property
    def bytes_in_memory(self) -> int:
        """Bytes of all rows in float64."""
        return sum(shard.bytes_in_memory for shard in self.shards)

    @cached_property
    def parts(self) -> Sequence[FilePart]:
        """Every file's parts, one after another."""
        most = min(_MAX_ROWS_PER_PART, max(PART, sum(shard.rows or 0 for shard in self.shards) // _PARTS))
        return tuple(part for shard in self.shards for part in shard.parts(most))


def _refuse_labels(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse a list of texts of which none looks like a file: labels, most likely."""
    if all(isinstance(one, str) and Path(one).suffix.lower() not in FORMATS and not os.path.exists(one) for one in paths):
        because = f"a list of texts names files, and {paths[0]!r} isn't one"
        instead = "Name files, or pass labels as `Target(samples=pandas.DataFrame({'x': texts}), categories=['x'])`"
        raise InputError(cannot("read these samples", because, instead))


def _files_in(folder: str | os.PathLike[str]) -> list[Path]:
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
    here, there = set(first.names), set(other.names)
    if missing := [name for name in first.names if name not in there]:
        because = f"column `{missing[0]}` of {a} isn't in {b}"
    elif extra := [name for name in other.names if name not in here]:
        because = f"column `{extra[0]}` of {b} isn't in {a}"
    elif first.names != other.names:
        i = next(i for i, name in enumerate(first.names) if name != other.names[i])
        because = f"column {i + 1} is `{first.names[i]}` in {a} and `{other.names[i]}` in {b}"
    else:
        i = next(i for i, kind in enumerate(first.types) if kind != other.types[i])
        because, what = f"column `{first.names[i]}` holds {first.types[i]} in {a} and {other.types[i]} in {b}", "types"
    raise InputError(cannot("read these files together", because, f"Write them with the same {what}"))


def _open_all(paths: Sequence[str | os.PathLike[str]], reading: Reading) -> tuple[Shard, ...]:
    """Read the metadata of files, or their first lines; find the labels of categories in all of them."""
    files = [(_OPENERS[_check_file(Path(path))], os.path.abspath(path)) for path in paths]
    with ThreadPoolExecutor(min(8, len(files))) as pool:  # a folder may be on a disk far away
        shards = tuple(pool.map(lambda one: one[0](one[1], reading), files))
    if reading.needs_labels:
        wanted = [name for name, labels in reading.categories.items() if not labels]
        parts: Any = [part for shard in shards for part in shard.parts(_ALL_ROWS)]
        return _open_all(paths, reading.with_labels(batch for part in parts for batch in part.batches(wanted)))
    return shards


def _check_file(file: Path) -> str:
    """Return the suffix of a file that exists, can be read and isn't empty."""
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise unreadable(file, f"its suffix is `{suffix}`" if suffix else "it has no suffix", f"Use one of {', '.join(FORMATS)}")
    try:
        status = file.stat()
        if stat.S_ISREG(status.st_mode):
            file.open("rb").close()
    except FileNotFoundError as error:
        raise unreadable(file, "there is no such file", "Correct the path") from error
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the path
        because = (getattr(error, "strerror", None) or str(error)).lower()
        raise unreadable(file, because, "Correct the path or its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        because = "it is a folder" if stat.S_ISDIR(status.st_mode) else "it isn't a regular file"
        raise unreadable(file, because, "Correct the path")
    if status.st_size == 0:
        raise unreadable(file, "the file is empty", "Write at least one row")
    return suffix
