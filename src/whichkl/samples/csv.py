"""CSV: text parsed a few megabytes at a time, and what is wrong with a line that doesn't parse."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, require
from whichkl.samples.columns import check_names, floats, is_number, rows_from
from whichkl.samples.shard import FilePart, Shard, block_rows, stamp

_BYTES = 2**22
"""Bytes that are parsed at once; a column's type is told from the first so many."""


@dataclass(frozen=True)
class CsvPart(FilePart):
    """A whole CSV file: where a line begins can't be told from within, since a quoted cell may hold a line's end."""

    types: tuple[str, ...]

    @property
    def label(self) -> str:
        """The file."""
        return f"`{self.path}`"

    def rows(self) -> Iterator[Float[Tensor, "m d"]]:
        """Parse the file from its start."""
        arrow, step = require("pyarrow", "app"), block_rows(len(self.names))
        try:
            with _reader(Path(self.path), dict(zip(self.names, self.types, strict=True))) as reader:
                for batch in reader:
                    columns = [floats(column) for column in batch.columns]
                    for start in range(0, len(batch), step):
                        yield rows_from(columns, start, min(start + step, len(batch)))
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            explain(Path(self.path), str(error))


@dataclass(frozen=True)
class CsvShard(Shard):
    """A CSV file, as its first lines tell it."""

    def parts(self, rows: int) -> Sequence[CsvPart]:
        """Return the one part, the file, unless it's known to be empty."""
        return [] if self.rows == 0 else [CsvPart(self.path, self.size, self.changed, self.names, self.types)]


def open_csv(path: str) -> CsvShard:
    """Read a CSV file's first lines.

    Raises:
        InputError: they don't parse, or a column holds no numbers; the message names the line.
    """
    arrow = require("pyarrow", "app")
    try:
        with _reader(Path(path), None) as reader:
            first = next((batch for batch in reader if len(batch)), None)
            schema = reader.schema
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        explain(Path(path), str(error))
    names = tuple(f"x{i + 1}" for i in range(len(schema.names))) if is_headerless(Path(path)) else tuple(schema.names)
    check_names(path, names)
    if first is not None:
        for name, kind in zip(names, schema.types, strict=True):
            if not is_number(kind):
                explain(Path(path), f"column `{name}` holds {kind}")
    kinds = tuple("bool" if arrow.types.is_boolean(kind) else "double" for kind in schema.types)
    return CsvShard(*stamp(path), names, kinds, 0 if first is None else None)


def _reader(file: Path, types: dict[str, str] | None) -> Any:
    """Open a CSV for reading in pieces: with the types given, or as the first piece suggests."""
    arrow, module = require("pyarrow", "app"), require("pyarrow.csv", "app")
    headerless = is_headerless(file)
    names = list(types) if types and headerless else None
    kinds = {name: arrow.bool_() if kind == "bool" else arrow.float64() for name, kind in (types or {}).items()}
    options = module.ReadOptions(
        block_size=_BYTES, use_threads=False, autogenerate_column_names=headerless and names is None, column_names=names
    )
    return module.open_csv(file, read_options=options, convert_options=module.ConvertOptions(column_types=kinds))


def is_headerless(file: Path) -> bool:
    """Whether the first line is all numbers, so that it is a row.

    Raises:
        InputError: it counts 0, 1, …, which may be either.
    """
    with file.open(newline="", encoding="utf-8-sig") as lines:
        first = next(csv.reader(lines), [])
    if len(first) > 1 and [cell.strip() for cell in first] == [str(i) for i in range(len(first))]:
        because = "its first line is 0, 1, …: the names that pandas gives nameless columns, or a row"
        raise InputError(cannot(f"read `{file}`", because, "Name the columns, or write 0.0 and 1.0 if it's a row"))
    return bool(first) and all(_reads_as_number(cell) for cell in first)


def explain(file: Path, reason: str) -> NoReturn:
    """Find the line that broke a CSV, and say it.

    Raises:
        InputError: always.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            _find_fault(file, lines)
    except UnicodeDecodeError as error:
        because = f"byte {error.start} isn't UTF-8"
        raise InputError(cannot(f"read `{file}`", because, "Save it as UTF-8")) from error
    raise InputError(cannot(f"read `{file}`", " ".join(reason.split()), "Correct it"))


def _find_fault(file: Path, lines: Any) -> None:
    reader = csv.reader(lines)
    header = next(reader, [])
    if header and header[0].startswith("#"):
        raise InputError(cannot(f"read `{file}`", "its first line is a comment", "Delete it; the first line holds the names"))
    for mark, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            raise InputError(cannot(f"read `{file}`", f"its fields are separated by {word}", "Separate them by commas"))
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            because = f"line {reader.line_num} has {len(row)} fields and the first line has {len(header)}"
            raise InputError(cannot(f"read `{file}`", because, "Mend that line; the file may have been cut short"))
        if row == header:
            because = f"line {reader.line_num} repeats the header"
            raise InputError(cannot(f"read `{file}`", because, "Delete that line"))
        for name, cell in zip(header, row, strict=True):
            if cell.strip() and not _reads_as_number(cell):
                because = f"column `{name}` holds the text `{cell[:40]}` on line {reader.line_num}"
                thousands = _reads_as_number(cell.replace(",", "")) or _reads_as_number(cell.replace(".", "").replace(",", "."))
                hint = "Write numbers without thousands separators" if thousands else "Drop or encode that column"
                raise InputError(cannot(f"read `{file}`", because, hint))


def _reads_as_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
