"""Adaptive KLs between rows: weights on the two KLs from where the student errs (AKL), and a teacher that moves (TAID)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whichkl.divergences import row_arithmetic as row
from whichkl.divergences.divergence import LogProbs, RowDivergence, Rows, check_parameter
from whichkl.divergences.kl_divergences import ForwardKLDivergence

_TOKENS_TO_SORT = 1024
"""Likeliest tokens that are sorted first: the head of a language model's row is seldom larger."""


@dataclass(frozen=True)
class AdaptiveKL(RowDivergence):
    """w KL(p‖q) + (1 − w) KL(q‖p), where w is the share of |p − q| that lies in the teacher's head.

    The head is the smallest set of the teacher's likeliest tokens that holds `head_mass`. The weights are constants in the
    gradient. It costs a sort of each row, or less. Source: Wu et al., Rethinking Kullback-Leibler divergence in knowledge
    distillation (2024), AKL with μ = `head_mass`.
    """

    name: ClassVar[str] = "adaptive_kl"
    formula: ClassVar[str] = "w KL(p‖q) + (1 − w) KL(q‖p), w = head's share of |p − q|"
    coarsens: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    head_mass: float = 0.5

    def __post_init__(self) -> None:
        """Check the mass of the head."""
        allowed = lambda mass: 0 < mass < 1  # noqa: E731
        check_parameter(allowed, "head_mass", self.head_mass, "lie strictly between 0 and 1", "Pass for example head_mass=0.5")

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the weighted sum; its gradient takes the weights as constants."""
        weight = self.weights(log_p, log_q)
        forward, reverse = row.kl(log_p, log_q), row.kl(log_q, log_p)
        return row.without_gradient_where_infinite(_weighted(weight, forward) + _weighted(1 - weight, reverse))

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and the weighted sum of the two gradients."""
        weight, p, q = self.weights(log_p, log_q, look=all_possible), log_p.exp(), log_q.exp()
        forward, _ = row.kl_and_terms(log_p, log_q, p, q, all_possible)
        reverse, terms = row.kl_and_terms(log_q, log_p, q, p, all_possible)
        value = _weighted(weight, forward) + _weighted(1 - weight, reverse)
        slope = weight[..., None] * (q - p) + (1 - weight[..., None]) * row.gradient_by_logits(value, terms, q, all_possible)
        return value, slope if all_possible else row.zero_where_infinite(value, slope)

    def weights(self, log_p: LogProbs, log_q: LogProbs, *, look: bool = False) -> Rows:
        """Return w per row, without a gradient; ½ where p = q.

        With `look`, only the likeliest tokens are sorted where they hold the head.
        """
        p, q = log_p.detach().exp(), log_q.detach().exp()
        ordered, order = p.topk(min(_TOKENS_TO_SORT, p.shape[-1]), -1) if look else p.sort(-1, descending=True)
        if look and not bool((ordered.sum(-1) >= self.head_mass).all()):
            ordered, order = p.sort(-1, descending=True)
        gap = (p - q).abs()
        head = torch.where(ordered.cumsum(-1) - ordered < self.head_mass, gap.gather(-1, order), 0.0).sum(-1)
        total = gap.sum(-1)
        return torch.where(total == 0, 0.5, head / total.masked_fill(total == 0, 1.0))


@dataclass(frozen=True)
class InterpolatedKL(RowDivergence):
    """KL(m‖q), where m ∝ p^w q^(1−w), w = `weight_on_teacher` in (0, 1], and q is a constant in m; gradient q − m.

    The teacher m starts near the student: raise w to 1 in the course of training. Rows without a common token have no such m;
    they are NaN except at w = 1. Source: Shing et al., TAID (2025).
    """

    name: ClassVar[str] = "interpolated_kl"
    formula: ClassVar[str] = "KL(m‖q), m ∝ p^w q^(1−w), q constant in m"
    coarsens: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    weight_on_teacher: float = 0.5

    def __post_init__(self) -> None:
        """Check the weight."""
        allowed = lambda w: 0 < w <= 1  # noqa: E731
        instead = "Start at for example weight_on_teacher=0.4 and raise it to 1"
        check_parameter(allowed, "weight_on_teacher", self.weight_on_teacher, "lie above 0 and at most at 1", instead)

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the KL of the interpolated teacher."""
        return row.kl(self.teacher(log_p, log_q), log_q)

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and q − m."""
        return ForwardKLDivergence().gradient(self.teacher(log_p, log_q), log_q, all_possible=all_possible)

    def teacher(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return log m, normalised."""
        if self.weight_on_teacher == 1:
            return log_p
        return torch.log_softmax(self.weight_on_teacher * log_p + (1 - self.weight_on_teacher) * log_q.detach(), -1)


def _weighted(weight: Rows, value: Rows) -> Tensor:
    """Weight · value, where a weight of 0 leaves out even an infinite value."""
    return torch.where(weight == 0, 0.0, weight * value)
