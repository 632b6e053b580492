"""Samples in files and streams: one table that fits in memory, or parts that are read block by block, as often as needed."""

from whichkl.samples.loader import Loaded
from whichkl.samples.opening import FORMATS, Shards, Table, open_samples, open_stream, read_samples
from whichkl.samples.stream import Block, Part, Slice, Stream

__all__ = [
    "FORMATS",
    "Block",
    "Loaded",
    "Part",
    "Shards",
    "Slice",
    "Stream",
    "Table",
    "open_samples",
    "open_stream",
    "read_samples",
]
