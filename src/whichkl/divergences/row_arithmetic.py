"""Row arithmetic: KLs and mixtures of rows of log-probabilities, with exact zeros and no NaN in any gradient."""

from __future__ import annotations

import math

import torch

from whichkl.divergences.divergence import LogProbs, Rows


def kl(log_a: LogProbs, log_b: LogProbs) -> Rows:
    """KL(a‖b) per row: exact 0·log 0, ∞ where a > 0 = b, and no NaN in the gradient either."""
    return kl_and_terms(log_a, log_b, log_a.exp(), log_b.exp())[0]


def kl_and_terms(log_a: LogProbs, log_b: LogProbs, a: LogProbs, b: LogProbs, all_possible: bool = False) -> tuple[Rows, LogProbs]:
    """KL(a‖b) per row and its summands a log(a/b); the summands of an infinite row are finite placeholders.

    The value is Σ a log(a/b) + Σ (b − a). The last sum is 0 up to rounding, and cancels what rounded normalisers add.
    """
    if all_possible:
        terms = (log_a - log_b).mul_(a)
        return nonnegative(terms.sum(-1).add_((b - a).sum(-1))), terms
    empty, never = a == 0, log_b == -math.inf
    terms = a * (log_a - log_b).masked_fill(empty | never, 0.0)
    total = nonnegative(terms.sum(-1) + (b - a).sum(-1))
    return torch.where((never & ~empty).any(-1), math.inf, total), terms


def kl_terms(log_a: LogProbs, log_b: LogProbs) -> LogProbs:
    """The summands a log(a/b): 0 where a = 0 (or underflows to it), ∞ where a > 0 = b."""
    a = log_a.exp()
    empty, never = a == 0, log_b == -math.inf
    return torch.where(never & ~empty, math.inf, a * (log_a - log_b).masked_fill(empty | never, 0.0))


def mix(log_a: LogProbs, log_b: LogProbs, weight: float) -> LogProbs:
    """Log of weight · a + (1 − weight) · b, with a gradient of 0 where both are 0."""
    left = log_a + math.log(weight) if weight > 0 else torch.full_like(log_a, -math.inf)
    right = log_b + math.log1p(-weight) if weight < 1 else torch.full_like(log_b, -math.inf)
    empty = (left == -math.inf) & (right == -math.inf)
    return torch.logaddexp(left.masked_fill(empty, 0.0), right.masked_fill(empty, 0.0)).masked_fill(empty, -math.inf)


def mixture(
    log_a: LogProbs, log_b: LogProbs, a: LogProbs, b: LogProbs, weight: float, all_possible: bool
) -> tuple[LogProbs, LogProbs]:
    """Return log m and m = weight · a + (1 − weight) · b, by one logarithm where nothing is impossible.

    A mass below the smallest normal float then counts as that float, which changes no sum.
    """
    if not all_possible:
        log_m = mix(log_a, log_b, weight)
        return log_m, log_m.exp()
    m = torch.add(b * (1 - weight), a, alpha=weight)
    return m.clamp(min=torch.finfo(m.dtype).tiny).log(), m


def share_of_mixture(a: LogProbs, m: LogProbs) -> LogProbs:
    """The part a/m of a mixture's mass, 0 where there is none."""
    return a / m.clamp(min=torch.finfo(m.dtype).tiny)


def nonnegative(value: Rows) -> Rows:
    """Replace rounding below 0 by 0; the gradient is unchanged."""
    return torch.where(value < 0, value - value.detach(), value)


def without_gradient_where_infinite(value: Rows) -> Rows:
    """Return the value, with a gradient of 0 where it is infinite."""
    return torch.where(value == math.inf, math.inf, value)


def zero_where_infinite(value: Rows, slope: LogProbs) -> LogProbs:
    """Return the gradient, or 0 in rows whose value is infinite."""
    return slope.masked_fill((value == math.inf)[..., None], 0.0)


def gradient_by_logits(value: Rows, slope: LogProbs, q: LogProbs, all_possible: bool = False) -> LogProbs:
    """Return the gradient by the logits, g − q Σ g, written over the gradient g by log q; 0 in rows whose value is infinite."""
    slope.addcmul_(q, slope.sum(-1, keepdim=True), value=-1)
    return slope if all_possible else zero_where_infinite(value, slope)
