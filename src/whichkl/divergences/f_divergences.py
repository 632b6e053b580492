"""Rényi's divergence, total variation, squared Hellinger and χ²."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from whichkl._checks import InputError, as_number, cannot
from whichkl.divergences import row_arithmetic as row
from whichkl.divergences.divergence import (
    Divergence,
    IntegralDivergence,
    LogDensities,
    LogProbs,
    RowDivergence,
    Rows,
    check_parameter,
)
from whichkl.divergences.kl_divergences import ForwardKLDivergence


@dataclass(frozen=True)
class RenyiDivergence(RowDivergence, IntegralDivergence):
    """log(∫ p^a q^(1−a)) / (a − 1), a = `order` > 0; its limit at order 1 is the forward KL.

    Divided by a, it tends to the reverse KL as a → 0. Above order 1, mass that q lacks counts more. The gradient by logits is
    q − r, r ∝ p^a q^(1−a): below order 1 a compromise between p and q is fitted, above it p sharpened where q lacks mass.
    Source: Rényi (1961); van Erven & Harremoës (2014).
    """

    name: ClassVar[str] = "renyi"
    formula: ClassVar[str] = "log(∫ p^a q^(1−a)) / (a − 1)"
    symmetric: ClassVar[bool] = True
    sums: ClassVar[bool] = False
    order: float = 0.5

    def __post_init__(self) -> None:
        """Check the order."""
        allowed = lambda order: 0 < order < math.inf  # noqa: E731
        check_parameter(allowed, "order", self.order, "be positive and finite", "Pass for example order=0.5")
        order = as_number(self.order)
        object.__setattr__(self, "order", float(order) if order > 2**53 else order)  # torch takes no larger integer

    def limit(self) -> Divergence:
        """Return the forward KL at order 1."""
        return ForwardKLDivergence() if self.order == 1 else self

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return p^a q^(1−a)."""
        return torch.exp(self.log_tail(log_p, log_q))

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return a log p + (1 − a) log q."""
        if self.order == 1:
            because = "the order of the integral must be positive and other than 1"
            raise InputError(cannot("use `order=1`", because, "Use forward_kl for the limit at 1"))
        whole = self.order * log_p + (1 - self.order) * torch.where(log_p == -math.inf, 0.0, log_q)
        return torch.where(log_p == -math.inf, -math.inf, whole)

    def of_integral(self, integral: float) -> float:
        """Return log(integral) / (a − 1); ∞ for disjoint supports."""
        return math.inf if integral <= 0 else math.log(integral) / (self.order - 1)

    def error_of_integral(self, error: float, integral: float) -> float:
        """Return error / |(a − 1) · integral|."""
        return error / abs(integral * (self.order - 1)) if integral > 0 else math.inf

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return the mass of p where q = 0, which makes orders above 1 infinite."""
        return torch.exp(log_p) * (log_q == -math.inf) * float(self.order > 1)

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the log of the sum, divided by a − 1."""
        return row.kl(log_p, log_q) if self.order == 1 else self._tilted(log_p, log_q, log_p.exp(), log_q.exp())[0]

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and q − r."""
        if self.order == 1:
            return ForwardKLDivergence().gradient(log_p, log_q, all_possible=all_possible)
        q = log_q.exp()
        value, r = self._tilted(log_p, log_q, log_p.exp(), q, all_possible)
        return value, q - r if all_possible else row.zero_where_infinite(value, q - r)

    def _tilted(
        self, log_p: LogProbs, log_q: LogProbs, p: LogProbs, q: LogProbs, all_possible: bool = False
    ) -> tuple[Rows, LogProbs]:
        """Return D and r; r means nothing in rows that are infinite."""
        lost = None
        if not all_possible:
            no_p, no_q = log_p == -math.inf, log_q == -math.inf
            empty = (no_p | no_q) if self.order < 1 else no_p
            lost = (no_q & ~no_p).any(-1) if self.order > 1 else empty.all(-1)
            log_p, log_q = log_p.masked_fill(no_p, 0.0), log_q.masked_fill(no_q, 0.0)
        tilted = torch.add((1 - self.order) * log_q, log_p, alpha=self.order)
        if lost is not None:
            tilted = tilted.masked_fill(empty & ~lost[..., None], -math.inf)
        r, log_sum = tilted.softmax(-1), tilted.logsumexp(-1, keepdim=True)
        near = log_sum.abs() < 0.5  # there Σ p^a q^(1−a) − 1 loses fewer digits, and Σ p and Σ q cancel their own rounding
        excess = (tilted.masked_fill(~near, 0.0).exp() - self.order * p - (1 - self.order) * q).sum(-1, keepdim=True)
        log_sum = torch.where(near, excess.masked_fill(~near, 0.0).log1p(), log_sum)
        value = row.nonnegative(log_sum.squeeze(-1) / (self.order - 1))
        return value if lost is None else torch.where(lost, math.inf, value), r


@dataclass(frozen=True)
class TotalVariation(RowDivergence, IntegralDivergence):
    """½ ∫ |p − q|, between 0 and 1: the most that the probability of any event differs by.

    Its gradient by log q, −½ q sign(p − q), doesn't shrink as p and q agree. Source: Wen et al., f-divergence minimization
    for sequence-level knowledge distillation (2023).
    """

    name: ClassVar[str] = "total_variation"
    formula: ClassVar[str] = "½ ∫ |p − q|"
    unit: ClassVar[Literal["nats", "none"]] = "none"
    symmetric: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return ½ |p − q|."""
        return 0.5 * (torch.exp(log_p) - torch.exp(log_q)).abs()

    terms = integrand

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and its gradient."""
        q = log_q.exp()
        gap = log_p.exp() - q
        value = gap.abs().sum(-1) / 2
        return value, row.gradient_by_logits(value, gap.sign() * q / -2, q, all_possible)


@dataclass(frozen=True)
class Hellinger(IntegralDivergence):
    """Squared Hellinger distance 1 − ∫ √(p q), between 0 and 1. Source: Hellinger (1909)."""

    name: ClassVar[str] = "hellinger"
    formula: ClassVar[str] = "1 − ∫ √(p q) = ½ ∫ (√p − √q)²"
    unit: ClassVar[Literal["nats", "none"]] = "none"
    symmetric: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return ½ (√p − √q)²."""
        return 0.5 * (torch.exp(log_p / 2) - torch.exp(log_q / 2)).square()


@dataclass(frozen=True)
class ChiSquared(IntegralDivergence):
    """∫ (p − q)²/q = ∫ p²/q − 1. Source: Pearson (1900)."""

    name: ClassVar[str] = "chi_squared"
    formula: ClassVar[str] = "∫ (p − q)² / q"
    unit: ClassVar[Literal["nats", "none"]] = "none"

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return (p − q)²/q; ∞ where p > 0 = q."""
        ratio = log_p - torch.where(log_q == -math.inf, 0.0, log_q)
        # Above e³⁰, subtracting 1 changes no digit; below, expm1 keeps those that a ratio near 1 would lose.
        size = torch.where(ratio > 30, ratio, torch.expm1(ratio.clamp(max=30)).abs().log())
        inside = torch.exp(log_q + 2 * size)
        return torch.where(log_q == -math.inf, torch.where(log_p > -math.inf, math.inf, torch.zeros_like(inside)), inside)

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return the larger of log p²/q and log q."""
        return torch.maximum(torch.where(log_p == -math.inf, -math.inf, 2 * log_p - log_q.clamp(min=-1e300)), log_q)

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return the mass of p where q = 0."""
        return torch.exp(log_p) * (log_q == -math.inf)
