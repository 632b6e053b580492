"""Jeffreys: both directions at once, weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from whichkl.access import Access, Requirement
from whichkl.divergences import kinds
from whichkl.objectives.objective import DRAWS_AND_LOG_P, Objective, Ratios, check_weight


@dataclass(frozen=True)
class Jeffreys(Objective):
    """w KL(p‖q) + (1 − w) KL(q‖p): a path from reverse KL (w = 0) to forward KL (w = 1), with both as its ends.

    Args:
        weight_on_forward: w in [0, 1]. Half of the sum that Jeffreys wrote down is w = ½.

    Raises:
        InputError: w is something else.

    Source: Jeffreys (1946).

    >>> Jeffreys(0.3).spec
    'jeffreys:0.3'
    """

    weight_on_forward: float = 0.5

    name: ClassVar[str] = "jeffreys"
    title: ClassVar[str] = "Jeffreys"
    formula: ClassVar[str] = "w KL(p‖q) + (1 − w) KL(q‖p)"
    character: ClassVar[str] = "covers mass as far as w is on forward KL; w leads from one direction to the other"
    requires: ClassVar[Requirement] = DRAWS_AND_LOG_P

    def __post_init__(self) -> None:
        """Check the weight."""
        check_weight("weight_on_forward", self.weight_on_forward, closed=True)

    def reason(self, access: Access) -> str:
        """Return that both expectations are available."""
        tail = "" if Access.NORMALIZED in access else " (log Z doesn't depend on q, and cancels at w = ½)"
        return f"you have draws of p for the forward part, and log p at draws of q for the reverse part{tail}"

    @property
    def reads_p(self) -> bool:
        """True if w > 0."""
        return self.weight_on_forward > 0

    @property
    def reads_q(self) -> bool:
        """True if w < 1."""
        return self.weight_on_forward < 1

    @property
    def log_z_share(self) -> float:
        """2w − 1: forward KL contains + log Z, reverse KL − log Z."""
        return 2 * self.weight_on_forward - 1

    @property
    def kinds(self) -> tuple[tuple[float, kinds.Kind], ...]:
        """Both KLs, weighted."""
        w = self.weight_on_forward
        parts = ((w, kinds.ForwardKLDivergence()), (1 - w, kinds.ReverseKLDivergence()))
        return tuple(one for one in parts if one[0] > 0)

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return w Σ w_p ℓ − (1 − w) Σ w_q ℓ.

        >>> import torch
        >>> one = torch.ones(1)
        >>> Jeffreys(0.25).loss(2 * one, one, -one, one)
        tensor(1.2500)
        """
        w = self.weight_on_forward
        forward = w * (at_p @ w_p) if self.reads_p else at_q.new_zeros(())
        return forward - (1 - w) * (at_q @ w_q) if self.reads_q else forward
