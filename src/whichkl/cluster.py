"""Workers: map a function over parts of the data, here in threads or on the machines of a Ray cluster, in a fixed order."""

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
from typing import Any, Protocol, TypeVar

from whichkl._checks import InputError, ResourceError, cannot, require
from whichkl.process.held_signals import uninterrupted
from whichkl.process.lock import PROCESS_LOCK
from whichkl.process.memory import STREAM_BYTES, keep_memory
from whichkl.process.threads import one_thread, use_one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Parts under way or waiting, for each worker: what bounds the memory of a pass."""


_POLL = 1.0
"""Seconds between two looks at the processes of a cluster."""


class Workers(ABC):
    """Where the parts of a pass are worked on. Results come in the order of the parts, so that sums are the same anywhere.

    A part is computed by one thread of torch wherever it runs: the rounding of a matrix product depends on their number.
    """

    @abstractmethod
    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield `function(item)` for every item, in order."""


@dataclass(frozen=True)
class Threads(Workers):
    """This process, a thread for each core."""

    count: int = os.cpu_count() or 1

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Work `AHEAD` parts a thread ahead of the consumer."""
        keep_memory(STREAM_BYTES)
        if self.count == 1 or len(items) == 1 or PROCESS_LOCK.is_mine:  # which a part could need
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


class Source(Protocol):
    """Items to be worked on, which may be chosen when they are asked for."""

    def take(self, workers: int) -> Any:
        """Return the next item for one of so many workers; None where there is none now."""


@dataclass(frozen=True)
class Ray(Workers):
    """A Ray cluster: every part is a task, begun anew elsewhere when its machine is lost.

    Args:
        address: ``"auto"`` for the cluster that this machine belongs to (or a new one on this machine alone), ``"local"`` for a
            new one on this machine alone, or HOST:PORT.
        retries: how often a lost part is begun anew.
        most: how many are worked on at once; of ``"local"`` that many processes.

    Source: Moritz et al. (2018).
    """

    address: str = "auto"
    retries: int = 4
    most: int | None = None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Submit parts as workers get free, and fetch their results in order.

        Raises:
            ResourceError: the cluster can't be reached, or a part was lost more than `retries` times.
        """
        with _kept():
            yield from self._mapped(function, items)

    def _mapped(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        ray = self._connect()
        task = ray.remote(num_cpus=1, max_retries=self.retries)(_alone)
        shared = ray.put(function)
        started: list[Any] = []

        def start(item: Any) -> Any:
            started.append(task.remote(shared, item))
            return started[-1]

        def fetch(reference: Any) -> Any:
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except ray.exceptions.RayError as error:
                because = f"a part of the data was lost {self.retries + 1} times ({_first_line(error)})"
                instead = "Look at the machines' memory and logs, then start again"
                raise ResourceError(cannot("go on with this pass", because, instead)) from error
            started.remove(reference)
            return _unwrapped(result)

        try:
            yield from _ahead(items, lambda: AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))), start, fetch)
        finally:
            for reference in started:
                ray.cancel(reference)

    def as_completed(self, function: Callable[[Any], Result], source: Source) -> Iterator[tuple[Any, Result | Exception]]:
        """Yield items with their results as they come, in any order; the error where an item's worker died again and again.

        Args:
            function: sent to the workers once.
            source: asked for the next item whenever a worker gets free.

        Raises:
            ResourceError: the cluster can't be reached, lacks what the function needs, or is gone.
        """
        with _kept():
            yield from self._as_completed(function, source)

    def _as_completed(self, function: Callable[[Any], Result], source: Source) -> Iterator[tuple[Any, Result | Exception]]:
        ray = require("ray", "cluster")
        is_own = self.address == "local" and not ray.is_initialized()
        self._connect()
        task = ray.remote(num_cpus=1, max_retries=self.retries)(_alone)
        try:
            shared = ray.put(function)
        except Exception as error:  # a lambda's closure can hold anything
            because = f"it can't be sent to other processes ({_first_line(error)})"
            raise InputError(cannot("work on this elsewhere", because, "Leave `workers=` and `cluster=` out")) from error
        under_way: dict[Any, Any] = {}
        try:
            while True:
                _refuse_lost_node(ray)
                workers = self.most or max(1, int(ray.cluster_resources().get("CPU", 1)))
                while len(under_way) < workers and (item := source.take(workers)) is not None:
                    under_way[task.remote(shared, item)] = item
                if not under_way:
                    return
                ready: list[Any] = []
                while not ready:
                    _refuse_lost_node(ray)
                    ready, _ = ray.wait(list(under_way), num_returns=1, timeout=_POLL)
                item = under_way.pop(ready[0])
                try:
                    result: Any = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:
                    raise _cause(error) from None
                except (ray.exceptions.RayError, ConnectionError) as error:
                    if not is_workers_fault(error):
                        raise ResourceError(_gone(_first_line(error))) from error
                    result = ResourceError(_first_line(error))
                yield item, _unwrapped(result)
        finally:
            for reference in under_way:
                ray.cancel(reference)
            if is_own:
                uninterrupted(ray.shutdown)

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
            if self.address != "auto":
                _knock(self.address)
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            if self.address != "auto":
                because = f"no Ray cluster answers there ({_first_line(error)})"
                instead = "Start one with `ray start --head`, or leave `cluster=` out"
                raise ResourceError(cannot(f"use `cluster={self.address!r}`", because, instead)) from error
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def is_workers_fault(error: BaseException) -> bool:
    """Whether a lost task took its worker with it, by a crash or by too much memory; all else is the cluster's own loss.

    >>> is_workers_fault(ConnectionError("the head node doesn't answer"))
    False
    """
    return type(error).__name__ in ("WorkerCrashedError", "OutOfMemoryError")


def _refuse_lost_node(ray: Any) -> None:
    """Check that the processes of a cluster that this process started are alive: Ray would wait for 15 seconds, then exit.

    Raises:
        ResourceError: one has ended.
    """
    node = getattr(getattr(ray, "_private", None) and ray._private.worker, "_global_node", None)
    for name in ("raylet", "gcs_server"):
        for started in getattr(node, "all_processes", {}).get(name, ()):
            if started.process.poll() is not None:
                raise ResourceError(_gone(f"its process `{name}` has ended"))


def _gone(why: str) -> str:
    return cannot("go on", f"the cluster is gone ({why})", "Look at its machines, then run the same command again to resume")


_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}
"""Ray's own, for the time of a pass: nothing is sent anywhere, and the first failed part is reported, in our words."""


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Put back what Ray changes for the whole process: how it ends on SIGTERM, what it does on errors, and its environment."""
    is_main = threading.current_thread() is threading.main_thread()
    handler, hook, dumps = signal.getsignal(signal.SIGTERM), sys.excepthook, faulthandler.is_enabled()
    names = (*_SETTINGS, "PYTHONBREAKPOINT")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: value for name, value in _SETTINGS.items() if before[name] is None})
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
    """Return the workers that an argument `cluster=` means; None is this process.

    Raises:
        InputError: it is something else than None, ``"auto"`` or an address.
    """
    if cluster is None:
        return Threads()
    if isinstance(cluster, Workers):
        return cluster
    if not isinstance(cluster, str) or not (cluster == "auto" or ":" in cluster):
        because = "it is neither 'auto' nor an address such as '10.0.0.1:6379'"
        raise InputError(cannot(f"use `cluster={cluster!r}`", because, "Give one of these, or leave it out"))
    return Ray(cluster)


def _ahead(
    items: Sequence[Any], most: Callable[[], int], start: Callable[[Any], Any], fetch: Callable[[Any], Any]
) -> Iterator[Any]:
    """Keep up to `most()` items under way, and yield their results in order."""
    waiting: deque[Any] = deque()
    limit = most()
    for number, item in enumerate(items):
        waiting.append(start(item))
        if number % 64 == 63:
            limit = most()  # a cluster grows and shrinks
        while len(waiting) >= limit:
            yield fetch(waiting.popleft())
    while waiting:
        yield fetch(waiting.popleft())


def _knock(address: str) -> None:
    """Try to reach HOST:PORT within a few seconds: Ray itself would wait for many minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.removeprefix("ray://").strip("[]"), int(port)), timeout=5).close()


def _cause(error: Any) -> Exception:
    """Return what a task raised; where it couldn't even begin, what Ray says of it."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, Exception) or type(cause).__module__.startswith("ray."):
        because = f"a worker failed ({_first_line(cause or error)})"
        return ResourceError(cannot("work on this cluster", because, "Install the same packages on every machine"))
    return cause


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _alone(function: Callable[[Any], Any], item: Any) -> Any:
    """Work on a part; what it raises is returned, since Ray shouts about a failed part that nobody asks for any more."""
    keep_memory(STREAM_BYTES)
    try:
        with one_thread():
            return function(item)
    except Exception as error:
        return _Failed(error)


@dataclass(frozen=True)
class _Failed:
    error: Exception


def _unwrapped(result: Any) -> Any:
    if isinstance(result, _Failed):
        raise result.error from None
    return result


@lru_cache(maxsize=4)
def _pool(count: int) -> ThreadPoolExecutor:
    """Keep the threads of one pass for the next: a new thread's first matrix product takes as long as a hundred others."""
    return ThreadPoolExecutor(count, initializer=use_one_thread)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork takes no threads along
