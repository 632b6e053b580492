"""Samples in files and streams: one table that fits in memory, or parts that are read block by block, as often as needed."""

from whichkl.samples.faults import TableError
from whichkl.samples.loader import Loaded
from whichkl.samples.opening import FORMATS, Shards, open_samples, open_stream, read_samples
from whichkl.samples.reading import Reading
from whichkl.samples.stream import Block, Part, Slice, Stream
from whichkl.samples.table import Table

__all__ = [
    "FORMATS",
    "Block",
    "Loaded",
    "Part",
    "Reading",
    "Shards",
    "Slice",
    "Stream",
    "Table",
    "TableError",
    "open_samples",
    "open_stream",
    "read_samples",
]
