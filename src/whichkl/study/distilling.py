"""Distilling: students by objectives by seeds as a study, where a cell is a distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from whichkl._checks import InputError, cannot
from whichkl.distillation.classifier import DistillationTarget, Student, student_identity
from whichkl.distillation.result import Distillation
from whichkl.distillation.training import row_divergence_of, spec_of
from whichkl.study.cell import Bench, Outcome, outcome_of
from whichkl.study.measures import DISTILLATION_NEEDS
from whichkl.study.plan import Cell, cells_of, distinct, listed, seeds_of, study_config


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
        target = {"source": "distillation", **self.target.identity}
        students = [student_identity(name, one) for name, one in self.students.items()]
        measures = [need.columns[0] for need in DISTILLATION_NEEDS]
        return study_config(target, students, self.objectives, self.seeds) | {"budget": None, "metrics": measures}

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, seed by seed."""
        return cells_of(self.config, list(self.students))


def distillation_plan_of(
    target: DistillationTarget, students: Any, objectives: Any, seeds: int | Sequence[int]
) -> DistillationPlan:
    """Resolve names, and refuse what can't be compared."""
    named: Mapping[str, Any] = students if isinstance(students, Mapping) else {"student": students}
    for name, one in named.items():
        if not (isinstance(one, nn.Module) or callable(one)) or not isinstance(name, str):
            instead = "Give families={name: module, or a function that makes one}"
            raise InputError(cannot("compare these students", f"`{name}` is a `{type(one).__name__}`", instead))
    wanted = ["forward_kl", "reverse_kl"] if objectives is None else listed(objectives)
    specs = distinct([spec_of(row_divergence_of(one)) for one in wanted], str)
    distinct(list(named), str)
    return DistillationPlan(target, dict(named), specs, seeds_of(seeds))


class DistillationBench(Bench):
    """Works on the cells of a study of distillations."""

    def __init__(self, plan: DistillationPlan) -> None:
        """Take the plan."""
        self.plan = plan

    def work(self, cell: Cell) -> Outcome:
        """Distill, and score on examples that neither training nor stopping saw."""
        student, objective = cell.names
        result = self.plan.target.distill(self.plan.students[student], objective, cell.seed)
        return outcome_of(cell, _columns(result), result.to_dict(), result.files())


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
