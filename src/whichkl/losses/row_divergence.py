"""RowDivergence: a divergence between rows of log-probabilities, with its gradient in closed form; and what all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import InputError, cannot

LogProbs = Float[Tensor, "... v"]
Rows = Float[Tensor, "..."]


@dataclass(frozen=True)
class RowDivergence(ABC):
    """A divergence D(p, q) between rows p (the teacher) and q (the student) of log-probabilities, in nats.

    `value` is made of differentiable operations; `gradient` has the closed form of the same gradient, for those who compute
    it row by row and keep no graph. A row whose divergence is infinite says ∞, and its gradient is 0: it moves nothing.

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
    def gradient(self, log_p: LogProbs, log_q: LogProbs) -> tuple[Rows, LogProbs]:
        """Return D of each row, and its gradient with respect to the student's logits (at temperature 1)."""

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return the summands of D, a token each, where `sums` is true."""
        raise InputError(cannot(f"split {self.name} into tokens", "it isn't a sum over tokens", "Use `forward_kl`"))


def kl(log_a: LogProbs, log_b: LogProbs) -> Rows:
    """KL(a‖b) of each row: exact 0·log 0, ∞ where a > 0 = b, and no NaN in the gradient either.

    Σ a log(a/b) + Σ b − Σ a: the two sums are 1 but for rounding, and take away what rounded normalisers would add.
    """
    a, ratio, lost = _parts(log_a, log_b)
    total = (a * ratio + (log_b.exp() - a)).sum(-1)
    return torch.where(lost.any(-1), math.inf, nonnegative(total))


def kl_terms(log_a: LogProbs, log_b: LogProbs) -> LogProbs:
    """The summands a log(a/b), ∞ where a > 0 = b."""
    a, ratio, lost = _parts(log_a, log_b)
    return torch.where(lost, math.inf, a * ratio)


def _parts(log_a: LogProbs, log_b: LogProbs) -> tuple[LogProbs, LogProbs, Bool[Tensor, "... v"]]:
    """Return a, log(a/b) with a finite stand-in where it doesn't count, and where a > 0 = b."""
    a = log_a.exp()
    empty, never = a == 0, log_b == -math.inf
    return a, (log_a - log_b.masked_fill(never, 0.0)).masked_fill(empty | never, 0.0), never & ~empty


def mix(log_a: LogProbs, log_b: LogProbs, weight: float) -> LogProbs:
    """Log of weight · a + (1 − weight) · b, with a gradient of 0 where both are 0."""
    left = log_a + math.log(weight) if weight > 0 else torch.full_like(log_a, -math.inf)
    right = log_b + math.log1p(-weight) if weight < 1 else torch.full_like(log_b, -math.inf)
    empty = (left == -math.inf) & (right == -math.inf)
    return torch.logaddexp(left.masked_fill(empty, 0.0), right.masked_fill(empty, 0.0)).masked_fill(empty, -math.inf)


def nonnegative(value: Rows) -> Rows:
    """Rounding below 0 becomes 0; the gradient passes as it is."""
    return torch.where(value < 0, value - value.detach(), value)


def settled(value: Rows) -> Rows:
    """The value, with a gradient of 0 where it is infinite."""
    return torch.where(value == math.inf, math.inf, value)


def through_logits(value: Rows, slope: LogProbs, q: LogProbs) -> LogProbs:
    """The gradient by the logits from that by log q: g − q Σ g; 0 in rows whose value is infinite."""
    return (slope - q * slope.sum(-1, keepdim=True)).masked_fill((value == math.inf)[..., None], 0.0)
