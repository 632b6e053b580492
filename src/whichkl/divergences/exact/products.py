"""Products: divergences of two laws with independent coordinates, from those of the coordinates, in any dimension."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.distributions import Distribution, Independent

from whichkl.arrays import tensor_of
from whichkl.divergences.estimate import Estimate, Finite
from whichkl.divergences.exact import quadrature
from whichkl.divergences.exact.closed_form import closed_form
from whichkl.divergences.kinds import IntegralDivergence
from whichkl.targets import Target

_JOINED: dict[str, Callable[[list[float]], float]] = {
    **dict.fromkeys(("forward_kl", "reverse_kl", "jeffreys", "jeffreys_sum", "renyi"), math.fsum),
    "hellinger": lambda each: -math.expm1(math.fsum(math.log1p(-h) if h < 1 else -math.inf for h in each)),
    "chi_squared": lambda each: math.expm1(math.fsum(math.log1p(one) for one in each)),
}


def coordinates(p: Distribution | None) -> list[Distribution] | None:
    """The laws of the coordinates of `Independent(base, 1)`, or None where p isn't of that form.

    >>> import torch
    >>> from torch.distributions import Normal
    >>> [float(one.mean) for one in coordinates(Independent(Normal(torch.tensor([1.0, 2.0]), 1.0), 1))]
    [1.0, 2.0]
    """
    if not isinstance(p, Independent) or p.reinterpreted_batch_ndims != 1 or p.batch_shape != () or p.base_dist.event_shape != ():
        return None
    base, values = p.base_dist, {name: getattr(p.base_dist, name, None) for name in p.base_dist.arg_constraints}
    if type(base).__module__.partition(".")[0] != "torch" or not values or any(value is None for value in values.values()):
        return None
    try:
        wide = {name: tensor_of(value).expand(base.batch_shape) for name, value in values.items()}
        return [type(base)(**{name: value[j] for name, value in wide.items()}) for j in range(base.batch_shape[0])]
    except (TypeError, ValueError):  # its constructor takes other arguments than its constraints name
        return None


def _pairs(
    p: Distribution | None, q: Distribution | None, kind: IntegralDivergence | None
) -> list[tuple[Distribution, Distribution]]:
    one, other = coordinates(p), coordinates(q)
    if kind is None or kind.name not in _JOINED or not one or not other or len(one) != len(other):
        return []
    return list(zip(one, other, strict=True))


def applies(p: Distribution | None, q: Distribution | None, kind: IntegralDivergence | None) -> bool:
    """Whether both have independent coordinates, and the divergence is made of theirs."""
    return bool(_pairs(p, q, kind))


def divergence(p: Distribution | None, q: Distribution | None, kind: IntegralDivergence) -> Estimate | None:
    """KLs, Jeffreys and Rényi add up over independent coordinates; 1 − Hellinger and 1 + χ² multiply; None elsewhere.

    Raises:
        TargetError: a coordinate's integral doesn't converge.

    Source: van Erven & Harremoës (2014), section II.C, for Rényi.
    """
    each = [_one(a, b, kind) for a, b in _pairs(p, q, kind)]
    if len(each) < 2:
        return None
    infinite = next((j for j, one in enumerate(each) if math.isinf(one.value)), None)
    if infinite is not None:
        note = f"in coordinate {infinite + 1}: {'; '.join(each[infinite].notes) or 'its divergence is infinite'}"
        return Estimate(kind.name, math.inf, finite="infinite", method="quadrature", exact=True, notes=(note,))
    value = _JOINED[kind.name]([one.value for one in each])
    error = math.fsum(one.stderr for one in each) * (1 + value if kind.name == "chi_squared" else 1)
    exact = all(one.exact for one in each)
    note = f"joined from {len(each)} independent coordinates, one at a time"
    finite: Finite = "certified" if math.isfinite(value) else "infinite"
    stderr = 0.0 if exact else error
    return Estimate(kind.name, value, stderr, finite=finite, method="quadrature", exact=exact, notes=(note,))


def _one(p: Distribution, q: Distribution, kind: IntegralDivergence) -> Estimate:
    known = closed_form(p, q, kind)
    if known is not None and math.isfinite(known.value):
        return known
    return quadrature.divergence(Target.of(p), Target.of(q), kind)
