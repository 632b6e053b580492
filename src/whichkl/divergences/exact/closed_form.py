"""Closed forms: torch's registry of KLs, without the entries that are known to be wrong, and what Gaussians add to it."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    Distribution,
    Geometric,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Uniform,
    kl_divergence,
)

from whichkl.divergences.estimate import Estimate
from whichkl.divergences.kinds import KINDS, IntegralDivergence, WeightedKLs

_MIN_PROBABILITY = 1e-12
"""Smallest probability of an atom for which torch's clamp of probabilities makes no difference."""


def closed_form(p: Distribution, q: Distribution, kind: str | IntegralDivergence) -> Estimate | None:
    """A weighted sum of KL(p‖q) and KL(q‖p) in nats from torch's registry; None where it has no entry, or a wrong one.

    torch (checked up to 2.13) returns ∞ for ContinuousBernoulli against Uniform(0, 1) and back, where the KL is finite:
    these two are left to quadrature.
    """
    kind = KINDS[kind]() if isinstance(kind, str) else kind
    if not isinstance(kind, WeightedKLs):
        return None
    total = 0.0
    for weight, (first, second) in zip(kind.kl_weights, ((p, q), (q, p)), strict=True):
        value = _registered(first, second) if weight else 0.0
        if value is None:
            return None
        total += weight * value
    if math.isinf(total):
        note = "one of the two has mass where the other has none, or tails too heavy for it"
        return Estimate.settled(kind.name, math.inf, "closed form", note)
    return Estimate.settled(kind.name, max(total, 0.0), "closed form")


def gaussian(p: Distribution, q: Distribution, kind: IntegralDivergence) -> Estimate | None:
    """Rényi, squared Hellinger and χ² of two Gaussians of any dimension; None for other kinds and other laws.

    With S = a Σ_q + (1 − a) Σ_p and δ the difference of means, Rényi's divergence of order a is
    a/2 δᵀ S⁻¹ δ − (log|S| − (1 − a) log|Σ_p| − a log|Σ_q|) / 2(a − 1), ∞ where S isn't positive definite;
    Hellinger is 1 − exp(−D_½ / 2) and χ² is exp(D_2) − 1. Source: Gil, Alajaji & Linder (2013).
    """
    order = {"hellinger": 0.5, "chi_squared": 2.0, "renyi": getattr(kind, "order", None)}.get(kind.name)
    first, second = _moments(p), _moments(q)
    if order is None or first is None or second is None or first[0].shape != second[0].shape:
        return None
    gap, mixed = first[0] - second[0], order * second[1] + (1 - order) * first[1]
    root, failed = torch.linalg.cholesky_ex(mixed)
    if int(failed) != 0:
        note = f"{kind.formula} grows in a direction where p is too wide for q (order × Σ_q + (1 − order) × Σ_p isn't positive)"
        return Estimate.settled(kind.name, math.inf, "closed form", note)
    volume = 2 * root.diagonal().log().sum() - (1 - order) * torch.logdet(first[1]) - order * torch.logdet(second[1])
    renyi = max(0.0, float(order / 2 * gap @ torch.cholesky_solve(gap[:, None], root)[:, 0] - volume / (2 * (order - 1))))
    if kind.name == "chi_squared" and renyi > 700:
        return None  # it is finite, and beyond the largest float64
    value = -math.expm1(-renyi / 2) if kind.name == "hellinger" else math.expm1(renyi) if kind.name == "chi_squared" else renyi
    return Estimate.settled(kind.name, value, "closed form")


def _moments(p: Distribution) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance of a Gaussian in float64, or None."""
    base = p.base_dist if isinstance(p, Independent) else p
    if isinstance(base, Normal) and len(p.event_shape) <= 1 and p.batch_shape == ():
        return base.loc.detach().to(torch.float64).reshape(-1), torch.diag(base.variance.detach().to(torch.float64).reshape(-1))
    if isinstance(p, (MultivariateNormal, LowRankMultivariateNormal)) and p.batch_shape == ():
        return p.loc.detach().to(torch.float64), p.covariance_matrix.detach().to(torch.float64)
    return None


def _is_clamped(p: Distribution) -> bool:
    """Whether an atom is so rare that torch's clamp of probabilities, to about 1e-16, matters; enumeration has no clamp."""
    inner = p.base_dist if isinstance(p, Independent) else p
    if not isinstance(inner, (Bernoulli, Binomial, Categorical, OneHotCategorical, Geometric)):
        return False
    probs = copy.copy(inner).probs  # torch keeps what it derives: a copy's is thrown away
    rarest = probs if isinstance(inner, (Categorical, OneHotCategorical)) else torch.minimum(probs, 1 - probs)
    return float(rarest.min()) < _MIN_PROBABILITY


def _registered(p: Distribution, q: Distribution) -> float | None:
    if {type(p), type(q)} == {ContinuousBernoulli, Uniform} or _is_clamped(p) or _is_clamped(q):
        return None
    try:
        with torch.no_grad():
            value = kl_divergence(p, q)
    except (NotImplementedError, ValueError, RuntimeError):
        return None
    return None if value.numel() != 1 or bool(value.isnan()) else float(value)
