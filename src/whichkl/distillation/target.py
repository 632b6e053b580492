"""DistillationTarget: a teacher and its examples as a target of `compare`, where students take the place of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from whichkl._checks import InputError, cannot
from whichkl.distillation.classifier import distill
from whichkl.distillation.examples import InMemory, examples_of
from whichkl.distillation.losses import RowDivergence
from whichkl.distillation.networks import Teacher, copied, digest
from whichkl.distillation.objective import row_divergence_of, spec_of
from whichkl.distillation.result import Distillation
from whichkl.solvers.descent import state_of

Student = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True, eq=False)
class DistillationTarget:
    """What students are to learn from; `whichkl.compare` takes it with ``families={name: student}``.

    The seed of a cell fixes the split, the order of the examples and, where a student is a function that makes one, its
    starting weights; all cells of a seed are scored on the same examples.

    Args:
        teacher: as in `distill`.
        data: as in `distill`.
        settings: further arguments of `distill`, such as `epochs`, `held_out` or `temperature`.

    >>> import torch
    >>> target = DistillationTarget(torch.nn.Linear(2, 2), torch.zeros(40, 2), {"epochs": 3})
    >>> target.distill(lambda: torch.nn.Linear(2, 2), "forward_kl", seed=1).epochs
    3
    """

    teacher: Student
    data: Any
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse settings that `compare` sets."""
        if wrong := {"teacher", "student", "data", "objective", "seed", "journal", "tell"} & set(self.settings):
            because = f"`compare` sets {', '.join(sorted(wrong))} itself"
            raise InputError(cannot("use these settings", because, "Leave them out"))

    def distill(self, student: Student, objective: str | RowDivergence, seed: int) -> Distillation:
        """Train one student."""
        return distill(teacher=self.teacher, student=student, objective=objective, seed=seed, **self._seen)

    @cached_property
    def _seen(self) -> dict[str, Any]:
        """The arguments of `distill`, the teacher's logits of fixed examples in them, so that no cell computes them again."""
        found: dict[str, Any] = {**self.settings, "data": self.data}
        teacher, batch = Teacher(self.teacher), self.settings.get("batch")
        for name, value in found.items():
            if not _is_plain(value):
                found[name] = examples = examples_of(value, batch, name)
                if isinstance(examples, InMemory):
                    examples.seen_by(teacher)
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from others, as JSON can hold it."""
        teacher = Teacher(self.teacher).module
        fields: dict[str, Any] = {"teacher": repr(teacher), "weights": digest(state_of(teacher))[:16]}
        fields["data"] = examples_of(self.data, None).identity
        for name, value in self.settings.items():
            fields[name] = value if _is_plain(value) else examples_of(value, None, name).identity
        return fields


def student_identity(name: str, student: Student) -> dict[str, Any]:
    """What distinguishes a student from others; a function is represented by what it makes under seed 0."""
    module = copied(student, "student", 0)
    return {"student": name, "module": repr(module), "weights": digest(state_of(module))[:16]}


def objective_spec(objective: Any) -> str:
    """Return a row divergence as text."""
    return spec_of(row_divergence_of(objective))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
