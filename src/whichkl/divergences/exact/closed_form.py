"""Closed forms: KLs of torch's laws, in arithmetic that loses no digits, and torch's own registry for what is left."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    Distribution,
    Geometric,
    HalfCauchy,
    HalfNormal,
    Independent,
    OneHotCategorical,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)
from torch.overrides import TorchFunctionMode

from whichkl.divergences.estimate import Estimate
from whichkl.divergences.exact.gaussians import gaussian, gaussian_kl, with_error
from whichkl.divergences.kinds import KINDS, IntegralDivergence, WeightedKLs

__all__ = ["closed_form", "gaussian"]

_OVERFLOW = "the closed form gives ∞, and no other method finds where: it may have overflowed"
_MIN_PROBABILITY = 1e-12
"""Smallest probability of an atom for which torch's clamp of probabilities makes no difference."""


def closed_form(p: Distribution, q: Distribution, kind: str | IntegralDivergence) -> Estimate | None:
    """A weighted sum of KL(p‖q) and KL(q‖p) in nats; None where there is no closed form.

    Gaussians are summed without cancellation, other laws in as many digits as it takes. Large products of laws go through
    torch's registry, with the error that its float64 makes.
    """
    kind = KINDS[kind]() if isinstance(kind, str) else kind
    if not isinstance(kind, WeightedKLs):
        return None
    total, error = 0.0, 0.0
    for weight, (first, second) in zip(kind.kl_weights, ((p, q), (q, p)), strict=True):
        found = _kl(first, second) if weight else (0.0, 0.0)
        if found is None:
            return None
        total, error = total + weight * found[0], error + weight * found[1]
    if math.isinf(total):
        note = "one of the two has mass where the other has none, or tails too heavy for it"
        settled = Estimate.settled(kind.name, math.inf, "closed form", note if error == 0 else _OVERFLOW)
        return settled if error == 0 else replace(settled, finite="not certified", reliable=False, exact=False)
    return with_error(Estimate.settled(kind.name, total, "closed form"), error)


def _kl(p: Distribution, q: Distribution) -> tuple[float, float] | None:
    """KL(p‖q) and its rounding error."""
    from whichkl.divergences.exact.precise_kl import precise_kl  # mpmath takes a tenth of a second to import

    pair = _without_transforms(p, q)
    if pair is None:
        return None
    known = gaussian_kl(*pair)
    if known is not None:
        return known
    value = precise_kl(*pair)
    return _registered(*pair) if value is None else (value, 0.0)


def _without_transforms(p: Distribution, q: Distribution) -> tuple[Distribution, Distribution] | None:
    """The pair before the transforms that both share; None where these aren't one-to-one, since torch forgets what they merge."""
    one, other = (each.base_dist if isinstance(each, Independent) else each for each in (p, q))
    if not isinstance(one, TransformedDistribution) or not isinstance(other, TransformedDistribution):
        return p, q
    if one.transforms != other.transforms or type(one) is not type(other):
        return p, q
    is_even = isinstance(one, (HalfCauchy, HalfNormal))  # |x| merges what is the same on both sides
    if not is_even and not all(step.bijective for step in one.transforms):
        return None
    if isinstance(p, Independent) and isinstance(q, Independent):
        axes = p.reinterpreted_batch_ndims
        return _without_transforms(Independent(one.base_dist, axes), Independent(other.base_dist, axes))
    return _without_transforms(one.base_dist, other.base_dist)


def _is_clamped(p: Distribution) -> bool:
    """Whether an atom is so rare that torch's clamp of probabilities, to about 1e-16, matters; enumeration has no clamp."""
    inner = p.base_dist if isinstance(p, Independent) else p
    if not isinstance(inner, (Bernoulli, Binomial, Categorical, OneHotCategorical, Geometric)):
        return False
    probs = copy.copy(inner).probs  # torch keeps what it derives: a copy's is thrown away
    rarest = probs if isinstance(inner, (Categorical, OneHotCategorical)) else torch.minimum(probs, 1 - probs)
    return float(rarest.min()) < _MIN_PROBABILITY


def _registered(p: Distribution, q: Distribution) -> tuple[float, float] | None:
    """Torch's value and its rounding error; None where torch has no entry, or a wrong one.

    Torch (checked up to 2.13) returns ∞ for ContinuousBernoulli against Uniform(0, 1) and back, where the KL is finite.

    Source: Higham (2002), section 3.3, on running error analysis.
    """
    if {type(p), type(q)} == {ContinuousBernoulli, Uniform} or _is_clamped(p) or _is_clamped(q):
        return None
    rounding = _Rounding()
    try:
        with torch.no_grad(), rounding:
            found = kl_divergence(p, q)
    except (NotImplementedError, ValueError, RuntimeError):
        return None
    value = float(found) if found.numel() == 1 else math.nan
    if math.isinf(value):
        return value, math.inf
    return (value, rounding.error) if value >= -rounding.error else None


class _Rounding(TorchFunctionMode):
    """Sums up what rounding can add to every number that is computed: its unit in the last place."""

    def __init__(self) -> None:
        super().__init__()
        self.error = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.is_floating_point():
            sizes = found.abs()
            self.error += torch.finfo(found.dtype).eps * float(torch.where(sizes.isfinite(), sizes, 0.0).sum())
        return found
