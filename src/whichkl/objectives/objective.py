"""Objective: what a fit minimises, and the access that it requires. Advice and dispatch read nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from typing import ClassVar, Literal

from whichkl.access import Access, Requirement

UpTo = Literal["log_z", "entropy_p"] | None


class Objective(ABC):
    """What a fit minimises. Concrete objectives say what they require of p and of q, and up to what they are known."""

    name: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    character: ClassVar[str]
    requires: ClassVar[Requirement]
    """What the target must expose."""
    requires_of_model: ClassVar[Requirement]
    """What the model must expose; every family of this library does."""
    is_between: ClassVar[bool] = False
    """Whether it lies between the directions: advice names it only where both are possible."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def spec(self) -> str:
        """The objective as text that `objective_of` reads, its parameter after a colon, such as ``"jeffreys:0.3"``."""
        return ":".join([self.name, *(str(getattr(self, name)) for name in parameters(self))])

    @abstractmethod
    def reason(self, access: Access) -> str:
        """Say why this objective can be minimised with `access`."""

    @abstractmethod
    def up_to(self, access: Access) -> UpTo:
        """Name the constant that separates what can be computed from the divergence itself."""


def parameters(objective: Objective) -> tuple[str, ...]:
    """Return the names of an objective's parameters."""
    return tuple(one.name for one in fields(objective)) if is_dataclass(objective) else ()
