"""Cell: one fit under a budget, and its scorecard; what goes wrong is written down as its result."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

from whichkl._checks import ResourceError, plain
from whichkl.cluster import Threads, Workers
from whichkl.diagnostics import Diagnostics, Judgement
from whichkl.divergences import Estimate
from whichkl.fitting import Solved, solve
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.threads import one_thread
from whichkl.solvers.work import Work
from whichkl.study.held_out import Held, split
from whichkl.study.measures import FIELDS
from whichkl.study.plan import Cell, Plan, family_text
from whichkl.study.scorecard import Scorecard, score
from whichkl.targets import Target

_CURVE = 200
"""Numbers of a training curve that are kept, evenly, at most."""


@dataclass(frozen=True)
class Outcome:
    """What a cell came to: a row of the table, and the files that hold everything behind it."""

    row: dict[str, Any]
    files: dict[str, bytes]
    """`cell.json`, and of a cell that didn't fail the fit: `fit/fit.json` and its weights."""
    seconds: dict[str, float]


class Bench:
    """Works on the cells of a plan, and keeps the held-out draws of a seed for its next cell."""

    def __init__(self, plan: Plan, workers: Workers | None = None) -> None:
        """Take the plan, and where passes over the rows run: in threads unless said."""
        self.plan, self.workers = plan, workers or Threads()
        self._seed: int | None = None
        self._split: tuple[Target, Held] | None = None

    def run(self, cell: Cell) -> Outcome:
        """Fit and score a cell.

        Raises:
            ResourceError: memory, a cluster or a disk fails, which says nothing of the cell.
        """
        begun = time.perf_counter()
        seconds: dict[str, float] = {}
        row = _row(self.plan, cell)
        try:
            with one_thread():
                details, files = self._measured(cell, row, seconds)
        except ResourceError:
            raise
        except Exception as error:  # a fit that fails is a result of the study
            refuse_if_ran_out(error, f"go on with this study in the cell {cell.arm}, seed {cell.seed}")
            row |= {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:2_000]}
            details, files = {"traceback": traceback.format_exc(limit=-6)}, {}
        seconds["total"] = time.perf_counter() - begun
        body = {"config": cell.config, "row": row, "details": details}
        files["cell.json"] = json.dumps(plain(body), indent=1, allow_nan=False).encode()
        return Outcome(row, files, seconds)

    def _measured(self, cell: Cell, row: dict[str, Any], seconds: dict[str, float]) -> tuple[dict[str, Any], dict[str, bytes]]:
        plan, begun = self.plan, time.perf_counter()
        target, held = self._of_seed(cell.seed)
        family, objective = plan.families[cell.family], plan.objectives[cell.objective]
        with target.evaluations.capped(plan.budget) as used:
            work = Work(self.workers, evaluations=target.evaluations)
            solved = solve(target, family, objective, None, cell.seed, work, judged=False)
            is_cut = target.evaluations.is_cut
        seconds["fit"] = time.perf_counter() - begun
        solution, total = solved.solution, sum(used.values())
        converged = solution.best.converged
        is_over = plan.budget is not None and (is_cut or total > plan.budget or (total == plan.budget and not converged))
        card = score(solved.model, held, plan.measures, plan.metrics, plan.draws)
        seconds["score"] = time.perf_counter() - begun - seconds["fit"]
        if is_over:
            card.notes.insert(0, f"the budget of {plan.budget:,} evaluations ran out: {total:,} were used")
        row |= {
            "status": "converged" if converged and not is_over else "stopped",
            "solver": solved.solver.name,
            "iterations": solution.iterations,
            "optima": len(solution.optima),
            "out_of_budget": is_over,
            "evaluations": total,
            **used,
            **card.columns,
            "notes": "; ".join([*card.notes, *solution.notes]),
        }
        fit = _fit(solved, target, card, row["status"], used, cell.seed)
        files = {f"fit/{name}": data for name, data in fit.files().items()}
        step = -(-len(solution.history) // _CURVE)
        training = {"training": list(solution.history[::step])} if solution.history else {}
        return {**card.details, "optima": fit.to_dict()["diagnostics"]["optima"], **training}, files

    def _of_seed(self, seed: int) -> tuple[Target, Held]:
        if self._split is None or self._seed != seed:
            self._seed, self._split = seed, split(self.plan, seed)
        return self._split


def failed(plan: Plan, cell: Cell, why: str) -> Outcome:
    """Return the outcome of a cell that took its worker with it."""
    row = _row(plan, cell) | {"status": "failed", "error": why}
    body = {"config": cell.config, "row": row, "details": {}}
    return Outcome(row, {"cell.json": json.dumps(plain(body), indent=1, allow_nan=False).encode()}, {"total": 0.0})


def _row(plan: Plan, cell: Cell) -> dict[str, Any]:
    head = {
        "cell": cell.key,
        "family": family_text(plan.families[cell.family]),
        "objective": plan.objectives[cell.objective].spec,
        "seed": cell.seed,
        "budget": plan.budget,
        "error": None,
    }
    return {**dict.fromkeys(FIELDS), **head}


def _fit(solved: Solved, target: Target, card: Scorecard, status: str, used: dict[str, int], seed: int) -> Any:
    """The fit, its value that of what it minimised on unseen draws, as far as it was measured."""
    s, values = solved.solution, card.values
    value = values.get(solved.objective.name) or next(iter(values.values()), None)
    if value is None:
        value = Estimate(solved.objective.name, s.best.loss, method="loss of the solver", reliable=False, notes=("not measured",))
    d = Diagnostics(s.optima, s.iterations, s.residual, s.nodes, s.node_error, evaluations=dict(used), notes=s.notes)
    d = replace(d, ess=card.columns.get("ess_q"), khat=card.columns.get("khat"))
    return solved.judged(target, Judgement(value, d, status, frozenset()), seed)
