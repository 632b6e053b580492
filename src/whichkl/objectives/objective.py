"""Objective: what a fit minimises, as a function of log p − log q, and the access that it requires."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, as_number, cannot
from whichkl.access import Access, Requirement
from whichkl.divergences import kinds

UpTo = Literal["log_z", "entropy_p"] | None
Direction = Literal["forward", "reverse", "between"]
Ratios = Float[Tensor, "... n"]

DRAWS_AND_LOG_P = Requirement(
    *(draws | value for value in (Access.LOG_PROB, Access.SCORE) for draws in (Access.SAMPLES, Access.SAMPLER))
)
"""Draws of p, and log p up to a constant."""


class Objective(ABC):
    """A divergence as a function of ℓ = log p − log q at weighted points of p and at weighted points of q.

    Advice, dispatch, solvers and diagnostics read what an objective declares, and nothing else about it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    character: ClassVar[str]
    requires: ClassVar[Requirement]
    """What the target must expose."""
    requires_of_model: ClassVar[Requirement] = Requirement(Access.LOG_PROB | Access.SAMPLER)
    """What the model must expose; every family of this library does."""
    direction: ClassVar[Direction] = "between"
    """Forward KL, reverse KL, or a divergence between them, which is possible only where both are."""
    why: ClassVar[str]
    """Why it can be minimised where its requirements are met."""
    why_unnormalized: ClassVar[str] = ""
    """What follows `why` where p is unnormalised."""
    kind: ClassVar[type[kinds.Kind]]
    """The class of the divergence at quadrature nodes."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def spec(self) -> str:
        """The objective as text that `objective_of` reads, its parameter after a colon, such as ``"jeffreys:0.3"``."""
        return ":".join([self.name, *(str(getattr(self, name)) for name in parameters(self))])

    @property
    def is_between(self) -> bool:
        """Whether it is neither forward nor reverse KL."""
        return self.direction == "between"

    @property
    def quantity(self) -> str:
        """The name of a fit's value."""
        return self.name

    @property
    def reads_p(self) -> bool:
        """Whether it has an expectation under p."""
        return True

    @property
    def reads_q(self) -> bool:
        """Whether it has an expectation under q."""
        return True

    @property
    def curvature(self) -> float:
        """The number of KLs that the divergence is worth near q = p. Solvers divide the loss by it."""
        return 1.0

    @property
    def reads_log_z(self) -> bool:
        """Whether the minimum depends on log Z, which is estimated first if p isn't normalised."""
        return False

    @property
    def log_z_share(self) -> float:
        """The multiple of log Z that the loss of an unnormalised p adds to the divergence; 0 if log Z cancels."""
        return 0.0

    @property
    def kinds(self) -> tuple[tuple[float, kinds.Kind], ...]:
        """The divergence as a weighted sum of `Kind`s, for quadrature; by default `kind` with the objective's parameters."""
        return ((1.0, self.kind(*(getattr(self, name) for name in parameters(self)))),)

    @abstractmethod
    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return the divergence in nats, up to `log_z_share` log Z.

        Where p can't be evaluated, ℓ = −log q makes forward KL the cross-entropy.

        Args:
            at_p: log p − log q at points of p; may be empty if `reads_p` is false.
            w_p: weights of these points, Σ w = 1.
            at_q: log p − log q at points of q, −∞ where p is zero; may be empty if `reads_q` is false.
            w_q: weights of these points, Σ w = 1.
        """

    def reason(self, access: Access) -> str:
        """Return why this objective can be minimised with `access`."""
        return self.why if Access.NORMALIZED in access else self.why + self.why_unnormalized

    def up_to(self, access: Access) -> UpTo:
        """Return the constant between a fit's value and the divergence; between the directions there is none.

        There log Z cancels, or bridge sampling estimates it, or p must be normalised.
        """
        return None


def parameters(objective: Objective) -> tuple[str, ...]:
    """Return the names of an objective's parameters."""
    return tuple(one.name for one in fields(objective)) if is_dataclass(objective) else ()


def check_weight(objective: Objective, name: str, *, closed: bool = False) -> None:
    """Refuse a weight outside (0, 1), or, with `closed`, outside [0, 1]."""
    value = as_number(getattr(objective, name))
    object.__setattr__(objective, name, value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (0 <= value <= 1 if closed else 0 < value < 1):
        because = "it must lie between 0 and 1" if closed else "it must lie strictly between 0 and 1"
        raise InputError(cannot(f"use `{name}={value!r}`", because, "Use, say, 0.5"))
