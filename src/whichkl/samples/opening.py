"""Opening: what a path, a folder, several paths or a DataLoader is read as: a table in memory, or a stream."""

from __future__ import annotations

import os
from typing import Any

from torch.utils.data import DataLoader, Dataset

from whichkl._checks import InputError, cannot
from whichkl.samples.file_formats import open_file
from whichkl.samples.folder import Shards, shards_in
from whichkl.samples.loader import Loaded
from whichkl.samples.stream import Stream
from whichkl.samples.table import Table, table_of

IN_MEMORY = 256 * 2**20
"""Bytes of a single file, and of its values in float64, below which it's read into memory."""


def open_samples(obj: Any, *, is_whole: bool = False) -> Table | Stream | None:
    """Return what `obj` names: a table for one file below `IN_MEMORY` bytes, else a stream; None where it's something else.

    Args:
        obj: a path, a list of paths, a DataLoader, a Dataset, a stream, or anything else.
        is_whole: whether a single file of any size is to be read into memory.

    Raises:
        InputError: a file can't be read, or files don't fit together.
        ResourceError: it is to be read into memory, and needs more than is free.
    """
    if not _is_named(obj):
        return None
    if isinstance(obj, (str, os.PathLike)) and not os.path.isdir(obj):
        shard = open_file(obj)
        if is_whole or max(shard.size, shard.bytes_in_memory) < IN_MEMORY:
            return table_of(shard)
    return open_stream(obj)


def open_stream(obj: Any) -> Stream:
    """Open a sample file, a folder of them, a list of paths, a DataLoader or a Dataset as a stream.

    Raises:
        InputError: it is none of these, or can't be read.
    """
    if isinstance(obj, Stream):
        return obj
    if not _is_named(obj):
        because = f"a `{type(obj).__name__}` is neither a path, a list of paths, a DataLoader nor a Dataset"
        raise InputError(cannot("open it as a stream", because, "Give one of these"))
    if isinstance(obj, (DataLoader, Dataset)):
        return Loaded(obj)
    if isinstance(obj, list):
        return Shards(obj)
    return Shards(shards_in(obj) if os.path.isdir(obj) else [obj])


def _is_named(obj: Any) -> bool:
    paths = isinstance(obj, list) and len(obj) > 0 and all(isinstance(one, (str, os.PathLike)) for one in obj)
    return paths or isinstance(obj, (str, os.PathLike, DataLoader, Dataset, Stream))
