"""CSV: text parsed a few megabytes at a time, and the error for a line that doesn't parse."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import require
from whichkl.arrays import default_names
from whichkl.samples.columns import check_columns, check_names, floats, is_number, rows_from
from whichkl.samples.shard import FilePart, Shard, block_rows, decoding, stamp, unreadable

_BLOCK_BYTES = 2**22
"""Bytes that are parsed at once, and of the longest line; the first block decides the type of each column."""
_MAX_COUNTED_BYTES = 2**28
"""Largest file whose values are counted; in a larger one a value is assumed to have eight characters."""


@dataclass(frozen=True)
class CsvPart(FilePart):
    """A whole CSV file."""

    types: tuple[str, ...]

    @property
    def label(self) -> str:
        """The file."""
        return f"`{self.path}`"

    def decoded(self) -> Iterator[Float[Tensor, "m d"]]:
        """Parse the file from its start."""
        file, step = Path(self.path), block_rows(len(self.names))
        types = dict(zip(self.names, self.types, strict=True))
        with decoding(self.path, partial(explain, file)), _reader(file, types) as reader:
            for batch in reader:
                columns = [floats(column) for column in batch.columns]
                for start in range(0, len(batch), step):
                    yield rows_from(columns, start, min(start + step, len(batch)))


@dataclass(frozen=True)
class CsvShard(Shard):
    """The metadata of a CSV file, from its first lines."""

    @property
    def bytes_in_memory(self) -> int:
        """Count separators: every value except the last is followed by one."""
        if self.size > _MAX_COUNTED_BYTES:
            return self.size
        with open(self.path, "rb") as file:
            pieces = iter(partial(file.read, _BLOCK_BYTES), b"")
            return 8 * (1 + sum(piece.count(b",") + max(piece.count(b"\n"), piece.count(b"\r")) for piece in pieces))


def open_csv(path: str) -> CsvShard:
    """Read a CSV file's first lines."""
    file = Path(path)
    has_no_header = is_headerless(file)
    with decoding(path, partial(explain, file)), _reader(file, None) as reader:
        first, schema = next((batch for batch in reader if len(batch)), None), reader.schema
    names = default_names(len(schema.names)) if has_no_header else tuple(schema.names)
    check_names(path, names)
    for name, kind in zip(names, schema.types, strict=True):
        if first is not None and not is_number(kind):
            explain(file, f"column `{name}` holds {kind}")
    kinds = tuple("bool" if str(kind) == "bool" else "double" for kind in schema.types)
    where = (*stamp(path), names)
    parts = () if first is None else (CsvPart(*where, None, kinds),)
    return CsvShard(*where, kinds, 0 if first is None else None, partial(_whole, parts))


def _whole(parts: tuple[CsvPart, ...], rows: int) -> tuple[CsvPart, ...]:
    """Return the whole file: it can't be cut, since a quoted cell may hold a line's end."""
    return parts


def _reader(file: Path, types: dict[str, str] | None) -> Any:
    """Open a CSV for reading in blocks: with the given types, or with those of the first block."""
    module = require("pyarrow.csv", "app")
    has_no_header = is_headerless(file)
    options = module.ReadOptions(
        block_size=_BLOCK_BYTES,
        use_threads=False,
        autogenerate_column_names=has_no_header and not types,
        column_names=list(types) if types and has_no_header else None,
    )
    return module.open_csv(file, read_options=options, convert_options=module.ConvertOptions(column_types=types))


def is_headerless(file: Path) -> bool:
    """Whether the first line is all numbers, so that it is a row."""
    with _fields(file) as rows:
        first: list[str] = next(rows, [])
    check_columns(file, len(first))
    if len(first) > 1 and [cell.strip() for cell in first] == [str(i) for i in range(len(first))]:
        because = "its first line is 0, 1, …: the names that pandas gives nameless columns, or a row"
        raise unreadable(file, because, "Name the columns, or write 0.0 and 1.0 if it's a row")
    return bool(first) and all(_reads_as_number(cell) for cell in first)


def explain(file: Path, reason: str) -> NoReturn:
    """Find the line that broke a CSV, and raise the error that names it."""
    with _fields(file) as rows:
        _raise_fault(file, rows)
    raise unreadable(file, reason, "Correct it")


@contextmanager
def _fields(file: Path) -> Iterator[Any]:
    """Open a CSV with the reader of Python's standard library, which counts lines."""
    with closing(_lines(file)) as lines:
        rows = csv.reader(lines)
        try:
            yield rows
        except csv.Error as error:
            because = f"line {rows.line_num} can't be parsed ({error}), perhaps because a quote isn't closed"
            raise unreadable(file, because, "Correct that line") from error


def _lines(file: Path) -> Generator[str, None, None]:
    """Yield the lines of a text file one by one, in bounded memory."""
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
        for number, line in enumerate(iter(partial(text.readline, _BLOCK_BYTES + 1), ""), 1):
            place = f"line {number}"
            if len(line) > _BLOCK_BYTES:
                raise unreadable(file, f"{place} has more than {_BLOCK_BYTES:,} characters", "Correct that line")
            if "\0" in line:
                raise unreadable(file, f"{place} has a NUL in it, as UTF-16 and damaged text do", "Save it as UTF-8")
            if not line.isascii() and any("\udc80" <= one <= "\udcff" for one in line):
                raise unreadable(file, f"{place} isn't UTF-8", "Save it as UTF-8")
            yield line


def _raise_fault(file: Path, reader: Any) -> None:
    """Raise the error of the first line with a fault that is known; return if there is none."""
    header: list[str] = next(reader, [])
    if header and header[0].startswith("#"):
        raise unreadable(file, "its first line is a comment", "Delete it; the first line holds the names")
    for mark, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            raise unreadable(file, f"its fields are separated by {word}", "Separate them by commas")
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            because = f"line {reader.line_num} has {len(row)} fields and the first line has {len(header)}"
            raise unreadable(file, because, "Correct that line; the file may have been cut short")
        if row == header:
            raise unreadable(file, f"line {reader.line_num} repeats the header", "Delete that line")
        for name, cell in zip(header, row, strict=True):
            if cell.strip() and not _reads_as_number(cell):
                because = f"column `{name}` holds the text `{cell[:40]}` on line {reader.line_num}"
                thousands = _reads_as_number(cell.replace(",", "")) or _reads_as_number(cell.replace(".", "").replace(",", "."))
                hint = "Write numbers without thousands separators" if thousands else "Drop or encode that column"
                raise unreadable(file, because, hint)


def _reads_as_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
