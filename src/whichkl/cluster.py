"""Cluster: workers map a function over parts of the data in a fixed order, in threads of this process or on a Ray cluster."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from whichkl._checks import InputError, ResourceError, cannot, require
from whichkl.process.held_signals import uninterrupted
from whichkl.process.lock import PROCESS_LOCK
from whichkl.process.memory import STREAM_BYTES, keep_memory
from whichkl.process.threads import one_thread, use_one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Parts per worker that run or wait; this bounds the memory of a pass."""
_SECONDS_BETWEEN_CHECKS = 1.0
"""Seconds between two checks of a cluster's own processes."""
_RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}
"""Environment variables during a pass: Ray sends no statistics, and failed parts are reported by this library alone."""


class Workers(ABC):
    """Where the parts of a pass are worked on. Results come in the order of the parts, so that sums are the same everywhere.

    Every part is computed by one thread of torch, since the rounding of a matrix product depends on the number of threads.
    """

    @abstractmethod
    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield `function(item)` for every item, in order."""


@dataclass(frozen=True)
class Threads(Workers):
    """This process, with one thread per core."""

    count: int = os.cpu_count() or 1

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Work `AHEAD` parts per thread ahead of the consumer."""
        keep_memory(STREAM_BYTES)
        if self.count == 1 or len(items) == 1 or PROCESS_LOCK.is_mine:  # a part in another thread could wait for the lock
            for item in items:
                with one_thread():
                    result = function(item)
                yield result
            return
        pool, started = _pool(self.count), []

        def start(item: Item) -> Future[Result]:
            started.append(pool.submit(function, item))
            return started[-1]

        try:
            yield from _ahead(items, lambda: AHEAD * self.count, start, lambda future: future.result())
        finally:
            for one in started:
                one.cancel()
            wait(started)


@dataclass(frozen=True)
class Ray(Workers):
    """A Ray cluster: every part is a task, which starts again on another machine if its machine is lost.

    Args:
        address: ``"auto"`` for the cluster that this machine belongs to (or a new one on this machine), ``"local"`` for a new one
            on this machine, or HOST:PORT.
        retries: how often a lost part starts again.
        most: largest number of parts at once; for ``"local"`` the number of processes.

    Source: Moritz et al. (2018).
    """

    address: str = "auto"
    retries: int = 4
    most: int | None = None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Submit parts when workers are free, and yield their results in order.

        Raises:
            ResourceError: the cluster can't be reached, or a part was lost more than `retries` times.
        """
        with self._tasks(function) as tasks:

            def fetch(reference: Any) -> Any:
                try:
                    return tasks.result(reference)
                except tasks.ray.exceptions.RayError as error:
                    because = f"a part of the data was lost {self.retries + 1} times ({_first_line(error)})"
                    instead = "Look at the machines' memory and logs, then start again"
                    raise ResourceError(cannot("go on with this pass", because, instead)) from error

            yield from _ahead(items, lambda: AHEAD * tasks.count_workers(), tasks.start, fetch)

    def as_completed(
        self, function: Callable[[Any], Result], take: Callable[[int], Any]
    ) -> Iterator[tuple[Any, Result | Exception]]:
        """Yield items with their results as they finish, in any order; an error if an item's worker died at every retry.

        Args:
            function: sent to the workers once.
            take: called with the number of workers when one of them is free; returns the next item, None if there is none now.

        Raises:
            ResourceError: the cluster can't be reached, lacks what the function needs, or is gone.
        """
        is_own = self.address == "local" and not require("ray", "cluster").is_initialized()
        with self._tasks(function, end=is_own) as tasks:
            while True:
                _refuse_lost_node(tasks.ray)
                workers = self.most or tasks.count_workers()
                while len(tasks.under_way) < workers and (item := take(workers)) is not None:
                    tasks.start(item)
                if not tasks.under_way:
                    return
                ready: list[Any] = []
                while not ready:
                    _refuse_lost_node(tasks.ray)
                    ready, _ = tasks.ray.wait(list(tasks.under_way), num_returns=1, timeout=_SECONDS_BETWEEN_CHECKS)
                item = tasks.under_way[ready[0]]
                try:
                    result: Any = tasks.result(ready[0])
                except (tasks.ray.exceptions.RayError, ConnectionError) as error:
                    if not is_workers_fault(error):
                        raise ResourceError(_gone(_first_line(error))) from error
                    result = ResourceError(_first_line(error))
                yield item, result

    @contextlib.contextmanager
    def _tasks(self, function: Callable[[Any], Any], *, end: bool = False) -> Iterator[_Tasks]:
        """Connect, and cancel at the end of the block what still runs; `end` shuts the cluster down too."""
        with _restored_process():
            tasks = _Tasks(self._connect(), function, self.retries)
            try:
                yield tasks
            finally:
                for reference in tasks.under_way:
                    tasks.ray.cancel(reference)
                if end:
                    uninterrupted(tasks.ray.shutdown)

    def _connect(self) -> Any:
        ray = require("ray", "cluster")
        if ray.is_initialized():
            return ray
        try:
            uninterrupted(lambda: self._start(ray))
        except (KeyboardInterrupt, SystemExit):
            uninterrupted(ray.shutdown)
            raise
        return ray

    def _start(self, ray: Any) -> None:
        if self.address == "local":
            ray.init("local", num_cpus=self.most, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            return
        try:
            if self.address != "auto":  # Ray itself would wait for many minutes
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host.removeprefix("ray://").strip("[]"), int(port)), timeout=5).close()
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            if self.address != "auto":
                because = f"no Ray cluster answers there ({_first_line(error)})"
                instead = "Start one with `ray start --head`, or leave `cluster=` out"
                raise ResourceError(cannot(f"use `cluster={self.address!r}`", because, instead)) from error
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def is_workers_fault(error: BaseException) -> bool:
    """Whether a task was lost because its worker crashed or ran out of memory, rather than because the cluster failed.

    >>> is_workers_fault(ConnectionError("the head node doesn't answer"))
    False
    """
    return type(error).__name__ in ("WorkerCrashedError", "OutOfMemoryError")


def _refuse_lost_node(ray: Any) -> None:
    """Check that the processes of a cluster that this process started are alive: Ray itself would wait 15 seconds, then exit."""
    node = getattr(getattr(ray, "_private", None) and ray._private.worker, "_global_node", None)
    for name in ("raylet", "gcs_server"):
        for started in getattr(node, "all_processes", {}).get(name, ()):
            if started.process.poll() is not None:
                raise ResourceError(_gone(f"its process `{name}` has ended"))


def _gone(why: str) -> str:
    return cannot("go on", f"the cluster is gone ({why})", "Look at its machines, then run the same command again to resume")


class _Tasks:
    """Calls of one function on the workers of a cluster."""

    def __init__(self, ray: Any, function: Callable[[Any], Any], retries: int) -> None:
        self.ray = ray
        self.under_way: dict[Any, Any] = {}
        """References of the calls that aren't fetched yet, with their items."""
        self._task = ray.remote(num_cpus=1, max_retries=retries)(_computed)
        try:
            self._function = ray.put(function)
        except Exception as error:  # a lambda's closure can hold anything
            because = f"it can't be sent to other processes ({_first_line(error)})"
            raise InputError(cannot("work on this elsewhere", because, "Leave `workers=` and `cluster=` out")) from error

    def count_workers(self) -> int:
        """Return the number of cores of the cluster now."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def start(self, item: Any) -> Any:
        """Submit an item, and return the reference of its result."""
        reference = self._task.remote(self._function, item)
        self.under_way[reference] = item
        return reference

    def result(self, reference: Any) -> Any:
        """Wait for a result; what the function raised is raised here."""
        try:
            result = self.ray.get(reference)
        except Exception as error:  # an interrupt leaves the call under way, so that it is cancelled
            del self.under_way[reference]
            if isinstance(error, self.ray.exceptions.RayTaskError):
                raise _cause(error) from None
            raise
        del self.under_way[reference]
        if isinstance(result, _Failed):
            raise result.error from None
        return result


@contextlib.contextmanager
def _restored_process() -> Iterator[None]:
    """Restore what Ray changes in this process: handlers of SIGTERM and of errors, and the environment."""
    is_main = threading.current_thread() is threading.main_thread()
    handler, hook, dumps = signal.getsignal(signal.SIGTERM), sys.excepthook, faulthandler.is_enabled()
    names = (*_RAY_SETTINGS, "PYTHONBREAKPOINT")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: value for name, value in _RAY_SETTINGS.items() if before[name] is None})
    try:
        yield
    finally:
        if is_main and signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)
        sys.excepthook = hook
        if not dumps:
            faulthandler.disable()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def workers_of(cluster: Workers | str | None) -> Workers:
    """Return the workers that `cluster=` names; None is this process."""
    if cluster is None:
        return Threads()
    if isinstance(cluster, Workers):
        return cluster
    if not isinstance(cluster, str) or not (cluster == "auto" or ":" in cluster):
        because = "it is neither 'auto' nor an address such as '10.0.0.1:6379'"
        raise InputError(cannot(f"use `cluster={cluster!r}`", because, "Give one of these, or leave it out"))
    return Ray(cluster)


def _ahead(
    items: Sequence[Any], limit_now: Callable[[], int], start: Callable[[Any], Any], fetch: Callable[[Any], Any]
) -> Iterator[Any]:
    """Keep up to `limit_now()` items under way, and yield their results in order."""
    waiting: deque[Any] = deque()
    limit = limit_now()
    for number, item in enumerate(items):
        waiting.append(start(item))
        if number % 64 == 63:
            limit = limit_now()  # a cluster grows and shrinks
        while len(waiting) >= limit:
            yield fetch(waiting.popleft())
    while waiting:
        yield fetch(waiting.popleft())


def _cause(error: Any) -> Exception:
    """Return what a task raised; if it couldn't start, what Ray reports."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, Exception) or type(cause).__module__.startswith("ray."):
        because = f"a worker failed ({_first_line(cause or error)})"
        return ResourceError(cannot("work on this cluster", because, "Install the same packages on every machine"))
    return cause


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _computed(function: Callable[[Any], Any], item: Any) -> Any:
    """Compute a part on a worker. An error is returned, since Ray logs a failed part whose result nobody fetches."""
    keep_memory(STREAM_BYTES)
    try:
        with one_thread():
            return function(item)
    except Exception as error:
        return _Failed(error)


@dataclass(frozen=True)
class _Failed:
    error: Exception


@lru_cache(maxsize=4)
def _pool(count: int) -> ThreadPoolExecutor:
    """Keep threads for the next pass: the first matrix product of a new thread takes as long as a hundred others."""
    return ThreadPoolExecutor(count, initializer=use_one_thread)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has no other threads
