"""Lock: one thread at a time changes states that Python and torch keep once per process, and restores them."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator


class _ProcessLock:
    """A re-entrant lock that is free in a forked child, which doesn't have the thread that held it."""

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
        lock = self._lock  # a child that was forked inside the block has another lock
        with lock:
            before, self._owner = self._owner, threading.get_ident()
            try:
                yield
            finally:
                self._owner = before


PROCESS_LOCK = _ProcessLock()
"""Held while a global state differs from the user's: global seeds, or the filters of warnings.

A thread that holds it must not wait for other threads of this library, which may need the lock too: see `cluster.Threads.map`.
"""


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Show no warnings inside the block. Until Python 3.14 all threads share the filters, so they are restored under the lock."""
    with PROCESS_LOCK.held(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
