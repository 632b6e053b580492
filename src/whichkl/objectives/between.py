"""Between: divergences that read log p − log q at points of p and of q, and lead from one direction of KL to the other."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.access import Access, Requirement
from whichkl.divergences import kinds
from whichkl.objectives.objective import Objective, UpTo

BOTH = Requirement(*(draws | value for value in (Access.LOG_PROB, Access.SCORE) for draws in (Access.SAMPLES, Access.SAMPLER)))
"""Draws of p, and log p up to a constant."""
Ratios = Float[Tensor, "... n"]


class Between(Objective):
    """A divergence as a function of ℓ = log p − log q at weighted points of p, and of q."""

    requires_of_model = Requirement(Access.LOG_PROB | Access.SAMPLER)
    is_between = True

    @property
    def quantity(self) -> str:
        """What the value of a fit is called."""
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
        """What a solver divides the loss by: near q = p the divergence is so many KLs, and ends of a path don't vanish."""
        return 1.0

    @property
    def reads_log_z(self) -> bool:
        """Whether its minimum depends on log Z, which is estimated first where p isn't normalised."""
        return False

    @property
    def log_z_share(self) -> float:
        """How many log Z the loss of an unnormalised p contains beside the divergence; 0 where log Z cancels."""
        return 0.0

    @property
    @abstractmethod
    def kinds(self) -> tuple[tuple[float, kinds.Kind], ...]:
        """The divergence as a weighted sum of `Kind`s, for quadrature."""

    @abstractmethod
    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return the divergence in nats, up to `log_z_share` log Z.

        Args:
            at_p: log p − log q at points of p; a side that isn't read may be empty.
            w_p: weights of these points, Σ w = 1.
            at_q: log p − log q at points of q, −∞ where p is zero.
            w_q: weights of these points, Σ w = 1.
        """

    def up_to(self, access: Access) -> UpTo:
        """Nothing: log Z cancels, or is estimated by bridge sampling, or p must be normalised."""
        return None


def check_weight(name: str, value: float, *, closed: bool = False) -> None:
    """Refuse what isn't a number in (0, 1), or, closed, in [0, 1].

    Raises:
        InputError: as said.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (0 <= value <= 1 if closed else 0 < value < 1):
        because = "it must lie between 0 and 1" if closed else "it must lie strictly between 0 and 1"
        raise InputError(cannot(f"use `{name}={value!r}`", because, "Use, say, 0.5"))
