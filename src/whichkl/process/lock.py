"""The lock around what Python or torch keep once for the whole process, and which is changed for a moment and put back."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator


class _ProcessLock:
    """A re-entrant lock, free again in a forked child: the thread that held it doesn't live there."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._owner == threading.get_ident()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside the block."""
        lock = self._lock  # the one that was taken is the one to release, also in a child that was forked inside the block
        with lock:
            before, self._owner = self._owner, threading.get_ident()
            try:
                yield
            finally:
                self._owner = before


PROCESS_LOCK = _ProcessLock()
"""Held while a global state is another than the user's: global seeds, or the filters of warnings.

Whoever holds it waits for no other thread of this library, which could need the lock too: see `cluster.Threads.map`.
"""


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Show no warning inside the block; the filters, which all threads share until Python 3.14, are put back in order."""
    with PROCESS_LOCK.held(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
