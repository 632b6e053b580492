"""Cell: one fit or distillation under a budget, and its scorecard on unseen draws; an error in it is recorded as its result."""

from __future__ import annotations

import json
import math
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from whichkl._checks import ResourceError, plain
from whichkl.cluster import Threads, Workers
from whichkl.diagnostics import Diagnostics, JudgedFit, Judgement
from whichkl.divergences import Estimate
from whichkl.fitting import fit_of, solve
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.threads import one_thread
from whichkl.solvers.work import Work
from whichkl.study.held_out import HeldOutDraws, split
from whichkl.study.measurements import Sides
from whichkl.study.measures import FIELDS, MEASURES
from whichkl.study.plan import AnyPlan, Cell, DistillationPlan, Plan
from whichkl.targets import Target
from whichkl.user_code import said_of

_MAX_CURVE_POINTS = 200
"""Largest number of losses of a training curve that are kept, at equal distances."""
_MAX_ERROR_LENGTH = 2_000
"""Most characters of an error that a row keeps."""


@dataclass(frozen=True)
class Outcome:
    """The result of a cell: a row of the table, and the files with its details."""

    row: dict[str, Any]
    files: dict[str, bytes]
    """`cell.json` and, if the cell didn't fail, the fit: `fit/fit.json` and its weights."""
    seconds: dict[str, float]


def outcome_of(
    cell: Cell,
    columns: dict[str, Any],
    details: dict[str, Any],
    fit: dict[str, bytes] | None = None,
    seconds: dict[str, float] | None = None,
) -> Outcome:
    """Return the outcome of a cell, from the columns of its row, further details, and the files of its fit."""
    head = {"cell": cell.key, "family": cell.names[0], "objective": cell.names[1], "seed": cell.seed}
    row = {**dict.fromkeys(FIELDS), **head, "budget": cell.config.get("budget"), **columns}
    text = json.dumps(plain({"config": cell.config, "row": row, "details": details}), indent=1, allow_nan=False)
    files = {f"fit/{name}": data for name, data in (fit or {}).items()} | {"cell.json": text.encode()}
    return Outcome(row, files, seconds or {})


def failed(cell: Cell, why: str, details: dict[str, str] | None = None) -> Outcome:
    """Return the outcome of a cell that failed, or whose worker died."""
    error = " ".join(why.split())[:_MAX_ERROR_LENGTH]
    return outcome_of(cell, {"status": "failed", "error": error}, details or {}, None, {"total": 0.0})


@dataclass
class Scorecard:
    """Columns of a row, and the details that don't fit into one number."""

    columns: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    values: dict[str, Estimate] = field(default_factory=dict)

    def measure(self, name: str, sides: Sides) -> None:
        """Take one measure; one that fails doesn't take the others with it."""
        try:
            found = MEASURES[name].function(sides)
        except ResourceError:
            raise
        except Exception as error:
            self.note_failure(name, error)
            return
        if found is None:
            return
        self.columns.update(found.columns)
        if found.details is not None:
            self.details[name] = found.details
        if found.estimate is not None:
            self.values[name] = found.estimate
        if found.note:
            self.notes.append(found.note)

    def call(self, name: str, metric: Callable[..., Any], model: Any, held: HeldOutDraws) -> None:
        """Call a metric of the user's own; what it raises becomes a note."""
        try:
            found = metric(model, held.x)
            values = {f"{name}.{key}": value for key, value in found.items()} if isinstance(found, dict) else {name: found}
            self.columns |= {key: float(value) for key, value in values.items()}
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the user's own code raises, SystemExit too
            self.note_failure(name, error)
            self.columns[name] = None

    def note_failure(self, name: str, error: BaseException) -> None:
        """Note why a measure wasn't taken."""
        refuse_if_ran_out(error, f"measure `{name}`")
        text = " ".join(str(error).split())[:200]
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        self.notes.append(f"{name} wasn't measured ({said_of(error) if isinstance(error, SystemExit) else reason})")


def score(model: Any, held: HeldOutDraws, plan: Plan) -> Scorecard:
    """Measure a model on draws that no fit has seen; what the access doesn't allow stays empty, and a note tells what failed."""
    card, sides = Scorecard(), Sides(model, held, plan.draws)
    for name in plan.measures:
        card.measure(name, sides)
    if held.groups is not None and held.whole.repeats is not None:
        card.notes.append(held.whole.repeats.note)
    for name, metric in plan.metrics.items():
        card.call(name, metric, model, held)
    return card


class Bench(ABC):
    """Works on the cells of a plan, one after another."""

    @abstractmethod
    def work(self, cell: Cell) -> Outcome:
        """Fit and score a cell; whatever it raises, except `ResourceError`, is the result of the cell."""

    def run(self, cell: Cell) -> Outcome:
        """Fit and score a cell, and record an error as its result."""
        begun = time.perf_counter()
        try:
            with one_thread():
                outcome = self.work(cell)
        except ResourceError:
            raise
        except Exception as error:  # a fit that fails is a result of the study
            refuse_if_ran_out(error, f"continue this study in the cell {cell.arm}, seed {cell.seed}")
            outcome = failed(cell, f"{type(error).__name__}: {error}", {"traceback": traceback.format_exc(limit=-6)})
        outcome.seconds["total"] = time.perf_counter() - begun
        return outcome


class FitBench(Bench):
    """Works on the cells of a plan, and keeps the held-out draws of a seed for its next cell."""

    def __init__(self, plan: Plan, workers: Workers | None = None) -> None:
        """Take the plan, and where passes over the rows run: in threads by default."""
        self.plan, self.workers = plan, workers or Threads()
        self._seed: int | None = None
        self._split: tuple[Target, HeldOutDraws] | None = None

    def work(self, cell: Cell) -> Outcome:
        """Solve under the budget, score on draws that no fit of this seed has seen, and keep the fit."""
        plan, begun = self.plan, time.perf_counter()
        if self._split is None or self._seed != cell.seed:
            self._seed, self._split = cell.seed, split(plan, cell.seed)
        target, held = self._split
        family, objective = plan.families[cell.family], plan.objectives[cell.objective]
        with target.evaluations.capped(plan.budget) as used:
            work = Work(self.workers, evaluations=target.evaluations)
            solved = solve(target, family, objective, None, cell.seed, work, judged=False)
            is_cut = target.evaluations.is_cut
        seconds = {"fit": time.perf_counter() - begun}
        solution, total = solved.solution, sum(used.values())
        converged = solution.best.converged
        is_over = plan.budget is not None and (is_cut or total > plan.budget or (total == plan.budget and not converged))
        card = score(solved.model, held, plan)
        seconds["score"] = time.perf_counter() - begun - seconds["fit"]
        if is_over:
            card.notes.insert(0, f"the budget of {plan.budget:,} evaluations ran out: {total:,} were used")
        columns = {
            "status": "converged" if converged and not is_over else "stopped",
            "solver": solved.solver.name,
            "iterations": solution.iterations,
            "optima": len(solution.optima),
            "out_of_budget": is_over,
            "evaluations": total,
            **used,
            **card.columns,
            "notes": "; ".join([*card.notes, *solution.notes, *solution.doubts]),
        }
        fit = _fit(solved, card, columns["status"], used)
        # every step-th loss: a curve needs no more, and `cell.json` stays small
        step = -(-len(solution.history) // _MAX_CURVE_POINTS)
        training = {"training": list(solution.history[::step])} if solution.history else {}
        details = {**card.details, "optima": fit.to_dict()["diagnostics"]["optima"], **training}
        return outcome_of(cell, columns, details, fit.files(), seconds)


class DistillationBench(Bench):
    """Works on the cells of a study of distillations."""

    def __init__(self, plan: DistillationPlan) -> None:
        """Take the plan."""
        self.plan = plan

    def work(self, cell: Cell) -> Outcome:
        """Distill, and score on examples that neither training nor stopping saw."""
        student, objective = cell.names
        target = self.plan.target
        result = target.distill(self.plan.students[student], objective, cell.seed)
        row = {name: None if isinstance(one, float) and math.isnan(one) else one for name, one in target.columns(result).items()}
        return outcome_of(cell, row, result.to_dict(), target.files(result))


def _fit(solved: JudgedFit, card: Scorecard, status: str, used: dict[str, int]) -> Any:
    """Return the fit; its value is that of its objective on unseen draws, as far as it was measured."""
    s, values = solved.solution, card.values
    value = values.get(solved.objective.name) or next(iter(values.values()), None)
    if value is None:
        value = Estimate(solved.objective.name, s.best.loss, method="loss of the solver", reliable=False, notes=("not measured",))
    d = Diagnostics(s.optima, s.iterations, s.residual, s.nodes, s.node_error, evaluations=dict(used), notes=s.notes)
    d = replace(d, ess=card.columns.get("ess_q"), khat=card.columns.get("khat"))
    return fit_of(solved, Judgement(value, d, status, frozenset()), solved.target)


def bench_of(plan: AnyPlan, threads: Threads | None = None) -> Bench:
    """Return what works on the cells of a plan."""
    return DistillationBench(plan) if isinstance(plan, DistillationPlan) else FitBench(plan, threads)
