"""Between: divergences between the directions: Jeffreys, Jensen–Shannon, the skew KLs and Rényi."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, as_number, cannot
from whichkl.access import Access, Requirement
from whichkl.divergences import kinds
from whichkl.objectives.objective import DRAWS_AND_LOG_P, Objective, Ratios, check_weight

_NORMALIZED = Access.LOG_PROB | Access.NORMALIZED
_NORMALIZED_AND_DRAWS = Requirement(Access.SAMPLES | _NORMALIZED, Access.SAMPLER | _NORMALIZED)


@dataclass(frozen=True)
class Jeffreys(Objective):
    """w KL(p‖q) + (1 − w) KL(q‖p): a path from reverse KL (w = 0) to forward KL (w = 1), with both as its ends.

    Args:
        weight_on_forward: w in [0, 1]. Half of the sum that Jeffreys wrote down is w = ½.

    Raises:
        InputError: w is something else.

    Source: Jeffreys (1946).

    >>> Jeffreys(0.3).spec
    'jeffreys:0.3'
    """

    weight_on_forward: float = 0.5

    name = "jeffreys"
    title = "Jeffreys"
    formula = "w KL(p‖q) + (1 − w) KL(q‖p)"
    character = "covers mass as far as w is on forward KL; w leads from one direction to the other"
    requires = DRAWS_AND_LOG_P
    why = "you have draws of p for the forward part, and log p at draws of q for the reverse part"
    why_unnormalized = " (log Z doesn't depend on q, and cancels at w = ½)"

    def __post_init__(self) -> None:
        """Check the weight."""
        check_weight(self, "weight_on_forward", closed=True)

    @property
    def reads_p(self) -> bool:
        """True if w > 0."""
        return self.weight_on_forward > 0

    @property
    def reads_q(self) -> bool:
        """True if w < 1."""
        return self.weight_on_forward < 1

    @property
    def log_z_share(self) -> float:
        """2w − 1: forward KL contains + log Z, reverse KL − log Z."""
        return 2 * self.weight_on_forward - 1

    @property
    def kinds(self) -> tuple[tuple[float, kinds.Kind], ...]:
        """Both KLs, weighted."""
        w = self.weight_on_forward
        parts = ((w, kinds.ForwardKLDivergence()), (1 - w, kinds.ReverseKLDivergence()))
        return tuple(one for one in parts if one[0] > 0)

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return w Σ w_p ℓ − (1 − w) Σ w_q ℓ.

        >>> import torch
        >>> one = torch.ones(1)
        >>> Jeffreys(0.25).loss(2 * one, one, -one, one)
        tensor(1.2500)
        """
        w = self.weight_on_forward
        forward = w * (at_p @ w_p) if self.reads_p else at_q.new_zeros(())
        return forward - (1 - w) * (at_q @ w_q) if self.reads_q else forward


@dataclass(frozen=True)
class _Mixed(Objective):
    """A divergence from a mixture of p and q with a weight in (0, 1)."""

    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the weight."""
        check_weight(self, "weight")


@dataclass(frozen=True)
class JensenShannon(_Mixed):
    """w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q: always finite, bounded by the entropy of (w, 1 − w).

    It vanishes at both ends of its weight: divided by w (1 − w) it tends to forward KL as w → 0, and to reverse KL as w → 1.
    Solvers minimise the divided form, so that a tolerance in nats means the same for every w.

    Args:
        weight: w, the weight of p in m, in (0, 1), as in `estimate`.

    Raises:
        InputError: w is something else.

    Source: Lin (1991); its limits, Huszár (2015); as a path between the directions, Agarwal et al. (2024).
    """

    name = "jensen_shannon"
    title = "Jensen–Shannon"
    formula = "w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q"
    character = "bounded: what one of them misses has a bounded cost; forward as w → 0, reverse as w → 1"
    requires = _NORMALIZED_AND_DRAWS
    kind = kinds.JensenShannonDivergence
    why = "you have draws of p, and the mixture of p and q can be evaluated, since p is normalised"

    @property
    def curvature(self) -> float:
        """Return w (1 − w)."""
        return self.weight * (1 - self.weight)

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return w Σ w_p log p/m + (1 − w) Σ w_q log q/m."""
        w = self.weight
        return w * (_over_mixture(at_p, w) @ w_p) + (1 - w) * (_over_mixture(-at_q, 1 - w) @ w_q)


@dataclass(frozen=True)
class _Skew(_Mixed):
    weight: float = 0.1

    @property
    def curvature(self) -> float:
        """Return (1 − w)²."""
        return (1 - self.weight) ** 2


@dataclass(frozen=True)
class SkewForwardKL(_Skew):
    """KL(p‖w p + (1 − w) q), at most −log w: forward KL as w → 0, that forgives what q misses altogether.

    Args:
        weight: w, how much of p is mixed into q, in (0, 1).

    Raises:
        InputError: w is something else.

    Source: Lee (2001); for distillation, Ko et al. (2024).
    """

    name = "skew_forward_kl"
    title = "Skew forward KL"
    formula = "KL(p‖w p + (1 − w) q)"
    character = "forward KL with a bound, −log w: an outlier of p that q misses costs no more than that"
    requires = _NORMALIZED_AND_DRAWS
    kind = kinds.SkewForwardKLDivergence
    why = "its expectation is under p, whose draws you have, and log p is normalised, so that the mixture can be evaluated"
    reads_q = False

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return Σ w_p log p/m."""
        return _over_mixture(at_p, self.weight) @ w_p


@dataclass(frozen=True)
class SkewReverseKL(_Skew):
    """KL(q‖w q + (1 − w) p), at most −log w: reverse KL as w → 0, finite where p is zero.

    Args:
        weight: w, how much of q is mixed into p, in (0, 1).

    Raises:
        InputError: w is something else.

    Source: Lee (2001); for distillation, Ko et al. (2024).
    """

    name = "skew_reverse_kl"
    title = "Skew reverse KL"
    formula = "KL(q‖w q + (1 − w) p)"
    character = "reverse KL with a bound, −log w: q may put mass where p has none, at that price"
    requires = Requirement(_NORMALIZED)
    kind = kinds.SkewReverseKLDivergence
    why = "its expectation is under q, which can always be sampled, and log p is normalised, so the mixture can be evaluated"
    reads_p = False

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return Σ w_q log q/m."""
        return _over_mixture(-at_q, self.weight) @ w_q


@dataclass(frozen=True)
class Renyi(Objective):
    """log(∫ pᵃ q¹⁻ᵃ) / (a − 1): forward KL as a → 1; divided by a, reverse KL as a → 0. Above 1 it covers more than forward KL.

    Below 1 the integral is 1 − J, J = ∫ (a p + (1 − a) q − pᵃ q¹⁻ᵃ), whose integrand is never negative, over draws of both:
    J = E_m[…/m] with m = ½ p + ½ q, so that no term is above 2 and none rewards a model that fits a few draws alone. p must
    be normalised for that, or Z is estimated. Above 1 it is log E_p[(p/q)ᵃ⁻¹]/(a − 1), up to log Z. The log of a mean is
    biased by half its squared standard error.

    Args:
        order: a > 0, other than 1.

    Raises:
        InputError: the order is something else.

    Source: Rényi (1961); van Erven & Harremoës (2014); for variational inference, Li & Turner (2016).
    """

    order: float = 0.5

    name = "renyi"
    title = "Rényi"
    formula = "log(∫ pᵃ q¹⁻ᵃ) / (a − 1)"
    character = "forward KL as a → 1, and above it covers more; a times reverse KL as a → 0"
    requires = DRAWS_AND_LOG_P
    kind = kinds.RenyiDivergence
    why = "you have log p at draws of p and of q"
    why_unnormalized = " (log Z is estimated by bridge sampling between them)"

    def __post_init__(self) -> None:
        """Check the order."""
        object.__setattr__(self, "order", as_number(self.order))
        if isinstance(self.order, bool) or not isinstance(self.order, (int, float)):
            raise InputError(cannot(f"use `order={self.order!r}`", "it isn't a number", "Give, say, 0.5"))
        if not 0 < self.order < math.inf or self.order == 1:
            because = "the order must be positive and other than 1"
            raise InputError(cannot(f"use `order={self.order}`", because, "Use forward_kl for the limit at 1"))

    @property
    def reads_q(self) -> bool:
        """True below order 1."""
        return self.order < 1

    @property
    def curvature(self) -> float:
        """Return a."""
        return self.order

    @property
    def reads_log_z(self) -> bool:
        """True below order 1."""
        return self.order < 1

    @property
    def log_z_share(self) -> float:
        """1 above order 1."""
        return float(self.order > 1)

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return log of the integral over a − 1, in the form that the class gives; ∞ where the integral is 0."""
        a = self.order
        if a > 1:
            return _log_mean((a - 1) * at_p, w_p) / (a - 1)
        return -torch.log1p(-(self._gap(at_p) @ w_p + self._gap(at_q) @ w_q) / 2) / (1 - a)

    def _gap(self, ratio: Ratios) -> Ratios:
        """Return (a p + (1 − a) q − pᵃ q¹⁻ᵃ) / m, which is between 0 and 2."""
        a = self.order
        share = torch.sigmoid(ratio)
        return 2 * (a * share + (1 - a) * (1 - share) - torch.exp(a * ratio - torch.nn.functional.softplus(ratio)))


def _over_mixture(ratio: Ratios, weight: float) -> Ratios:
    """Return log a/(w a + (1 − w) b) for ratio = log a − log b."""
    own = ratio.new_tensor(math.log(weight))
    return -torch.logaddexp(own, math.log1p(-weight) - ratio)


def _log_mean(x: Ratios, w: Float[Tensor, " n"]) -> Float[Tensor, ...]:
    """Return log Σ w eˣ, which is differentiable in w even where w is 0."""
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    return ((x - top).exp() @ w).log() + top[..., 0]
