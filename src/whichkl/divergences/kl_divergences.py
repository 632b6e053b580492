"""KL divergences: forward and reverse KL, and the divergences made of KLs: Jeffreys, Jensen–Shannon and the skew KLs."""

from __future__ import annotations

import functools
import math
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
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


class WeightedKLs(IntegralDivergence):
    """a KL(p‖q) + b KL(q‖p) as an integral, (a, b) = `kl_weights`; a weight of 0 leaves its KL out, infinite or not."""

    @property
    @abstractmethod
    def kl_weights(self) -> tuple[float, float]:
        """The weights of KL(p‖q) and of KL(q‖p)."""

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return a p log(p/q) + b q log(q/p)."""
        parts = [weight * row.kl_terms(one, other) for weight, one, other in self.directions(log_p, log_q)]
        return functools.reduce(torch.add, parts)

    def log_tail(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return log p + log|log(p/q)|, the same with p and q swapped, or the larger of both."""
        return functools.reduce(torch.maximum, [_kl_tail(one, other) for _, one, other in self.directions(log_p, log_q)])

    def misses(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return the mass of one where the other is 0."""
        parts = [torch.exp(one) * (other == -math.inf) for _, one, other in self.directions(log_p, log_q)]
        return functools.reduce(torch.add, parts)

    def directions(self, log_p: Tensor, log_q: Tensor) -> list[tuple[float, Tensor, Tensor]]:
        """Return the directions that count: the weight, the log density of the expectation, and the other one."""
        forward, reverse = self.kl_weights
        return [one for one in ((forward, log_p, log_q), (reverse, log_q, log_p)) if one[0] != 0]


class _RowWeightedKLs(WeightedKLs, RowDivergence):
    """The same between rows."""

    terms = WeightedKLs.integrand

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return a KL(p‖q) + b KL(q‖p)."""
        parts = [weight * row.kl(one, other) for weight, one, other in self.directions(log_p, log_q)]
        return parts[0] if len(parts) == 1 else row.without_gradient_where_infinite(parts[0] + parts[1])

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and a (q − p) + b q (log(q/p) − KL(q‖p))."""
        a, b = self.kl_weights
        p, q = log_p.exp(), log_q.exp()
        if b == 0:
            value, _ = row.kl_and_terms(log_p, log_q, p, q, all_possible)
            slope = q - p
        elif a == 0:
            value, terms = row.kl_and_terms(log_q, log_p, q, p, all_possible)
            return value, row.gradient_by_logits(value, terms, q, all_possible)
        else:
            forward, _ = row.kl_and_terms(log_p, log_q, p, q, all_possible)
            reverse, terms = row.kl_and_terms(log_q, log_p, q, p, all_possible)
            value = a * forward + b * reverse
            slope = torch.add(row.gradient_by_logits(value, b * terms, q, all_possible), q - p, alpha=a)
        return value, slope if all_possible else row.zero_where_infinite(value, slope)


@dataclass(frozen=True)
class ForwardKLDivergence(_RowWeightedKLs):
    """KL(p‖q) = E_p[log p − log q], the expectation under p; 0 only where p and q agree. Mass-covering.

    It isn't the cross-entropy: the entropy of p is subtracted. Source: Kullback & Leibler (1951); Hinton, Vinyals & Dean,
    Distilling the knowledge in a neural network (2015).
    """

    name: ClassVar[str] = "forward_kl"
    formula: ClassVar[str] = "KL(p‖q) = ∫ p log(p/q)"
    kl_weights = (1.0, 0.0)


@dataclass(frozen=True)
class ReverseKLDivergence(_RowWeightedKLs):
    """KL(q‖p) = E_q[log q − log p], the expectation under q.

    Where q has mass, p must have mass too; what q leaves out costs little. Source: Kullback & Leibler (1951); Gu et al.,
    MiniLLM (2024).
    """

    name: ClassVar[str] = "reverse_kl"
    formula: ClassVar[str] = "KL(q‖p) = ∫ q log(q/p)"
    kl_weights = (0.0, 1.0)


@dataclass(frozen=True)
class JeffreysDivergence(_RowWeightedKLs):
    """w KL(p‖q) + (1 − w) KL(q‖p), w = `weight_on_forward` in [0, 1].

    It is continuous at both ends: reverse KL at w = 0, forward KL at w = 1. Jeffreys' own J, `jeffreys_sum`, counts both
    KLs fully: it is twice the value at w = ½. Source: Jeffreys (1946).
    """

    name: ClassVar[str] = "jeffreys"
    formula: ClassVar[str] = "w KL(p‖q) + (1 − w) KL(q‖p)"
    symmetric: ClassVar[bool] = True
    weight_on_forward: float = 0.5

    def __post_init__(self) -> None:
        """Check the weight."""
        allowed = lambda w: 0 <= w <= 1  # noqa: E731
        check_parameter(allowed, "weight_on_forward", self.weight_on_forward, "lie between 0 and 1", "Use, say, 0.5")

    @property
    def kl_weights(self) -> tuple[float, float]:
        """W and 1 − w."""
        return self.weight_on_forward, 1 - self.weight_on_forward

    def limit(self) -> Divergence:
        """Return the KL of one direction at the ends of the weight."""
        if self.weight_on_forward in (0, 1):
            return ForwardKLDivergence() if self.weight_on_forward else ReverseKLDivergence()
        return self


@dataclass(frozen=True)
class JeffreysSum(WeightedKLs):
    """KL(p‖q) + KL(q‖p) = ∫ (p − q) log(p/q), twice `jeffreys` at w = ½. Source: Jeffreys (1946)."""

    name: ClassVar[str] = "jeffreys_sum"
    formula: ClassVar[str] = "KL(p‖q) + KL(q‖p) = ∫ (p − q) log(p/q)"
    symmetric: ClassVar[bool] = True
    kl_weights = (1.0, 1.0)


@dataclass(frozen=True)
class JensenShannonDivergence(RowDivergence, IntegralDivergence):
    """w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q, w = `weight` of p, strictly in (0, 1).

    At most the entropy of (w, 1 − w), ≤ log 2, never infinite. It falls to 0 as w goes to 0 or 1: its ends aren't the two
    KLs; `jeffreys` leads from one to the other. Source: Lin (1991); Agarwal et al., GKD (2024), β = `weight`.
    """

    name: ClassVar[str] = "jensen_shannon"
    formula: ClassVar[str] = "w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q"
    symmetric: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the weight."""
        domain = "lie strictly between 0 and 1: at the ends the divergence is 0 for every pair"
        check_parameter(lambda w: 0 < w < 1, "weight", self.weight, domain, "Use, say, 0.5, or `forward_kl` or `reverse_kl`")

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return w p log(p/m) + (1 − w) q log(q/m)."""
        log_m = row.mix(log_p, log_q, self.weight)
        return self.weight * row.kl_terms(log_p, log_m) + (1 - self.weight) * row.kl_terms(log_q, log_m)

    terms = integrand

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the weighted KLs to the mixture."""
        log_m = row.mix(log_p, log_q, self.weight)
        return self.weight * row.kl(log_p, log_m) + (1 - self.weight) * row.kl(log_q, log_m)

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and (1 − w) q (log(q/m) − KL(q‖m))."""
        p, q = log_p.exp(), log_q.exp()
        log_m, m = row.mixture(log_p, log_q, p, q, self.weight, all_possible)
        of_p, _ = row.kl_and_terms(log_p, log_m, p, m, all_possible)
        of_q, terms = row.kl_and_terms(log_q, log_m, q, m, all_possible)
        value = self.weight * of_p + (1 - self.weight) * of_q
        return value, row.gradient_by_logits(value, (1 - self.weight) * terms, q, all_possible)


@dataclass(frozen=True, init=False)
class _SkewKL(RowDivergence, IntegralDivergence):
    """KL(a‖w a + (1 − w) b), where a and b are p and q, or q and p."""

    bounded: ClassVar[bool] = True
    plain: ClassVar[type[_RowWeightedKLs]]
    """The KL at weight 0."""
    weight: float = 0.1

    def __init__(self, weight: float = 0.1, **old: float) -> None:
        """Take the weight, also by its former name `skew`."""
        if "skew" in old:
            warnings.warn("`skew=` is called `weight=` now: write `weight=`", DeprecationWarning, stacklevel=3)
            weight = old.pop("skew")
        if old:
            raise TypeError(f"{type(self).__name__} takes `weight`, not {', '.join(old)}")
        check_parameter(lambda w: 0 <= w < 1, "weight", weight, "lie between 0 and 1, 1 excluded", "Pass for example weight=0.1")
        object.__setattr__(self, "weight", weight)

    def limit(self) -> Divergence:
        """Return the plain KL at weight 0."""
        return self if self.weight else self.plain()

    @abstractmethod
    def ordered(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b."""

    @abstractmethod
    def slope(self, p: LogProbs, q: LogProbs, m: LogProbs, terms: LogProbs) -> LogProbs:
        """Return the gradient by log q, from the mixture and the summands a log(a/m)."""

    def integrand(self, log_p: LogDensities, log_q: LogDensities) -> LogDensities:
        """Return a log(a/m)."""
        if self.weight == 0:  # then it isn't bounded, and the tails and the missed mass of a plain KL decide
            name = self.plain.name
            raise InputError(cannot(f"integrate {self.name} of weight 0", f"it is {name} there", f"Use {name}"))
        return self.terms(log_p, log_q)

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return a log(a/m)."""
        log_a, log_b = self.ordered(log_p, log_q)
        return row.kl_terms(log_a, row.mix(log_a, log_b, self.weight))

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the KL of a to the mixture."""
        log_a, log_b = self.ordered(log_p, log_q)
        return row.kl(log_a, row.mix(log_a, log_b, self.weight))

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and its gradient."""
        p, q = log_p.exp(), log_q.exp()
        (log_a, log_b), (a, b) = self.ordered(log_p, log_q), self.ordered(p, q)
        log_m, m = row.mixture(log_a, log_b, a, b, self.weight, all_possible)
        value, terms = row.kl_and_terms(log_a, log_m, a, m, all_possible)
        return value, row.gradient_by_logits(value, self.slope(p, q, m, terms), q, all_possible)


@dataclass(frozen=True, init=False)
class SkewForwardKLDivergence(_SkewKL):
    """KL(p‖w p + (1 − w) q), w = `weight` in [0, 1): the forward KL at 0, at most −log w above it.

    Source: Lee (2001); Ko et al., DistiLLM (2024).
    """

    name: ClassVar[str] = "skew_forward_kl"
    formula: ClassVar[str] = "KL(p‖w p + (1 − w) q)"
    plain = ForwardKLDivergence

    def ordered(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return p and q."""
        return p, q

    def slope(self, p: LogProbs, q: LogProbs, m: LogProbs, terms: LogProbs) -> LogProbs:
        """Return −(1 − w) q p/m."""
        return (self.weight - 1) * p * row.share_of_mixture(q, m)


@dataclass(frozen=True, init=False)
class SkewReverseKLDivergence(_SkewKL):
    """KL(q‖w q + (1 − w) p), w = `weight` in [0, 1): the reverse KL at 0, at most −log w above it.

    Its gradient includes the gradient through the mixture. Source: Lee (2001); Ko et al., DistiLLM (2024).
    """

    name: ClassVar[str] = "skew_reverse_kl"
    formula: ClassVar[str] = "KL(q‖w q + (1 − w) p)"
    plain = ReverseKLDivergence

    def ordered(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and p."""
        return q, p

    def slope(self, p: LogProbs, q: LogProbs, m: LogProbs, terms: LogProbs) -> LogProbs:
        """Return q (log(q/m) + 1 − w q/m)."""
        return terms + q - self.weight * q * row.share_of_mixture(q, m)


def _kl_tail(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log(p |log(p/q)|), −∞ where it vanishes."""
    zero = log_p == -math.inf
    ratio = torch.where(zero, 0.0, log_p - torch.where(zero, 0.0, log_q)).abs()
    return torch.where(zero | (ratio == 0), -math.inf, log_p + ratio.log())
