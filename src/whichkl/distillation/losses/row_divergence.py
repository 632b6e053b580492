"""RowDivergence: a divergence between rows of log-probabilities, with its gradient in closed form; and what all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot

LogProbs = Float[Tensor, "... v"]
Rows = Float[Tensor, "..."]


@dataclass(frozen=True)
class RowDivergence(ABC):
    """A divergence D(p, q) between rows p (the teacher) and q (the student) of log-probabilities, in nats.

    `value` is made of differentiable operations; `gradient` has the closed form of the same gradient, for those who compute
    it row by row and keep no graph. A row whose divergence is infinite says ∞, and its gradient is 0: it moves nothing.
    A caller who knows that no log-probability is −∞ says `all_possible`, and the passes that look for it are left out.

    Attributes:
        name: as in `DIVERGENCES`.
        formula: what is computed.
        symmetric: whether D(p, q) = D(q, p), for the default parameters.
        bounded: whether D is finite for every pair of rows, for the default parameters.
        coarsens: whether merging tokens into one bucket can only lower D (the data-processing inequality).
        sums: whether D is a sum over tokens, so that a sample of tokens estimates it without bias.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    symmetric: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    coarsens: ClassVar[bool] = True
    sums: ClassVar[bool] = True

    @abstractmethod
    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return D of each row, differentiable in both."""

    @abstractmethod
    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return D of each row, and its gradient with respect to the student's logits (at temperature 1)."""

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return the summands of D, a token each, where `sums` is true."""
        raise InputError(cannot(f"split {self.name} into tokens", "it isn't a sum over tokens", "Use `forward_kl`"))


def kl(log_a: LogProbs, log_b: LogProbs) -> Rows:
    """KL(a‖b) of each row: exact 0·log 0, ∞ where a > 0 = b, and no NaN in the gradient either."""
    return kl_and_terms(log_a, log_b, log_a.exp(), log_b.exp())[0]


def kl_and_terms(log_a: LogProbs, log_b: LogProbs, a: LogProbs, b: LogProbs, all_possible: bool = False) -> tuple[Rows, LogProbs]:
    """KL(a‖b) of each row and its summands a log(a/b), finite stand-ins in rows that are ∞.

    The value is Σ a log(a/b) + Σ (b − a): the last sum is 0 but for rounding, and takes out what rounded normalisers add.
    """
    if all_possible:
        terms = a * (log_a - log_b)
        return nonnegative(terms.sum(-1) + (b - a).sum(-1)), terms
    empty, never = a == 0, log_b == -math.inf
    terms = a * (log_a - log_b.masked_fill(never, 0.0)).masked_fill(empty | never, 0.0)
    total = nonnegative(terms.sum(-1) + (b - a).sum(-1))
    return torch.where((never & ~empty).any(-1), math.inf, total), terms


def kl_terms(log_a: LogProbs, log_b: LogProbs) -> LogProbs:
    """The summands a log(a/b), ∞ where a > 0 = b."""
    a = log_a.exp()
    return torch.where((log_b == -math.inf) & (a != 0), math.inf, kl_and_terms(log_a, log_b, a, log_b.exp())[1])


def mix(log_a: LogProbs, log_b: LogProbs, weight: float) -> LogProbs:
    """Log of weight · a + (1 − weight) · b, with a gradient of 0 where both are 0."""
    left = log_a + math.log(weight) if weight > 0 else torch.full_like(log_a, -math.inf)
    right = log_b + math.log1p(-weight) if weight < 1 else torch.full_like(log_b, -math.inf)
    empty = (left == -math.inf) & (right == -math.inf)
    return torch.logaddexp(left.masked_fill(empty, 0.0), right.masked_fill(empty, 0.0)).masked_fill(empty, -math.inf)


def mixture(
    log_a: LogProbs, log_b: LogProbs, a: LogProbs, b: LogProbs, weight: float, all_possible: bool
) -> tuple[LogProbs, LogProbs]:
    """Log of weight · a + (1 − weight) · b, and that itself: by one logarithm where nothing is impossible.

    A mass below the smallest normal float then counts as that, which moves no sum.
    """
    if not all_possible:
        log_m = mix(log_a, log_b, weight)
        return log_m, log_m.exp()
    m = torch.add(b * (1 - weight), a, alpha=weight)
    return m.clamp(min=torch.finfo(m.dtype).tiny).log(), m


def nonnegative(value: Rows) -> Rows:
    """Rounding below 0 becomes 0; the gradient passes as it is."""
    return torch.where(value < 0, value - value.detach(), value)


def settled(value: Rows) -> Rows:
    """The value, with a gradient of 0 where it is infinite."""
    return torch.where(value == math.inf, math.inf, value)


def through_logits(value: Rows, slope: LogProbs, q: LogProbs, all_possible: bool = False) -> LogProbs:
    """The gradient by the logits from that by log q: g − q Σ g; 0 in rows whose value is infinite."""
    slope = torch.addcmul(slope, q, slope.sum(-1, keepdim=True), value=-1)
    return slope if all_possible else unless_infinite(value, slope)


def unless_infinite(value: Rows, slope: LogProbs) -> LogProbs:
    """The gradient, or 0 in rows whose value is infinite."""
    return slope.masked_fill((value == math.inf)[..., None], 0.0)
