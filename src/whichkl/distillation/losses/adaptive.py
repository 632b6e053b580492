"""Adaptive losses: weights on the two KLs from where the student errs (AKL), and a teacher that starts at the student (TAID)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.kinds import RowForwardKL, RowReverseKL
from whichkl.distillation.losses.row_divergence import (
    LogProbs,
    RowDivergence,
    Rows,
    kl,
    kl_and_terms,
    settled,
    through_logits,
    unless_infinite,
)

_FEW = 1024  # tokens: the head of a language model's row is seldom larger


@dataclass(frozen=True)
class RowAdaptiveKL(RowDivergence):
    """w KL(p‖q) + (1 − w) KL(q‖p), where w is the share of |p − q| that lies in the teacher's head; w is a constant.

    The head is the smallest set of the teacher's likeliest tokens that holds `head_mass`. Costs a sort of each row, or less.
    Source: Wu et al., Rethinking KL divergence in knowledge distillation (2024), AKL with μ = `head_mass`.
    """

    name: ClassVar[str] = "adaptive_kl"
    formula: ClassVar[str] = "w KL(p‖q) + (1 − w) KL(q‖p), w = head's share of |p − q|"
    coarsens: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    head_mass: float = 0.5

    def __post_init__(self) -> None:
        """Check the mass of the head."""
        if not 0 < self.head_mass < 1:
            do = f"use head_mass={self.head_mass}"
            raise InputError(cannot(do, "it lies strictly between 0 and 1", "Pass for example head_mass=0.5"))

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the weighted sum; its gradient takes the weights as constants."""
        weight = self.weights(log_p, log_q)
        forward, reverse = RowForwardKL().value(log_p, log_q), RowReverseKL().value(log_p, log_q)
        return settled(_side(weight, forward) + _side(1 - weight, reverse))

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and the weighted sum of the two gradients."""
        weight, p, q = self.weights(log_p, log_q, look=all_possible), log_p.exp(), log_q.exp()
        forward, _ = kl_and_terms(log_p, log_q, p, q, all_possible)
        reverse, terms = kl_and_terms(log_q, log_p, q, p, all_possible)
        value = _side(weight, forward) + _side(1 - weight, reverse)
        slope = weight[..., None] * (q - p) + (1 - weight[..., None]) * through_logits(value, terms, q, all_possible)
        return value, slope if all_possible else unless_infinite(value, slope)

    def weights(self, log_p: LogProbs, log_q: LogProbs, *, look: bool = False) -> Rows:
        """Return w of each row, without a gradient; ½ where p = q. With `look`, rows aren't sorted if few tokens are the head."""
        p, q = log_p.detach().exp(), log_q.detach().exp()
        ordered, order = p.topk(min(_FEW, p.shape[-1]), -1) if look else p.sort(-1, descending=True)
        if look and not bool((ordered.sum(-1) >= self.head_mass).all()):
            ordered, order = p.sort(-1, descending=True)
        gap = (p - q).abs()
        head = torch.where(ordered.cumsum(-1) - ordered < self.head_mass, gap.gather(-1, order), 0.0).sum(-1)
        total = gap.sum(-1)
        return torch.where(total == 0, 0.5, head / total.masked_fill(total == 0, 1.0))


@dataclass(frozen=True)
class RowInterpolatedKL(RowDivergence):
    """KL(m‖q), where m ∝ p^w q^(1−w), w = `weight_on_teacher` in (0, 1], q a constant in m; gradient q − m.

    Rows without a common token have no such m, and are NaN unless w = 1.
    Source: Shing et al., TAID (2025), who raise w from small to 1 in the course of training.
    """

    name: ClassVar[str] = "interpolated_kl"
    formula: ClassVar[str] = "KL(m‖q), m ∝ p^w q^(1−w), q constant in m"
    coarsens: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    weight_on_teacher: float = 0.5

    def __post_init__(self) -> None:
        """Check the weight."""
        if not 0 < self.weight_on_teacher <= 1:
            do = f"use weight_on_teacher={self.weight_on_teacher}"
            raise InputError(
                cannot(do, "it is above 0 and at most 1", "Start at for example weight_on_teacher=0.4 and raise it to 1")
            )

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the KL of the interpolated teacher."""
        return kl(self.teacher(log_p, log_q), log_q)

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and q − m."""
        return RowForwardKL().gradient(self.teacher(log_p, log_q), log_q, all_possible=all_possible)

    def teacher(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return log m, normalised."""
        if self.weight_on_teacher == 1:
            return log_p
        return torch.log_softmax(self.weight_on_teacher * log_p + (1 - self.weight_on_teacher) * log_q.detach(), -1)


def _side(weight: Rows, value: Rows) -> Tensor:
    """Weight · value, where a weight of 0 leaves out even an infinite value."""
    return torch.where(weight == 0, 0.0, weight * value)
