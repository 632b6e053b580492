"""Engines: cells run in this process, or on a Ray cluster in tasks that each take a second or more."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from whichkl.cluster import Ray, Threads
from whichkl.study.cell import Outcome, bench_of, failed
from whichkl.study.plan import AnyPlan, Cell

_MIN_TASK_SECONDS = 1.0
"""Least work of a task, estimated from the cells before: a task costs its sender some milliseconds."""
_MAX_TASK_CELLS = 1_000


def here(plan: AnyPlan, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """Work on the cells one after another, those of a seed on the same held-out draws."""
    bench = bench_of(plan)
    for cell in cells:
        yield cell, bench.run(cell)


def on_ray(plan: AnyPlan, cells: Sequence[Cell], ray: Ray) -> Iterator[tuple[Cell, Outcome]]:
    """Work on the cells in tasks of several, and yield each as its task ends, whatever the order.

    A task whose worker is lost is started again: by Ray several times, then cell by cell. A cell whose worker dies even when
    the cell is alone has failed. A lost cluster (Ray's `LocalRayletDiedError`, `NodeDiedError`) says nothing about the cells
    in flight: they are left undone.
    """
    bundles = _Bundles(cells)
    for bundle, result in ray.as_completed(_Task(plan), bundles.take):
        if not isinstance(result, Exception):
            bundles.learn([outcome.seconds["total"] for outcome in result])
            yield from zip(bundle, result, strict=True)
        elif len(bundle) == 1:
            why = f"its worker died {ray.retries + 1} times ({' '.join(str(result).split())[:200]})"
            yield bundle[0], failed(bundle[0], why)
        else:
            bundles.put_back(bundle)


class _Bundles:
    """Cells still to be given out, in bundles of about a second's work, estimated from the cells that are done."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells: deque[Cell] = deque(cells)
        self.alone: deque[Cell] = deque()
        self.count, self.seconds = 0, 0.0

    def learn(self, seconds: Sequence[float]) -> None:
        """Note how long cells took."""
        self.count += len(seconds)
        self.seconds += sum(seconds)

    def take(self, workers: int) -> tuple[Cell, ...] | None:
        """Return the next bundle; None when all cells are given out."""
        if self.alone:
            return (self.alone.popleft(),)
        if not self.cells:
            return None
        size = 1  # as long as no cell's time is known
        if self.count:
            enough = math.ceil(_MIN_TASK_SECONDS * self.count / max(self.seconds, 1e-6))
            # no more than a worker's share of what is left, so that all workers end at about the same time
            size = max(1, min(enough, _MAX_TASK_CELLS, math.ceil(len(self.cells) / max(1, workers))))
        return tuple(self.cells.popleft() for _ in range(min(size, len(self.cells))))

    def put_back(self, cells: Sequence[Cell]) -> None:
        """Take back the cells of a bundle whose worker died; each is given out alone, since one of them may have killed it."""
        self.alone += cells


class _Task:
    """The work of a worker; it holds the plan, which is sent once."""

    def __init__(self, plan: AnyPlan) -> None:
        self.plan = replace(plan)  # without the list of all cells, which the plan caches: each task would unpickle it

    def __call__(self, cells: Sequence[Cell]) -> list[Outcome]:
        bench = bench_of(self.plan, Threads(1))
        return [bench.run(cell) for cell in cells]
