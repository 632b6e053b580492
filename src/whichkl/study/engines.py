"""Engines: where cells are worked on: in this process, or in tasks on a Ray cluster, each of a second's work or more."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from whichkl.cluster import Ray, Threads
from whichkl.study.cell import Bench, Outcome, failed
from whichkl.study.distilling import bench_of, failed_of
from whichkl.study.plan import Cell, Plan

_TASK = 1.0
"""Seconds of work that a task has at least, as far as can be told from the cells before."""
_LARGEST = 1_000


def here(plan: Plan, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """Work on the cells one after another, those of a seed on the same held-out draws."""
    bench = bench_of(plan, Bench)
    for cell in cells:
        yield cell, bench.run(cell)


def on_ray(plan: Plan, cells: Sequence[Cell], ray: Ray) -> Iterator[tuple[Cell, Outcome]]:
    """Work on the cells in tasks of several, and yield each as its task ends, whatever the order.

    A task whose worker is lost is begun anew, by Ray some times over, then cell by cell; a cell that takes its worker with it
    even alone has failed. A cluster that is lost (LocalRayletDiedError, NodeDiedError, no connection) says nothing of the cells
    in flight: they are left undone.

    Raises:
        ResourceError: the cluster can't be reached, or is gone.
    """
    sizes = _Sizes()
    bundles = _Bundles(cells, sizes)
    for bundle, result in ray.as_completed(_Task.of(plan), bundles):
        if isinstance(result, Exception):
            if len(bundle) == 1:
                why = f"its worker died {ray.retries + 1} times ({' '.join(str(result).split())[:200]})"
                yield bundle[0], failed_of(plan, bundle[0], why, failed)
            else:
                bundles.put_back(bundle)
            continue
        sizes.learn([outcome.seconds["total"] for outcome in result])
        yield from zip(bundle, result, strict=True)


class _Sizes:
    """How many cells make up a second's work."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def learn(self, seconds: Sequence[float]) -> None:
        self.count += len(seconds)
        self.seconds += sum(seconds)

    def now(self, left: int, workers: int) -> int:
        """One at first; later enough, but no more than a worker's share of what is left."""
        if self.count == 0:
            return 1
        enough = math.ceil(_TASK * self.count / max(self.seconds, 1e-6))
        return max(1, min(enough, _LARGEST, math.ceil(left / max(1, workers))))


class _Bundles:
    """Cells still to be given out, in bundles whose size is chosen when one is taken."""

    def __init__(self, cells: Sequence[Cell], sizes: _Sizes) -> None:
        self.cells, self.sizes = deque(cells), sizes
        self.alone: deque[Cell] = deque()

    def take(self, workers: int) -> tuple[Cell, ...] | None:
        """Return the next bundle; None where all are given out."""
        if self.alone:
            return (self.alone.popleft(),)
        if not self.cells:
            return None
        size = self.sizes.now(len(self.cells), workers)
        return tuple(self.cells.popleft() for _ in range(min(size, len(self.cells))))

    def put_back(self, cells: Sequence[Cell]) -> None:
        """Take back the cells of a bundle whose worker died: one of them may have been too much for it."""
        self.alone += cells


@dataclass(frozen=True)
class _Task:
    """What a worker is given once: the plan."""

    plan: Plan

    @classmethod
    def of(cls, plan: Plan) -> _Task:
        """Leave out the list of all cells, which the plan remembers: each task would read it anew."""
        return cls(replace(plan))

    def __call__(self, cells: Sequence[Cell]) -> list[Outcome]:
        bench = bench_of(self.plan, lambda plan: Bench(plan, Threads(1)))
        return [bench.run(cell) for cell in cells]
