"""Table: a study's rows as CSV, Parquet and JSON lines, the same bytes for the same cells."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whichkl._checks import plain
from whichkl.files.writing import write_whole
from whichkl.printable import printable
from whichkl.study.ledger import Stored

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def columns_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """Return rows as columns, with None where a row has no value."""
    return {name: [row.get(name) for row in rows] for name in names}


def csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Write columns as CSV. A text that a spreadsheet would run as a formula gets an apostrophe; control characters are shown.

    >>> csv_text({"a": [0.1, -2.0, None], "b": ["=1+1", "-3", "x,y"]}).split()
    ['a,b', "0.1,'=1+1", '-2.0,-3', ',"x,y"']
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([printable(safe(name)) for name in columns])
    writer.writerows([[printable(_cell(value)) for value in row] for row in zip(*columns.values(), strict=True)])
    return out.getvalue()


def safe(text: str) -> str:
    """Return a text that no spreadsheet reads as a formula; numbers stay."""
    if not text.startswith(_FORMULA_STARTS):
        return text
    try:
        return text if math.isfinite(float(text)) and text == text.strip() else f"'{text}"
    except ValueError:
        return f"'{text}"


def table_files(cells: Sequence[Stored], columns: Mapping[str, Sequence[Any]]) -> dict[str, bytes]:
    """Return `table.csv`, `metrics.jsonl`, `times.jsonl` and, where pyarrow is installed, `table.parquet`."""
    lines = [json.dumps(plain({**one.row, "details": one.details}), allow_nan=False) for one in cells]
    times = [json.dumps({"cell": one.key, **{name: round(value, 6) for name, value in one.seconds.items()}}) for one in cells]
    files = {
        "table.csv": csv_text(columns).encode(),
        "metrics.jsonl": ("\n".join(lines) + "\n").encode(),
        "times.jsonl": ("\n".join(times) + "\n").encode(),
    }
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError:
        return files
    stream = io.BytesIO()
    table = pa.table({name: pa.array(list(values)) for name, values in columns.items()})
    parquet.write_table(table, stream, write_page_checksum=True)
    return {**files, "table.parquet": stream.getvalue()}


def write_tables(folder: Path, cells: Sequence[Stored], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write what `table_files` returns.

    Raises:
        InputError: a file of such a name isn't a study's.
        ResourceError: they can't be written.
    """
    for name, content in table_files(cells, columns).items():
        write_whole(folder / name, content, is_own=is_table)


def is_table(content: bytes) -> bool:
    """Whether content is that of a study's table, even of a damaged one: it names cells in its first line, or is empty."""
    first = content.partition(b"\n")[0]
    is_csv = {b"cell", b"seed", b"objective"} <= set(first.split(b","))
    is_parquet = content.startswith(b"PAR1") and b"objective" in content
    return not content or is_csv or is_parquet or re.search(rb'"cell": "[0-9a-f]{64}"', first) is not None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return safe(value) if isinstance(value, str) else repr(value)
