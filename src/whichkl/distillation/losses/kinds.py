"""Kinds of row divergences: each formula, and its gradient, stands here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.row_divergence import (
    LogProbs,
    RowDivergence,
    Rows,
    kl,
    kl_and_terms,
    kl_terms,
    mix,
    mixture,
    nonnegative,
    settled,
    through_logits,
    unless_infinite,
)


@dataclass(frozen=True)
class RowForwardKL(RowDivergence):
    """KL(p‖q) = E_teacher[log p − log q]; gradient q − p. Source: Kullback & Leibler (1951); Hinton et al. (2015)."""

    name: ClassVar[str] = "forward_kl"
    formula: ClassVar[str] = "KL(p‖q) = Σ p log(p/q)"

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return Σ p log(p/q)."""
        return kl(log_p, log_q)

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return p log(p/q)."""
        return kl_terms(log_p, log_q)

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and q − p."""
        p, q = log_p.exp(), log_q.exp()
        value, _ = kl_and_terms(log_p, log_q, p, q, all_possible)
        return value, q - p if all_possible else unless_infinite(value, q - p)


@dataclass(frozen=True)
class RowReverseKL(RowDivergence):
    """KL(q‖p) = E_student[log q − log p]; gradient q (log(q/p) − D). Source: Gu et al., MiniLLM (2024)."""

    name: ClassVar[str] = "reverse_kl"
    formula: ClassVar[str] = "KL(q‖p) = Σ q log(q/p)"

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return Σ q log(q/p)."""
        return kl(log_q, log_p)

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return q log(q/p)."""
        return kl_terms(log_q, log_p)

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and q (log(q/p) − D)."""
        q = log_q.exp()
        value, terms = kl_and_terms(log_q, log_p, q, log_p.exp(), all_possible)
        return value, through_logits(value, terms, q, all_possible)


@dataclass(frozen=True)
class RowJeffreys(RowDivergence):
    """w KL(p‖q) + (1 − w) KL(q‖p), w = `weight_on_forward`. Source: Jeffreys (1946), where both count 1, not ½."""

    name: ClassVar[str] = "jeffreys"
    formula: ClassVar[str] = "w KL(p‖q) + (1 − w) KL(q‖p)"
    symmetric: ClassVar[bool] = True
    weight_on_forward: float = 0.5

    def __post_init__(self) -> None:
        """Check the weight."""
        if not 0 <= self.weight_on_forward <= 1:
            do = f"use weight_on_forward={self.weight_on_forward}"
            raise InputError(cannot(do, "it lies between 0 and 1", "Pass for example weight_on_forward=0.5"))

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the weighted sum of the two KLs; a weight of 0 leaves its direction out, infinite or not."""
        return settled(_weighted(self.weight_on_forward, RowForwardKL().value, RowReverseKL().value, log_p, log_q))

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return the weighted sum of the two KLs' terms."""
        return _weighted(self.weight_on_forward, RowForwardKL().terms, RowReverseKL().terms, log_p, log_q)

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and the weighted sum of the two gradients."""
        weight = self.weight_on_forward
        if weight in (0, 1):
            return (RowForwardKL() if weight else RowReverseKL()).gradient(log_p, log_q, all_possible=all_possible)
        p, q = log_p.exp(), log_q.exp()
        forward, _ = kl_and_terms(log_p, log_q, p, q, all_possible)
        reverse, terms = kl_and_terms(log_q, log_p, q, p, all_possible)
        value = weight * forward + (1 - weight) * reverse
        slope = torch.add(through_logits(value, (1 - weight) * terms, q, all_possible), q - p, alpha=weight)
        return value, slope if all_possible else unless_infinite(value, slope)


@dataclass(frozen=True)
class RowJensenShannon(RowDivergence):
    """w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q, w = `weight` on the teacher. At most the entropy of w, ≤ log 2.

    Gradient by log q: (1 − w) q log(q/m). It goes to 0 with w and with 1 − w: the ends aren't the two KLs. Source: Lin (1991).
    """

    name: ClassVar[str] = "jensen_shannon"
    formula: ClassVar[str] = "w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q"
    symmetric: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the weight."""
        if not 0 < self.weight < 1:
            because = "at the ends the divergence is 0 for every pair"
            raise InputError(
                cannot(f"use weight={self.weight}", because, "Pass 0 < weight < 1, or use `forward_kl`/`reverse_kl`")
            )

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the weighted KLs to the mixture."""
        log_m = mix(log_p, log_q, self.weight)
        return self.weight * kl(log_p, log_m) + (1 - self.weight) * kl(log_q, log_m)

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return the weighted KL terms to the mixture."""
        log_m = mix(log_p, log_q, self.weight)
        return self.weight * kl_terms(log_p, log_m) + (1 - self.weight) * kl_terms(log_q, log_m)

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and (1 − w) q (log(q/m) − KL(q‖m))."""
        p, q = log_p.exp(), log_q.exp()
        log_m, m = mixture(log_p, log_q, p, q, self.weight, all_possible)
        of_p, _ = kl_and_terms(log_p, log_m, p, m, all_possible)
        of_q, terms = kl_and_terms(log_q, log_m, q, m, all_possible)
        value = self.weight * of_p + (1 - self.weight) * of_q
        return value, through_logits(value, (1 - self.weight) * terms, q, all_possible)


@dataclass(frozen=True)
class RowSkewForwardKL(RowDivergence):
    """KL(p‖s p + (1 − s) q), s = `skew`; at most −log s. Source: Lee (2001); Ko et al., DistiLLM (2024)."""

    name: ClassVar[str] = "skew_forward_kl"
    formula: ClassVar[str] = "KL(p‖s p + (1 − s) q)"
    bounded: ClassVar[bool] = True
    skew: float = 0.1

    def __post_init__(self) -> None:
        """Check the skew."""
        _check_skew(self.skew)

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the KL of p to the mixture."""
        return kl(log_p, mix(log_p, log_q, self.skew))

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return its terms."""
        return kl_terms(log_p, mix(log_p, log_q, self.skew))

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and, by log q, −(1 − s) q p/m."""
        p, q = log_p.exp(), log_q.exp()
        log_m, m = mixture(log_p, log_q, p, q, self.skew, all_possible)
        value, _ = kl_and_terms(log_p, log_m, p, m, all_possible)
        return value, through_logits(value, (self.skew - 1) * p * _share(q, m), q, all_possible)


@dataclass(frozen=True)
class RowSkewReverseKL(RowDivergence):
    """KL(q‖s q + (1 − s) p), s = `skew`; at most −log s. The mixture moves with q. Source: Ko et al., DistiLLM (2024)."""

    name: ClassVar[str] = "skew_reverse_kl"
    formula: ClassVar[str] = "KL(q‖s q + (1 − s) p)"
    bounded: ClassVar[bool] = True
    skew: float = 0.1

    def __post_init__(self) -> None:
        """Check the skew."""
        _check_skew(self.skew)

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the KL of q to the mixture."""
        return kl(log_q, mix(log_q, log_p, self.skew))

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return its terms."""
        return kl_terms(log_q, mix(log_q, log_p, self.skew))

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and, by log q, q (log(q/m) + 1 − s q/m)."""
        p, q = log_p.exp(), log_q.exp()
        log_m, m = mixture(log_q, log_p, q, p, self.skew, all_possible)
        value, terms = kl_and_terms(log_q, log_m, q, m, all_possible)
        return value, through_logits(value, terms + q - self.skew * q * _share(q, m), q, all_possible)


@dataclass(frozen=True)
class RowRenyi(RowDivergence):
    """log Σ p^a q^(1−a) / (a − 1), a = `order` > 0; order 1 is the forward KL, its limit.

    Gradient q − r, r ∝ p^a q^(1−a): below order 1 a compromise between teacher and student is fitted, above it the teacher
    sharpened where the student lacks mass. Source: Rényi (1961); van Erven & Harremoës (2014).
    """

    name: ClassVar[str] = "renyi"
    formula: ClassVar[str] = "log Σ p^a q^(1−a) / (a − 1)"
    symmetric: ClassVar[bool] = True
    sums: ClassVar[bool] = False
    order: float = 0.5

    def __post_init__(self) -> None:
        """Check the order."""
        if not 0 < self.order < math.inf:
            raise InputError(cannot(f"use order={self.order}", "the order is positive and finite", "Pass for example order=0.5"))

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return the log of the sum, over a − 1."""
        return kl(log_p, log_q) if self.order == 1 else self._tilted(log_p, log_q, log_p.exp(), log_q.exp())[0]

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and q − r."""
        if self.order == 1:
            return RowForwardKL().gradient(log_p, log_q, all_possible=all_possible)
        q = log_q.exp()
        value, r = self._tilted(log_p, log_q, log_p.exp(), q, all_possible)
        return value, q - r if all_possible else unless_infinite(value, q - r)

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
        near = log_sum.abs() < 0.5  # there Σ p^a q^(1−a) − 1 loses fewer digits, and Σ p and Σ q take out their own rounding
        excess = (tilted.masked_fill(~near, 0.0).exp() - self.order * p - (1 - self.order) * q).sum(-1, keepdim=True)
        log_sum = torch.where(near, excess.masked_fill(~near, 0.0).log1p(), log_sum)
        value = nonnegative(log_sum.squeeze(-1) / (self.order - 1))
        return value if lost is None else torch.where(lost, math.inf, value), r


@dataclass(frozen=True)
class RowTotalVariation(RowDivergence):
    """½ Σ |p − q|, between 0 and 1; gradient by log q: −½ q sign(p − q)."""

    name: ClassVar[str] = "total_variation"
    formula: ClassVar[str] = "½ Σ |p − q|"
    symmetric: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    def value(self, log_p: LogProbs, log_q: LogProbs) -> Rows:
        """Return half the absolute differences."""
        return self.terms(log_p, log_q).sum(-1)

    def terms(self, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
        """Return ½ |p − q|."""
        return (log_p.exp() - log_q.exp()).abs() / 2

    def gradient(self, log_p: LogProbs, log_q: LogProbs, *, all_possible: bool = False) -> tuple[Rows, LogProbs]:
        """Return the value and its gradient."""
        q = log_q.exp()
        gap = log_p.exp() - q
        value = gap.abs().sum(-1) / 2
        return value, through_logits(value, gap.sign() * q / -2, q, all_possible)


def _weighted(
    weight: float, forward: Callable[..., Tensor], reverse: Callable[..., Tensor], log_p: LogProbs, log_q: LogProbs
) -> Tensor:
    if weight in (0, 1):
        return (forward if weight else reverse)(log_p, log_q)
    return weight * forward(log_p, log_q) + (1 - weight) * reverse(log_p, log_q)


def _check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise InputError(cannot(f"use skew={skew}", "it lies between 0 and 1, 1 left out", "Pass for example skew=0.1"))


def _share(q: LogProbs, m: LogProbs) -> LogProbs:
    """The part q/m of a mixture's mass, 0 where there is none."""
    return q / m.clamp(min=torch.finfo(m.dtype).tiny)
