"""Mixed: divergences from a mixture of p and q, which are bounded: Jensen–Shannon and the skew KLs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.access import Access, Requirement
from whichkl.divergences import kinds
from whichkl.objectives.objective import Objective, Ratios, check_weight

_NORMALIZED = Access.LOG_PROB | Access.NORMALIZED
_NORMALIZED_AND_DRAWS = Requirement(Access.SAMPLES | _NORMALIZED, Access.SAMPLER | _NORMALIZED)


@dataclass(frozen=True)
class JensenShannon(Objective):
    """w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q: always finite, bounded by the entropy of (w, 1 − w).

    It vanishes at both ends of its weight: divided by w (1 − w) it tends to forward KL as w → 0, and to reverse KL as w → 1.
    Solvers minimise the divided form, so that a tolerance in nats means the same for every w.

    Args:
        weight: w, the weight of p in m, in (0, 1), as in `estimate`.

    Raises:
        InputError: w is something else.

    Source: Lin (1991); its limits, Huszár (2015); as a path between the directions, Agarwal et al. (2024).
    """

    weight: float = 0.5

    name = "jensen_shannon"
    title = "Jensen–Shannon"
    formula = "w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q"
    character = "bounded: what one of them misses has a bounded cost; forward as w → 0, reverse as w → 1"
    requires = _NORMALIZED_AND_DRAWS
    kind = kinds.JensenShannon

    def __post_init__(self) -> None:
        """Check the weight."""
        check_weight("weight", self.weight)

    def reason(self, access: Access) -> str:
        """Return that the mixture can be evaluated at draws of both."""
        return "you have draws of p, and the mixture of p and q can be evaluated, since p is normalised"

    @property
    def curvature(self) -> float:
        """Return w (1 − w)."""
        return self.weight * (1 - self.weight)

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return w Σ w_p log p/m + (1 − w) Σ w_q log q/m."""
        w = self.weight
        return w * (_over_mixture(at_p, w) @ w_p) + (1 - w) * (_over_mixture(-at_q, 1 - w) @ w_q)


@dataclass(frozen=True)
class _Skew(Objective):
    """The weight and the curvature of both skew KLs."""

    weight: float = 0.1

    def __post_init__(self) -> None:
        """Check the weight."""
        check_weight("weight", self.weight)

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
    kind = kinds.SkewForwardKL
    reads_q = False

    def reason(self, access: Access) -> str:
        """Return that the mixture can be evaluated at draws of p."""
        return "its expectation is under p, whose draws you have, and log p is normalised, so that the mixture can be evaluated"

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
    kind = kinds.SkewReverseKL
    reads_p = False

    def reason(self, access: Access) -> str:
        """Return that the mixture can be evaluated at draws of q."""
        return "its expectation is under q, which can always be sampled, and log p is normalised, so the mixture can be evaluated"

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return Σ w_q log q/m."""
        return _over_mixture(-at_q, self.weight) @ w_q


def _over_mixture(ratio: Ratios, weight: float) -> Ratios:
    """Return log a/(w a + (1 − w) b) for ratio = log a − log b."""
    own = ratio.new_tensor(math.log(weight))
    return -torch.logaddexp(own, math.log1p(-weight) - ratio)
