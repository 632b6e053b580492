"""Distilling: students by objectives by seeds as a study, a cell a distillation, scored on examples that it hasn't seen."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from whichkl._checks import InputError, ResourceError, cannot, plain
from whichkl.distillation.result import Distillation
from whichkl.distillation.target import DistillationTarget, Student, objective_spec, student_identity
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.threads import one_thread
from whichkl.study.cell import Outcome
from whichkl.study.measures import HEAD
from whichkl.study.needs import DISTILLATION_NEEDS
from whichkl.study.plan import FORMAT, Cell, seeds_of
from whichkl.targets.fingerprint import code_version


@dataclass(frozen=True)
class DistillationPlan:
    """A study of distillations, resolved."""

    target: DistillationTarget
    students: dict[str, Student]
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything on which a number depends, as JSON holds it."""
        return {
            "format": FORMAT,
            "code": code_version(),
            "target": {"source": "distillation", **self.target.identity},
            "families": [student_identity(name, one) for name, one in self.students.items()],
            "objectives": list(self.objectives),
            "seeds": list(self.seeds),
            "budget": None,
            "metrics": [need.columns[0] for need in DISTILLATION_NEEDS],
        }

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, seed by seed."""
        whole, found = self.config, []
        for seed in self.seeds:
            for i, name in enumerate(self.students):
                for j, objective in enumerate(self.objectives):
                    config = {k: whole[k] for k in ("format", "code", "target")}
                    config |= {"family": whole["families"][i], "objective": objective, "seed": seed}
                    found.append(Cell(i, j, seed, f"{name} · {objective}", config))
        return tuple(found)


def distillation_plan_of(
    target: DistillationTarget, students: Any, objectives: Any, seeds: int | Sequence[int]
) -> DistillationPlan:
    """Resolve names, and refuse what can't be compared.

    Raises:
        InputError: an argument is bad.
    """
    named: Mapping[str, Any] = students if isinstance(students, Mapping) else {"student": students}
    for name, one in named.items():
        if not (isinstance(one, nn.Module) or callable(one)) or not isinstance(name, str):
            because = f"`{name}` is a `{type(one).__name__}`"
            raise InputError(
                cannot("compare these students", because, "Give families={name: module, or a function that makes one}")
            )
    wanted = ["forward_kl", "reverse_kl"] if objectives is None else objectives
    specs = [objective_spec(one) for one in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
    if not named or not specs or len(set(specs)) < len(specs):
        raise InputError(cannot("compare", "a list is empty, or an objective stands twice", "Name each once"))
    return DistillationPlan(target, dict(named), tuple(specs), seeds_of(seeds))


class DistillationBench:
    """Works on the cells of such a plan."""

    def __init__(self, plan: DistillationPlan) -> None:
        """Take the plan."""
        self.plan = plan

    def run(self, cell: Cell) -> Outcome:
        """Distill and score; what goes wrong is the cell's result.

        Raises:
            ResourceError: memory or a disk fails, which says nothing of the cell.
        """
        begun = time.perf_counter()
        row = _row(self.plan, cell)
        files: dict[str, bytes] = {}
        details: dict[str, Any] = {}
        try:
            with one_thread():
                result = self.plan.target.distill(self.plan.students[row["family"]], row["objective"], cell.seed)
            row |= _columns(result)
            details, files = result.to_dict(), {f"fit/{name}": data for name, data in result.files().items()}
        except ResourceError:
            raise
        except Exception as error:  # a distillation that fails is a result of the study
            refuse_if_ran_out(error, f"go on with this study in the cell {cell.arm}, seed {cell.seed}")
            row |= {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:2_000]}
            details = {"traceback": traceback.format_exc(limit=-6)}
        body = {"config": cell.config, "row": row, "details": details}
        files["cell.json"] = json.dumps(plain(body), indent=1, allow_nan=False).encode()
        return Outcome(row, files, {"total": time.perf_counter() - begun})


def _columns(result: Distillation) -> dict[str, Any]:
    s = result.scores
    row: dict[str, Any] = {
        "status": "stopped" if any("given up" in note for note in result.notes) else "converged",
        "solver": "distill",
        "iterations": result.epochs,
        "evaluations": result.examples,
        "rows": result.examples,
        "notes": "; ".join(result.notes),
        "jeffreys": s.forward_kl.value + s.reverse_kl.value,
        "agreement": s.agreement.value,
        "agreement_stderr": s.agreement.stderr,
    }
    for name, one in (("forward_kl", s.forward_kl), ("reverse_kl", s.reverse_kl)):
        row |= {name: one.value, f"{name}_stderr": one.stderr, f"{name}_reliable": one.reliable}
    for name in ("accuracy", "nll", "ece"):
        one = getattr(s, name)
        if one is not None:
            row |= {name: one.student.value, f"{name}_stderr": one.student.stderr, f"{name}_teacher": one.teacher.value}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def _row(plan: DistillationPlan, cell: Cell) -> dict[str, Any]:
    name = list(plan.students)[cell.family]
    head = {"cell": cell.key, "family": name, "objective": plan.objectives[cell.objective], "seed": cell.seed}
    return {**dict.fromkeys(HEAD), **head, "budget": None}


def bench_of(plan: Any, other: Callable[[Any], Any]) -> Any:
    """Return what works on a plan's cells."""
    return DistillationBench(plan) if isinstance(plan, DistillationPlan) else other(plan)


def failed_of(plan: Any, cell: Cell, why: str, other: Callable[[Any, Cell, str], Outcome]) -> Outcome:
    """Return the outcome of a cell that took its worker with it."""
    if not isinstance(plan, DistillationPlan):
        return other(plan, cell, why)
    row = _row(plan, cell) | {"status": "failed", "error": why}
    body = {"config": cell.config, "row": row, "details": {}}
    return Outcome(row, {"cell.json": json.dumps(plain(body), indent=1, allow_nan=False).encode()}, {"total": 0.0})
