"""Rényi: the divergence of an order, from both sides where it is below one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.access import Access
from whichkl.divergences import kinds
from whichkl.objectives.objective import DRAWS_AND_LOG_P, Objective, Ratios


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
    kind = kinds.Renyi

    def __post_init__(self) -> None:
        """Check the order."""
        if isinstance(self.order, bool) or not isinstance(self.order, (int, float)):
            raise InputError(cannot(f"use `order={self.order!r}`", "it isn't a number", "Give, say, 0.5"))
        if not 0 < self.order < math.inf or self.order == 1:
            because = "the order must be positive and other than 1"
            raise InputError(cannot(f"use `order={self.order}`", because, "Use forward_kl for the limit at 1"))

    def reason(self, access: Access) -> str:
        """Return that log p − log q can be evaluated at draws of both."""
        tail = "" if Access.NORMALIZED in access else " (log Z is estimated by bridge sampling between them)"
        return f"you have log p at draws of p and of q{tail}"

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


def _log_mean(x: Ratios, w: Float[Tensor, " n"]) -> Float[Tensor, ...]:
    """Return log Σ w eˣ, which is differentiable in w even where w is 0."""
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    return ((x - top).exp() @ w).log() + top[..., 0]
