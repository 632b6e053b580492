"""What a divergence is: its name and properties, its form as an integral over two log densities, and its form over rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, as_number, cannot

LogDensities = Float[Tensor, "..."]
LogProbs = Float[Tensor, "... v"]
Rows = Float[Tensor, "..."]


@dataclass(frozen=True)
class Divergence(ABC):
    """A divergence of p from q. Its parameter, where it has one, is the dataclass field.

    Attributes:
        name: as in `DIVERGENCES`.
        formula: what is computed.
        unit: "nats", or "none" for a divergence without a unit.
        symmetric: whether D(p, q) = D(q, p) with the default parameter.
        bounded: whether D is finite for every p and q with the default parameter.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    unit: ClassVar[Literal["nats", "none"]] = "nats"
    symmetric: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    def limit(self) -> Divergence:
        """Return the simpler divergence that this one equals at an end of its parameter; itself elsewhere."""
        return self


class IntegralDivergence(Divergence):
    """A divergence D = g(∫ h(log p, log q) dμ), with exact 0 · log 0 = 0 and h = ∞ where the divergence is infinite.

    `log_tail` is log|h| far out, in a form that neither overflows nor vanishes early: it decides whether the integral
    converges there.
    """

    @abstractmethod
    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return h; ∞ on points that make the divergence infinite."""

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return log|h|, −∞ where it vanishes."""
        return self.integrand(log_p, log_q).abs().log()

    def of_integral(self, integral: float) -> float:
        """Return g of the integral; the identity by default."""
        return integral

    def error_of_integral(self, error: float, integral: float) -> float:
        """Return |g′| · error: the error of D from the error of the integral."""
        return error

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return the mass density of the points that make the divergence infinite."""
        return torch.zeros_like(log_p)


class RowDivergence(Divergence):
    """A divergence D(p, q) between rows p (the teacher) and q (the student) of log-probabilities, in nats.

    `value` is made of differentiable operations. `gradient` has the closed form of the same gradient, for callers who compute
    it row by row and keep no graph. A row whose divergence is infinite has value ∞ and gradient 0: it moves nothing.
    `all_possible=True` states that no log-probability is −∞; the passes that look for −∞ are then left out.

    Attributes:
        coarsens: whether merging tokens into one bucket can only lower D (the data-processing inequality).
        sums: whether D is a sum over tokens, so that a sample of tokens estimates it without bias.
    """

    coarsens: ClassVar[bool] = True
    sums: ClassVar[bool] = True

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return D per row, differentiable in both arguments; by default the sum of the terms."""
        return self.terms(log_p, log_q).sum(-1)

    @abstractmethod
    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return D per row, and its gradient with respect to the student's logits (at temperature 1)."""

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return the summands of D, one per token, where `sums` is true: the integrand of an integral."""
        raise InputError(cannot(f"split {self.name} into tokens", "it isn't a sum over tokens", "Use `forward_kl`"))


def check_parameter(is_allowed: Callable[[float], bool], name: str, value: Any, domain: str, instead: str) -> None:
    """Refuse a parameter outside of its domain, or that isn't a number."""
    number = as_number(value)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not is_allowed(number):
        shown = f"{name}={value!r}" if is_number or isinstance(value, str) else f"this {name}"
        because = f"it must {domain}" if is_number else f"it is a `{type(value).__name__}`, not a number"
        raise InputError(cannot(f"use {shown}", because, instead))
