"""Samples in files and streams: one table that fits in memory, or parts that are read block by block, as often as needed."""

from whichkl.samples.stream import Block, Part, Slice, Stream
from whichkl.samples.table import FORMATS, Table, read_samples

__all__ = ["FORMATS", "Block", "Part", "Slice", "Stream", "Table", "read_samples"]
