"""Held signals: a step runs without interruption, such as the start and the end of Ray, which would crash the process."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_BETWEEN_HANDLERS = 0.05
"""Seconds between two installations of the handlers, since Ray's core replaces and removes them unseen by Python."""


def uninterrupted(step: Callable[[], None]) -> None:
    """Run a step in another thread; a signal that arrives meanwhile is raised afterwards, a second one at once.

    The step runs in this thread if the process has no handler of SIGTERM, or if this isn't the main thread.
    """
    before = {one: signal.getsignal(one) for one in _SIGNALS}
    if threading.current_thread() is not threading.main_thread() or not callable(before[signal.SIGTERM]):
        step()
        return
    handlers = {one: handler for one, handler in before.items() if callable(handler)}
    held: list[int] = []
    failed: list[BaseException] = []
    is_done = threading.Event()

    def hold(number: int, frame: Any) -> None:
        if hasattr(signal, "alarm"):
            signal.alarm(0)  # if Ray's core got the signal first, it would abort the process three seconds later
        held.append(number)
        if len(held) > 1:
            handlers[signal.Signals(number)](number, frame)

    def work() -> None:
        try:
            step()
        except BaseException as error:
            failed.append(error)
        is_done.set()

    try:
        for one in handlers:
            signal.signal(one, hold)
        _steps().put(work)
        while not is_done.wait(_SECONDS_BETWEEN_HANDLERS):
            for one in handlers:
                signal.signal(one, hold)
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    if failed:
        raise failed[0]
    if held:
        signal.raise_signal(held[0])


@lru_cache(maxsize=1)
def _steps() -> queue.SimpleQueue[Callable[[], None]]:
    """Return a queue of steps for a thread that never ends: Linux ends Ray's processes with the thread that began them."""
    steps: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            steps.get()()

    threading.Thread(target=work, name="whichkl-steps", daemon=True).start()
    return steps
