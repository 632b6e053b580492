"""Console: how the commands print: tables, lines, JSON, and how far something is."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from whichkl._checks import plain
from whichkl.printable import one_line, printable, spelled


class _Console(Console):
    """A console through which no control character passes but rich's own, and no character that its stream can't encode."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render, and make the text printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=self.readable(segment.text))

    def readable(self, text: str) -> str:
        """Return text as it can be printed here."""
        return spelled(printable(text), self.encoding)

    def on_broken_pipe(self) -> None:
        """Leave it to whoever catches the error: rich would end the process."""
        raise


OUT, ERR = _Console(), _Console(stderr=True)


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """Keep standard output for the results: what a user's own code prints in the block goes to standard error."""
    OUT.file = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        OUT.file = None  # type: ignore[assignment]  # whatever sys.stdout is then


def say(text: str) -> None:
    """Print a result as text, with its lines as they are."""
    OUT.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a line about the work, apart from its result."""
    ERR.print(text, highlight=False, markup=False, soft_wrap=True)


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

    heads = [escape(OUT.readable(column)) for column in columns]
    table = Table(*heads, title=escape(one_line(title)), title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(escape(OUT.readable(one_line(cell))) for cell in row))
    OUT.print(table)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Show on a terminal what is being done, and the fraction of it that is done; NaN where that can't be told."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn("line"), TextColumn("{task.description:<44}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        bar = progress.add_task("loading torch", total=None)

        def tell(step: str, done: float) -> None:
            total = None if done != done else 1.0
            progress.update(bar, description=one_line(step), total=total, completed=0.0 if total is None else min(done, 1.0))

        yield tell


def print_json(value: Any) -> None:
    """Print one JSON value, without NaN."""
    OUT.file.write(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
    OUT.file.flush()
