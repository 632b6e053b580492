"""Teacher target: what a comparison needs of anything that students learn from, classifiers and language models alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from whichkl.distillation.networks import copied, digest
from whichkl.solvers.descent import state_of

Student = nn.Module | Callable[[], nn.Module]


class TeacherTarget(ABC):
    """What students are to learn from; `whichkl.compare` takes it with ``families={name: student}``."""

    source: ClassVar[str]
    """The name of the target in a study's tables, by which its needs are found."""
    budget: float | None = None
    """What a student may spend, in the unit of its cost; None for no limit."""

    @abstractmethod
    def distill(self, student: Student, objective: Any, seed: int) -> Any:
        """Train one student. The result has `to_dict` and `files`."""

    @abstractmethod
    def columns(self, result: Any) -> dict[str, Any]:
        """Return the numbers of a result that a study compares, by column."""

    def files(self, result: Any) -> dict[str, bytes]:
        """Return the files of a result that a study keeps, by name."""
        found: dict[str, bytes] = result.files()
        return found

    @abstractmethod
    def name_of(self, objective: Any) -> str:
        """Return the text of an objective.

        Raises:
            InputError: there is no such objective, or this teacher doesn't allow it.
        """

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from others, as JSON can hold it."""


def student_identity(name: str, student: Student) -> dict[str, Any]:
    """What distinguishes a student from others; a function is represented by what it makes under seed 0."""
    module = copied(student, "student", 0)
    return {"student": name, "module": repr(module), "weights": digest(state_of(module))[:16]}
