"""Console: how the commands print: tables, lines, JSON, and how far something is."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

from whichkl._checks import plain

OUT, ERR = Console(), Console(stderr=True)


def shown(values: Any) -> str:
    """Numbers to five digits; of a long list the first eight."""
    if isinstance(values, list):
        return "[" + ", ".join(shown(value) for value in values[:8]) + (", …]" if len(values) > 8 else "]")
    return f"{values:.5g}"


def found(findings: frozenset[str]) -> str:
    """The findings, divided by commas."""
    return ", ".join(sorted(name.replace("_", " ") for name in findings)) or "nothing against it"


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table; its cells stay text."""
    from rich import box
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    OUT.print(table)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Show on a terminal what is being done, and the fraction of it that is done; NaN where that can't be told."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        bar = progress.add_task("loading torch", total=None)

        def tell(step: str, done: float) -> None:
            total = None if done != done else 1.0
            progress.update(bar, description=step, total=total, completed=0.0 if total is None else min(done, 1.0))

        yield tell


def print_json(value: Any) -> None:
    """Print one JSON value, without NaN."""
    sys.stdout.write(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
