"""CSV: text parsed a few megabytes at a time, and the error for lines that don't parse."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from whichkl._checks import require
from whichkl.arrays import default_names
from whichkl.samples.columns import check_columns, check_names
from whichkl.samples.faults import Faults, is_number, kind_of, unreadable
from whichkl.samples.reading import Reading
from whichkl.samples.shard import Shard, decoding, stamp
from whichkl.samples.table_part import TablePart, refuse_types

_BLOCK_BYTES = 2**22
"""Bytes that are parsed at once, and of the longest line; the first block decides the type of each column."""
_MAX_COUNTED_BYTES = 2**28
"""Largest file whose values are counted; in a larger one a value is assumed to have eight characters."""
_MAX_BYTES_EXAMINED = 2**26
"""Characters of a file whose cells are examined after one was found that can't be read."""


@dataclass(frozen=True)
class CsvPart(TablePart):
    """A whole CSV file."""

    unit = "line"
    all_names: tuple[str, ...]
    """All columns of the file."""
    types: tuple[str, ...]
    """Arrow types of the columns that are used."""

    @property
    def label(self) -> str:
        """The file."""
        return f"`{self.path}`"

    def batches(self, names: Sequence[str]) -> Iterator[Any]:
        """Parse the file from its start."""
        found = dict(zip(self.names, self.types, strict=True))
        types = {name: found[name] for name in names}
        with decoding(self.path, self._explain), _reader(Path(self.path), types, self.all_names) as reader:
            yield from reader

    def faults(self) -> Faults:
        """Examine the cells of the first 64 MB, line by line.

        Raises:
            InputError: a line can't be split into the fields of the first one.
        """
        file, faults, size = Path(self.path), Faults("line", self.reading.missing == "drop"), 0
        number = {name: i for i, name in enumerate(self.all_names)}
        used = sorted((number[name], name) for name in self.names)
        for line, row in islice(_records(file), int(self._has_header), None):
            size += sum(map(len, row))
            for i, name in used:
                faults.cells[name] = faults.cells.get(name, 0) + 1
                kind = kind_of(row[i], self.reading.thousands)
                if kind is not None and (name not in self.reading.categories or not row[i].strip()):
                    faults.add(name, kind, line, row[i])
            if size > _MAX_BYTES_EXAMINED and faults:
                faults.reach = f"; only the first {line:,} lines were examined"
                break
        return faults

    def numbers(self) -> Iterator[int]:
        """Yield the line of each row, as an editor counts them."""
        return islice(_first_lines(Path(self.path)), int(self._has_header), None)

    def place(self, row: int) -> str:
        """Name the line of a row."""
        return f"line {next(islice(self.numbers(), row, None))} of `{self.path}`"

    @property
    def _has_header(self) -> bool:
        return not is_headerless(Path(self.path))

    def _explain(self, reason: str) -> Any:
        faults = self.faults()
        return faults.error(self.label) if faults else unreadable(self.path, reason, "Correct it")


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


def open_csv(path: str, reading: Reading) -> CsvShard:
    """Read a CSV file's first lines."""
    file = Path(path)
    has_no_header = is_headerless(file)
    with decoding(path, partial(_explain, file)), _reader(file, None, ()) as reader:
        first, schema = next((batch for batch in reader if len(batch)), None), reader.schema
    all_names = default_names(len(schema.names)) if has_no_header else tuple(schema.names)
    check_names(path, all_names)
    names = reading.chosen(all_names, f"`{path}`")
    found = dict(zip(all_names, schema.types, strict=True))
    kinds = tuple(_kind_read(found[name], name, reading) for name in names)
    where = (*stamp(path), names)
    part = None if first is None else CsvPart(*where, None, 0, all_names, kinds, reading=reading)
    refuse_types(part, [found[name] for name in names])
    parts = () if part is None else (part,)  # a file can't be cut, since a quoted cell may hold a line's end
    return CsvShard(*where, kinds, None if part else 0, lambda rows: parts, reading=reading, all_names=all_names)


def _kind_read(kind: Any, name: str, reading: Reading) -> str:
    """Return the Arrow type as which a column is parsed: numbers with separators, and labels, are text."""
    if name in reading.categories or (reading.thousands and str(kind) != "bool"):
        return "string"
    return "bool" if str(kind) == "bool" else "double"


def _reader(file: Path, types: dict[str, str] | None, all_names: Sequence[str]) -> Any:
    """Open a CSV for reading in blocks: some columns with the given types, or all with those of the first block."""
    module = require("pyarrow.csv", "app")
    has_no_header = is_headerless(file)
    options = module.ReadOptions(
        block_size=_BLOCK_BYTES,
        use_threads=False,
        autogenerate_column_names=has_no_header and not types,
        column_names=list(all_names) if types and has_no_header else None,
    )
    wanted = None if types is None else list(types)
    return module.open_csv(
        file, read_options=options, convert_options=module.ConvertOptions(column_types=types, include_columns=wanted)
    )


def is_headerless(file: Path) -> bool:
    """Whether the first line is all numbers, so that it is a row."""
    with _fields(file) as rows:
        first: list[str] = next(rows, [])
    check_columns(file, len(first))
    if len(first) > 1 and [cell.strip() for cell in first] == [str(i) for i in range(len(first))]:
        because = "its first line is 0, 1, …: the names that pandas gives nameless columns, or a row"
        raise unreadable(file, because, "Name the columns, or write 0.0 and 1.0 if it's a row")
    return bool(first) and all(map(is_number, first))


def _explain(file: Path, reason: str) -> NoReturn:
    """Find the line that broke a CSV before its columns were known, and raise the error that names it."""
    for _ in _records(file):
        pass
    raise unreadable(file, reason, "Correct it")


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the number of its last line, the header too, and refuse one without the header's fields."""
    with _fields(file) as rows:
        first: list[str] = next(rows, [])
        if first and first[0].startswith("#"):
            raise unreadable(file, "its first line is a comment", "Delete it; the first line holds the names")
        for mark, word in ((";", "semicolons"), ("\t", "tabs")):
            if len(first) == 1 and mark in first[0]:
                raise unreadable(file, f"its fields are separated by {word}", "Separate them by commas")
        yield rows.line_num, first
        is_header = not all(map(is_number, first))
        for row in filter(None, rows):
            if len(row) != len(first):
                because = f"line {rows.line_num} has {len(row)} fields and the first line has {len(first)}"
                raise unreadable(file, because, "Correct that line; the file may have been cut short")
            if row == first and is_header:
                raise unreadable(file, f"line {rows.line_num} repeats the header", "Delete that line")
            yield rows.line_num, row


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


def _first_lines(file: Path) -> Iterator[int]:
    """Yield the number of the first line of each record; a quoted cell may hold ends of lines, and empty lines are no records."""
    is_inside = False
    for number, line in enumerate(_lines(file), 1):
        if not is_inside and line.strip("\r\n"):
            yield number
        is_inside ^= line.count('"') % 2 == 1


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
