"""Compare: fit every family by every objective from every seed at equal cost, and score all of them on unseen draws."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from whichkl._arguments import typed
from whichkl._checks import InputError, as_int, cannot
from whichkl.cluster import Ray, workers_of
from whichkl.distillation.teacher_target import TeacherTarget
from whichkl.process.torch_modes import plain_modes
from whichkl.progress import Tell, with_progress
from whichkl.study.cell import Outcome
from whichkl.study.engines import here, on_ray
from whichkl.study.ledger import Ledger, Stored, stored_of
from whichkl.study.measures import columns_in
from whichkl.study.plan import AnyPlan, Cell, Metric, distillation_plan_of, plan_of
from whichkl.study.result import Study, ordered
from whichkl.study.writers import write_tables
from whichkl.targets import Target

_MIN_SEEDS = 2
"""Least number of seeds after which arms are dropped."""


@dataclass(frozen=True)
class Progress:
    """The progress of a study; reported at its start, and after every cell."""

    done: int
    of: int
    """Number of cells that are planned; a pilot plans fewer as it drops arms."""
    skipped: int
    """Number of the done cells that an earlier run had finished."""
    failed: int
    cell: Stored | None
    """The cell that was done last."""


def _cells_of(tell: Tell) -> Callable[[Progress], None]:
    """Return the function that reports a study's progress to a bar."""
    return lambda progress: tell(f"{progress.done:,} of {progress.of:,} cells", progress.done / max(1, progress.of))


@typed
@with_progress("comparing", _cells_of)
@plain_modes()
def compare(
    target: Any,
    families: Any = None,
    objectives: Any = None,
    seeds: int | Sequence[int] = 10,
    budget: int | None = None,
    metrics: Sequence[str | Metric] | None = None,
    out: str | os.PathLike[str] | None = None,
    cluster: str | None = None,
    workers: int | None = None,
    pilot: bool = False,
    *,
    held_out: float = 0.2,
    draws: int = 10_000,
    recompute: bool = False,
    tell: Callable[[Progress], None] | None = None,
) -> Study:
    """Fit families by objectives from several seeds at equal cost, and score each fit on draws that no fit has seen.

    The target counts what a cell costs: log densities, scores, fresh draws, reads of fixed rows. Each seed holds out other rows
    of fixed samples. All cells of a seed are scored on the same draws, so that arms can be compared in pairs.

    Args:
        target: a `Target`, or anything that `Target.of` takes; or a `whichkl.distillation.DistillationTarget` or
            `LanguageTarget`.
        families: families or their names; by default the one that `fit` takes. For a distillation, students by name.
        objectives: objectives or their names; by default forward and reverse KL, as far as the access allows. Of
            language models with their prefixes, such as ``"reverse_kl@student"``.
        seeds: how many, or which.
        budget: evaluations that a solver may use in a cell; one that runs out is `stopped`, and keeps its best model.
        metrics: names of the scorecard (`whichkl.study.MEASURES`), by default all, and functions f(model, draws) of your own.
        out: a folder for the cells and tables. If interrupted, make the same call again to resume; finished cells are kept.
        cluster: ``"auto"`` or the address of a Ray cluster.
        workers: number of processes on this machine, also by Ray.
        pilot: whether to drop the worse half of the arms after two seeds, and again after four.
        held_out: share of fixed samples that no fit of a seed sees.
        draws: number of fresh draws of p and of q on which a cell is scored.
        recompute: whether to compute cells again that failed, or whose files are corrupt.
        tell: called after every cell.

    Raises:
        InputError: an argument is bad, or `out` holds another study.
        TargetError: an objective requires what the target doesn't have.
        ResourceError: `out` can't be written or is in use, or the cluster can't be reached.
        IntegrityError: a cell in `out` isn't what was written.

    >>> from torch.distributions import Laplace
    >>> study = compare(Laplace(0.0, 1.0), seeds=2)
    >>> study.table["objective"], study.table["status"]
    (['forward_kl', 'reverse_kl', 'forward_kl', 'reverse_kl'], ['converged', 'converged', 'converged', 'converged'])
    """
    if isinstance(target, TeacherTarget):
        if budget is not None or metrics is not None:
            because = "the target fixes how students are trained, and all measures are always taken"
            raise InputError(cannot("set `budget=` or `metrics=` of distillations", because, "Leave them out"))
        plan: AnyPlan = distillation_plan_of(target, families, objectives, seeds)
    else:
        plan = plan_of(target, families, objectives, seeds, budget, metrics, held_out=held_out, draws=draws)
    return run(plan, out, cluster, workers, pilot=pilot, recompute=recompute, tell=tell)


@plain_modes()
def run(
    plan: AnyPlan,
    out: str | os.PathLike[str] | None = None,
    cluster: str | None = None,
    workers: int | None = None,
    *,
    pilot: bool = False,
    recompute: bool = False,
    tell: Callable[[Progress], None] | None = None,
) -> Study:
    """Run a plan; see `compare` for the arguments and errors."""
    workers = as_int(workers)
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise InputError(cannot(f"use `workers={workers!r}`", "it isn't a whole number of at least 1", "Give, say, 4"))
    if workers is not None and cluster is not None:
        because = "workers are processes of this machine"
        raise InputError(cannot("use both `workers=` and `cluster=`", because, "Give one of them"))
    ray = Ray("local", most=workers) if workers is not None else None if cluster is None else workers_of(cluster)
    config, folder = {**plan.config, "pilot": pilot}, None if out is None else Path(out)
    with contextlib.ExitStack() as stack:
        store: _Memory | Ledger = _Memory()
        if folder is not None:
            store = stack.enter_context(Ledger.opened(folder, config, recompute=recompute))
        work = _Run(plan, store, ray if isinstance(ray, Ray) else None, tell or (lambda _: None))
        cells, dropped = work.finish_with_pilot() if pilot else (work.finish(plan.cells), ())
        target = plan.target if isinstance(plan.target, Target) else None
        study = Study(ordered(cells, config), config, folder, dropped, target)
        if isinstance(store, Ledger) and folder is not None:
            store.settle()  # a table never has a cell that isn't on disk
            write_tables(folder, study.cells, study.table)
    return study


class _Memory:
    """Keeps the cells of a study without a folder."""

    def __init__(self) -> None:
        self.cells: dict[str, Stored] = {}

    def write(self, key: str, outcome: Outcome) -> Stored:
        self.cells[key] = stored_of(key, outcome.files, outcome.seconds, None)
        return self.cells[key]


class _Run:
    """Works on the cells that the store doesn't have, and stores each as it is done."""

    def __init__(self, plan: AnyPlan, store: _Memory | Ledger, ray: Ray | None, tell: Callable[[Progress], None]) -> None:
        self.plan, self.store, self.ray, self.tell = plan, store, ray, tell
        self.done = self.skipped = self.failed = self.of = 0

    def finish(self, cells: Sequence[Cell], more: int = 0) -> list[Stored]:
        """Work on those of these cells that aren't done, and return all of them; `more` are planned after them."""
        # those of an earlier run
        known = [cell for cell in cells if cell.key in self.store.cells]
        self.of = self.done + len(cells) + more
        self.done, self.skipped = self.done + len(known), self.skipped + len(known)
        self.failed += sum(self.store.cells[cell.key].row["status"] == "failed" for cell in known)
        self.tell(Progress(self.done, self.of, self.skipped, self.failed, None))
        left = [cell for cell in cells if cell.key not in self.store.cells]
        for cell, outcome in on_ray(self.plan, left, self.ray) if self.ray is not None and left else here(self.plan, left):
            stored = self.store.write(cell.key, outcome)
            self.done, self.failed = self.done + 1, self.failed + (outcome.row["status"] == "failed")
            self.tell(Progress(self.done, self.of, self.skipped, self.failed, stored))
        return [self.store.cells[cell.key] for cell in cells]

    def finish_with_pilot(self) -> tuple[list[Stored], tuple[tuple[str, int], ...]]:
        """Work on the cells rung by rung; after each, the worse half of the arms is dropped."""
        arms = list(dict.fromkeys(cell.arm for cell in self.plan.cells))
        found: list[Stored] = []
        arm_of: list[str] = []
        dropped: list[tuple[str, int]] = []
        steps = rungs(self.plan.seeds)
        for i, seeds in enumerate(steps):
            cells = [cell for cell in self.plan.cells if cell.seed in seeds and cell.arm in arms]
            found += self.finish(cells, len(arms) * sum(map(len, steps[i + 1 :])))
            arm_of += [cell.arm for cell in cells]
            if i + 1 < len(steps) and len(arms) > 1:
                kept = survivors(arms, [cell.row for cell in found], arm_of)
                dropped += [(arm, sum(map(len, steps[: i + 1]))) for arm in arms if arm not in kept]
                arms = kept
        return found, tuple(dropped)


def rungs(seeds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the seeds of each rung: two, then two more, then all others.

    >>> rungs([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    ((0, 1), (2, 3), (4, 5, 6, 7, 8, 9))
    >>> rungs([0, 1, 2])
    ((0, 1, 2),)
    """
    cuts = [n for n in (_MIN_SEEDS, 2 * _MIN_SEEDS) if len(seeds) >= 2 * n]
    return tuple(tuple(seeds[a:b]) for a, b in zip([0, *cuts], [*cuts, len(seeds)], strict=True))


def survivors(arms: Sequence[str], rows: Sequence[Mapping[str, Any]], arm_of: Sequence[str]) -> list[str]:
    """Return the better half of the arms (rounded up), in their order.

    Arms are ranked by each column that has values. The best rank of an arm counts, and ties are broken by the sum of its ranks:
    an arm that is the best for one need survives, whatever its ranks for the others. An arm with a failed cell comes last.
    `arm_of` holds the arm of each row.

    Source: Jamieson & Talwalkar (2016), successive halving.
    """
    best: dict[str, float] = dict.fromkeys(arms, math.inf)
    total: dict[str, float] = dict.fromkeys(arms, 0.0)
    for column in columns_in("ranking"):
        sign = 1 if column.better == "lower" else -1
        mine = {arm: [row for row, name in zip(rows, arm_of, strict=True) if name == arm] for arm in arms}
        means = {arm: _mean_for_ranking(mine[arm], column.name, sign) for arm in arms}
        if len({value for value in means.values() if value < math.inf}) < 2:
            continue
        for arm in arms:
            rank = float(sum(other < means[arm] for other in means.values())) if means[arm] < math.inf else float(len(arms))
            best[arm], total[arm] = min(best[arm], rank), total[arm] + rank
    order = sorted(arms, key=lambda arm: (best[arm], total[arm], arms.index(arm)))
    kept = set(order[: math.ceil(len(arms) / 2)])
    return [arm for arm in arms if arm in kept]


def _mean_for_ranking(rows: Sequence[Mapping[str, Any]], column: str, sign: int) -> float:
    """Mean of a column with a sign by which less is better; infinite where a cell failed or has no value."""
    values = [row.get(column) for row in rows]
    known = [sign * value for value in values if value is not None and not math.isnan(value)]
    return fmean(known) if known and len(known) == len(values) else math.inf
