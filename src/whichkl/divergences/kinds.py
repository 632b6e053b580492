"""Kinds: every divergence as one integral over two log densities. Formulas stand here and nowhere else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot

LogDensities = Float[Tensor, "..."]


@dataclass(frozen=True)
class Kind(ABC):
    """A divergence D = g(∫ h(log p, log q) dμ), with exact 0 · log 0 = 0 and h = ∞ where the divergence is.

    `log_tail` is log|h| far out, in a form that neither overflows nor vanishes early: it decides whether the integral
    converges there.
    """

    name: ClassVar[str]
    formula: ClassVar[str]

    @abstractmethod
    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return h; ∞ on points that make the divergence infinite."""

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return log|h|, −∞ where it vanishes."""
        return self.integrand(log_p, log_q).abs().log()

    def value(self, integral: float) -> float:
        """Return g of the integral; the identity unless said."""
        return integral

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Mass density of the points that make the divergence infinite."""
        return torch.zeros_like(log_p)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """P log(p/q), 0 where p = 0 (or underflows to it), ∞ where p > 0 = q."""
    p = torch.exp(log_p)
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_p - log_q))


def _kl_tail(log_p: Tensor, log_q: Tensor) -> Tensor:
    zero = log_p == -math.inf
    ratio = torch.where(zero, 0.0, log_p - torch.where(zero, 0.0, log_q)).abs()
    return torch.where(zero | (ratio == 0), -math.inf, log_p + ratio.log())


def _mix(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Log of weight · p + (1 − weight) · q."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


@dataclass(frozen=True)
class ForwardKLDivergence(Kind):
    """KL(p‖q) = ∫ p log(p/q). Source: Kullback & Leibler (1951)."""

    name: ClassVar[str] = "forward_kl"
    formula: ClassVar[str] = "KL(p‖q) = ∫ p log(p/q)"

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return p log(p/q)."""
        return _kl(log_p, log_q)

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return log p + log|log(p/q)|."""
        return _kl_tail(log_p, log_q)

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Mass of p where q = 0."""
        return torch.exp(log_p) * (log_q == -math.inf)


@dataclass(frozen=True)
class ReverseKLDivergence(Kind):
    """KL(q‖p) = ∫ q log(q/p)."""

    name: ClassVar[str] = "reverse_kl"
    formula: ClassVar[str] = "KL(q‖p) = ∫ q log(q/p)"

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return q log(q/p)."""
        return _kl(log_q, log_p)

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return log q + log|log(q/p)|."""
        return _kl_tail(log_q, log_p)

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Mass of q where p = 0."""
        return torch.exp(log_q) * (log_p == -math.inf)


@dataclass(frozen=True)
class Jeffreys(Kind):
    """KL(p‖q) + KL(q‖p) = ∫ (p − q) log(p/q). Source: Jeffreys (1946)."""

    name: ClassVar[str] = "jeffreys"
    formula: ClassVar[str] = "KL(p‖q) + KL(q‖p) = ∫ (p − q) log(p/q)"

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return (p − q) log(p/q)."""
        return _kl(log_p, log_q) + _kl(log_q, log_p)

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return the larger of the two KLs' tails."""
        return torch.maximum(_kl_tail(log_p, log_q), _kl_tail(log_q, log_p))

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Mass of either where the other is 0."""
        return torch.exp(log_p) * (log_q == -math.inf) + torch.exp(log_q) * (log_p == -math.inf)


@dataclass(frozen=True)
class JensenShannon(Kind):
    """w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q; at most H(w), ln 2 for w = ½. Source: Lin (1991).

    Args:
        weight: w, the weight of p, in (0, 1).
    """

    weight: float = 0.5
    name: ClassVar[str] = "jensen_shannon"
    formula: ClassVar[str] = "w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q"

    def __post_init__(self) -> None:
        """Check the weight."""
        _check_open("weight", self.weight)

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return w p log(p/m) + (1 − w) q log(q/m)."""
        middle = _mix(log_p, log_q, self.weight)
        return self.weight * _kl(log_p, middle) + (1 - self.weight) * _kl(log_q, middle)


@dataclass(frozen=True)
class SkewForwardKL(Kind):
    """KL(p‖w p + (1 − w) q): finite, at most −log w. Source: Lee (2001).

    Args:
        weight: w, how much of p is mixed into q, in (0, 1).
    """

    weight: float = 0.1
    name: ClassVar[str] = "skew_forward_kl"
    formula: ClassVar[str] = "KL(p‖w p + (1 − w) q)"

    def __post_init__(self) -> None:
        """Check the weight."""
        _check_open("weight", self.weight)

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return p log(p/m)."""
        return _kl(log_p, _mix(log_p, log_q, self.weight))


@dataclass(frozen=True)
class SkewReverseKL(Kind):
    """KL(q‖w q + (1 − w) p): finite, at most −log w. Source: Lee (2001).

    Args:
        weight: w, how much of q is mixed into p, in (0, 1).
    """

    weight: float = 0.1
    name: ClassVar[str] = "skew_reverse_kl"
    formula: ClassVar[str] = "KL(q‖w q + (1 − w) p)"

    def __post_init__(self) -> None:
        """Check the weight."""
        _check_open("weight", self.weight)

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return q log(q/m)."""
        return _kl(log_q, _mix(log_q, log_p, self.weight))


@dataclass(frozen=True)
class Renyi(Kind):
    """log(∫ pᵃ q¹⁻ᵃ) / (a − 1); forward KL as a → 1. Source: Rényi (1961).

    Args:
        order: a > 0, a ≠ 1.
    """

    order: float = 0.5
    name: ClassVar[str] = "renyi"
    formula: ClassVar[str] = "log(∫ pᵃ q¹⁻ᵃ) / (a − 1)"

    def __post_init__(self) -> None:
        """Check the order."""
        if not (0 < self.order < math.inf) or self.order == 1:
            because = "the order must be positive and other than 1"
            raise InputError(cannot(f"use `order={self.order}`", because, "Use forward_kl for the limit at 1"))

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return pᵃ q¹⁻ᵃ."""
        return torch.exp(self.log_tail(log_p, log_q))

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return a log p + (1 − a) log q."""
        whole = self.order * log_p + (1 - self.order) * torch.where(log_p == -math.inf, 0.0, log_q)
        return torch.where(log_p == -math.inf, -math.inf, whole)

    def value(self, integral: float) -> float:
        """Return log(integral) / (a − 1); ∞ for disjoint supports."""
        if integral <= 0:
            return math.inf
        return math.log(integral) / (self.order - 1)

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Mass of p where q = 0, which makes orders above 1 infinite."""
        return torch.exp(log_p) * (log_q == -math.inf) * float(self.order > 1)


@dataclass(frozen=True)
class TotalVariation(Kind):
    """½ ∫ |p − q|, between 0 and 1."""

    name: ClassVar[str] = "total_variation"
    formula: ClassVar[str] = "½ ∫ |p − q|"

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return ½ |p − q|."""
        return 0.5 * (torch.exp(log_p) - torch.exp(log_q)).abs()


@dataclass(frozen=True)
class Hellinger(Kind):
    """Squared Hellinger distance 1 − ∫ √(p q), between 0 and 1. Source: Hellinger (1909)."""

    name: ClassVar[str] = "hellinger"
    formula: ClassVar[str] = "1 − ∫ √(p q) = ½ ∫ (√p − √q)²"

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return ½ (√p − √q)²."""
        return 0.5 * (torch.exp(log_p / 2) - torch.exp(log_q / 2)).square()


@dataclass(frozen=True)
class ChiSquared(Kind):
    """∫ (p − q)²/q = ∫ p²/q − 1. Source: Pearson (1900)."""

    name: ClassVar[str] = "chi_squared"
    formula: ClassVar[str] = "∫ (p − q)² / q"

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return (p − q)²/q; ∞ where p > 0 = q."""
        ratio = log_p - torch.where(log_q == -math.inf, 0.0, log_q)
        size = torch.where(ratio > 30, ratio, torch.expm1(ratio.clamp(max=30)).abs().log())
        inside = torch.exp(log_q + 2 * size)
        return torch.where(log_q == -math.inf, torch.where(log_p > -math.inf, math.inf, torch.zeros_like(inside)), inside)

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return the larger of log p²/q and log q."""
        return torch.maximum(torch.where(log_p == -math.inf, -math.inf, 2 * log_p - log_q.clamp(min=-1e300)), log_q)

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Mass of p where q = 0."""
        return torch.exp(log_p) * (log_q == -math.inf)


KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (
        ForwardKLDivergence,
        ReverseKLDivergence,
        Jeffreys,
        JensenShannon,
        SkewForwardKL,
        SkewReverseKL,
        Renyi,
        TotalVariation,
        Hellinger,
        ChiSquared,
    )
}


def _check_open(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(cannot(f"use `{name}={value}`", "it must lie strictly between 0 and 1", "Use, say, 0.5"))
