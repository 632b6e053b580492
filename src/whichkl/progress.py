"""Progress: a bar on a terminal or in a notebook while a call takes longer than two seconds."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

from whichkl.printable import one_line

P = ParamSpec("P")
R = TypeVar("R")
Tell = Callable[[str, float], None]

_SECONDS_WITHOUT_BAR = 2.0
_UPDATES_PER_SECOND = 5
_ONE_BAR = threading.Lock()
"""Held while a bar may be shown: calls inside that call, and those of other threads, show none."""


def with_progress(first: str, heard: Callable[[Tell], Any] = lambda tell: tell) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it shows a bar if it takes longer than two seconds, unless its argument `tell` is given.

    Args:
        first: the step that is shown until the function reports another one.
        heard: what the function takes as `tell`, made of the bar's `tell(step, fraction)`.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        takes_tell = "tell" in inspect.signature(function).parameters

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs.get("tell") is not None or not _is_watched():
                return function(*args, **kwargs)
            with shown_progress(first) as tell:
                if takes_tell:
                    kwargs["tell"] = heard(tell)
                return function(*args, **kwargs)

        return called

    return decorated


@contextlib.contextmanager
def shown_progress(first: str, console: Any = None) -> Iterator[Tell]:
    """Show the current step and the fraction of it that is done, NaN where it isn't known; the bar is removed at the end.

    Args:
        first: the first step.
        console: where the command line shows a bar at once, if it is a terminal; by default the bar is on standard error after
            two seconds, if somebody watches it and there is no other bar.
    """
    is_free = _ONE_BAR.acquire(blocking=False)
    is_shown = is_free and _is_watched() if console is None else console.is_terminal
    bar = _Bar(first, console) if is_shown else None
    try:
        yield (lambda step, done: None) if bar is None else bar.tell
    finally:
        if bar is not None:
            bar.close()
        if is_free:
            _ONE_BAR.release()


def switch_off() -> None:
    """Show no bars in this process: the command line shows its own."""
    _ONE_BAR.acquire(blocking=False)


def _is_watched() -> bool:
    """Whether somebody sees the bar: a terminal that gets both outputs, or a notebook with widgets; and rich is installed."""
    if "ipykernel" in sys.modules:
        return find_spec("ipywidgets") is not None and find_spec("rich") is not None
    try:
        is_terminal = sys.stderr.isatty() and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # no output, or a closed one
        return False
    return is_terminal and find_spec("rich") is not None


class _Bar:
    """A bar that appears after some seconds; nothing that fails here reaches the call that it shows."""

    def __init__(self, first: str, console: Any) -> None:
        self.step, self.done, self.console = first, math.nan, console
        self.lock, self.is_closed = threading.Lock(), False
        self.shown: Any = None
        self.timer = threading.Timer(_SECONDS_WITHOUT_BAR, self._begin)
        self.timer.daemon = True
        if console is None:
            self.timer.start()
        else:
            self._begin()

    def tell(self, step: str, done: float) -> None:
        """Report the current step, and the fraction of it that is done."""
        self.step, self.done = step, done
        if self.shown is not None:
            self._update()

    def close(self) -> None:
        """Remove the bar."""
        self.timer.cancel()
        with self.lock, contextlib.suppress(Exception):
            self.is_closed = True
            if self.shown is not None:
                self.shown.stop()

    def _begin(self) -> None:
        with self.lock, contextlib.suppress(Exception):
            if self.is_closed:
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = SpinnerColumn("line"), TextColumn("{task.description:<44}", markup=False), BarColumn(), TimeElapsedColumn()
            shown = Progress(
                *columns,
                console=Console(stderr=True) if self.console is None else self.console,
                transient=True,
                refresh_per_second=_UPDATES_PER_SECOND,
                # in a user's process, what is printed stays on its own stream
                redirect_stdout=self.console is not None,
                redirect_stderr=self.console is not None,
            )
            shown.add_task(one_line(self.step), total=None)
            shown.start()
            self.shown = shown
            self._update()

    def _update(self) -> None:
        with contextlib.suppress(Exception):
            total = None if math.isnan(self.done) else 1.0
            completed = 0.0 if total is None else min(self.done, 1.0)
            self.shown.update(self.shown.task_ids[0], description=one_line(self.step), total=total, completed=completed)
