"""Console: how the commands print tables, lines, JSON and progress."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from whichkl._checks import plain
from whichkl.commands import exits
from whichkl.printable import one_line, printable, spelled
from whichkl.progress import Tell, shown_progress


class _Console(Console):
    """A console that prints no control characters but rich's own, and no characters that its stream can't encode."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object, and make its text printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=self.readable(segment.text))

    def readable(self, text: str) -> str:
        """Return text in the form that this stream can print."""
        return spelled(printable(text), self.encoding)

    def on_broken_pipe(self) -> None:
        """Pass the error on to `exits`: rich would end the process."""
        raise


OUT, ERR = _Console(), _Console(stderr=True)
_MAX_SHOWN = 8
"""Largest number of values of a list that are shown."""


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """Keep standard output for results: what the user's code prints in the block goes to standard error.

    That is also what its C libraries and the processes that it starts print.
    """
    with _output_apart(sys.stdout) as out, contextlib.redirect_stdout(sys.stderr):
        OUT.file = out
        try:
            yield
            out.flush()
        finally:
            OUT.file = None  # type: ignore[assignment]  # rich then looks sys.stdout up at every print


@contextlib.contextmanager
def _output_apart(out: Any) -> Iterator[Any]:
    """Point the descriptor of standard output to that of standard error, and yield a stream to where it pointed before."""
    try:
        number, error = out.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # streams without descriptors, as in a test
        yield out
        return
    out.flush()
    before = os.dup(number)
    os.dup2(error, number)
    stream = open(before, "w", encoding=out.encoding, errors=out.errors)  # noqa: PTH123, SIM115
    try:
        yield exits.OutputStream(stream, must_work=True)
    finally:
        os.dup2(before, number)
        with contextlib.suppress(OSError):  # an output that can't be written was reported when it was flushed
            stream.close()


def say(text: str) -> None:
    """Print a result as text; its lines aren't wrapped."""
    OUT.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a line about the work to standard error."""
    ERR.print(text, highlight=False, markup=False, soft_wrap=True)


def show(result: Any, as_json: bool) -> None:
    """Print a result as its page of text, or as one JSON object."""
    print_json(result.to_dict()) if as_json else say(str(result))


def shown(values: Any) -> str:
    """Return numbers to five digits; a list shows its first eight."""
    if isinstance(values, list):
        return "[" + ", ".join(shown(value) for value in values[:_MAX_SHOWN]) + (", …]" if len(values) > _MAX_SHOWN else "]")
    return f"{values:.5g}"


def found(findings: frozenset[str]) -> str:
    """Return the findings, separated by commas."""
    return ", ".join(sorted(name.replace("_", " ") for name in findings)) or "nothing against it"


def table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table; markup in its cells isn't read."""
    from rich import box
    from rich.table import Table

    heads = [escape(OUT.readable(column)) for column in columns]
    table = Table(*heads, title=escape(one_line(title)), title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(escape(OUT.readable(one_line(cell))) for cell in row))
    OUT.print(table)


def progress() -> contextlib.AbstractContextManager[Tell]:
    """Show on a terminal the current step and the fraction of it that is done; NaN where the fraction isn't known."""
    return shown_progress("loading torch", ERR)


def print_json(value: Any) -> None:
    """Print one JSON value, without NaN."""
    OUT.file.write(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
    OUT.file.flush()
