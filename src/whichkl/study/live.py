"""Live: a table of the arms that fills while a study runs, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from whichkl.printable import one_line
from whichkl.study.arms import arm_of
from whichkl.study.comparing import Progress
from whichkl.study.measures import COST, column_words
from whichkl.study.result import mean_text

_SHOWN = {name: column_words(name) for name in ("forward_kl", "reverse_kl", "coverage", COST.name)}
"""Columns that a narrow terminal has room for."""


class LiveTable:
    """Shows `Progress` on a terminal; elsewhere it shows nothing."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the console, on which nothing is drawn yet, and a clock that returns seconds."""
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.last = Progress(0, 0, 0, 0, None)
        self.clock, self.begun = clock, clock()
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def tell(self, progress: Progress) -> None:
        """Draw how far the study is."""
        self.last = progress
        if progress.cell is not None:
            self.rows.setdefault(arm_of(progress.cell.row), []).append(progress.cell.row)
        if self.live is not None:
            self.live.update(self.drawn())

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the cells of this run; None before the first."""
        mine = self.last.done - self.last.skipped
        return None if mine == 0 else (self.clock() - self.begun) / mine * (self.last.of - self.last.done)

    def drawn(self) -> Group:
        """Return the table and a line below it."""
        table = Table("arm", *_SHOWN.values(), "seeds", "failed", box=box.SIMPLE_HEAD)
        for arm, rows in self.rows.items():
            bad = sum(row["status"] == "failed" for row in rows)
            values = [mean_text(rows, name) for name in _SHOWN]
            table.add_row(escape(one_line(arm)), *values, str(len(rows)), str(bad) if bad else "")
        p, left = self.last, self.seconds_left
        said = f"{p.done:,} of {p.of:,} cells" + (f", {p.skipped:,} from an earlier run" if p.skipped else "")
        said += f", {p.failed:,} failed" if p.failed else ""
        said += "" if left is None else f", about {duration(left)} left"
        return Group(table, ProgressBar(total=max(1, p.of), completed=p.done, width=60), Text(said))


def duration(seconds: float) -> str:
    """Write a time to two units.

    >>> duration(4), duration(250), duration(90_000)
    ('4 s', '4 min 10 s', '25 h 0 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3_600} h {whole % 3_600 // 60} min"
