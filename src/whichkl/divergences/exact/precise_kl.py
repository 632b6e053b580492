"""Precise KL: closed forms in arithmetic of as many digits as cancel, since log Γ(10¹²) − log Γ(10¹² + 1) has none in float64."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import torch
from torch import Tensor
from torch.distributions import Categorical, Cauchy, Dirichlet, Distribution, Independent, OneHotCategorical

from whichkl.arrays import tensor_of
from whichkl.divergences.exact.law_statistics import DISCRETE, INFINITY, LAWS

MAX_NUMBERS = 5_000
"""Most parameters per law; each costs about a tenth of a millisecond."""
_MIN_DIGITS = 30
_MAX_DIGITS = 400
"""Most digits to begin with: parameters over more powers of ten take seconds."""
_MAX_DOUBLINGS = 5
_MAX_FLOAT = 1.79e308
_TOLERANCE = 1e-17
"""Relative difference between the values of two numbers of digits, at which the second is taken."""


def precise_kl(p: Distribution, q: Distribution) -> float | None:
    """KL(p‖q) = Σ (cₖ − c′ₖ) E_p[Tₖ] in nats, right to the last digit of float64; None for laws that aren't known here.

    The digits are doubled until the value no longer changes, whatever cancels between the terms and inside them.

    >>> from torch.distributions import Gamma
    >>> a, b = (Gamma(torch.tensor(c, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)) for c in (1e12, 1e12 + 1e6))
    >>> precise_kl(a, b)
    0.499999833333...
    """
    ones, others = _parameters(p), _parameters(q)
    if ones is None or others is None or len(ones[1]) != len(others[1]) or p.event_shape != q.event_shape:
        return None
    if len(ones[1]) * max(map(len, (*ones[1], *others[1]))) > MAX_NUMBERS:
        return None
    if ones == others:
        return 0.0
    # This many digits hold sums of squares of any two parameters, such as m² + s²: none can vanish at every precision.
    sizes = [math.log10(abs(v)) for row in (*ones[1], *others[1]) for v in row if v != 0 and math.isfinite(v)]
    digits, previous = _MIN_DIGITS + 2 * math.ceil(max(0.0, *sizes) - min(0.0, *sizes)), None
    if digits > _MAX_DIGITS:
        return None
    for doublings in range(_MAX_DOUBLINGS):
        with mp.workdps(digits * 2**doublings):
            terms: list[Any] = []
            for one, other in zip(ones[1], others[1], strict=True):
                parts = _terms(ones[0], one, others[0], other)
                if parts is None:
                    return None
                terms += parts
            total = mp.fsum(terms)
            if total == INFINITY:
                return INFINITY
            if previous is not None and abs(total - previous) <= abs(total) * _TOLERANCE:
                return float(total) if total < _MAX_FLOAT else None
            previous = total
    return 0.0  # they agree to hundreds of digits: two ways to write one law


def _terms(kind: type, one: tuple[float, ...], other_kind: type, other: tuple[float, ...]) -> list[Any] | None:
    """The terms of one scalar pair: ∞ where p has mass outside q's interval, None where an expectation isn't known."""
    if kind is other_kind and len(one) != len(other):
        return None
    if Cauchy in (kind, other_kind):
        return _cauchy(*one, *other) if kind is other_kind else None
    p, q = LAWS[kind][0](*one), LAWS[other_kind][0](*other)
    if (kind in DISCRETE) != (other_kind in DISCRETE):
        return None
    if p.low < q.low or p.high > q.high:
        return [INFINITY]
    terms: list[Any] = []
    for statistic in dict.fromkeys((*p.coefficients, *q.coefficients)):
        a, b = p.coefficients.get(statistic, 0), q.coefficients.get(statistic, 0)
        if a == b:
            continue
        mean = 1 if statistic == "1" else p.mean_of(statistic)
        if mean is None:
            return None
        if mean == 0:
            continue
        if INFINITY in (abs(a), abs(b), abs(mean)):
            return [INFINITY]
        terms += [a * mean, -b * mean]
    return terms


def _cauchy(m: float, s: float, n: float, t: float) -> list[Any]:
    """log((s + t)² + (m − n)²) − log 4st. Source: Chyzak & Nielsen (2019)."""
    s, t = mp.mpf(s), mp.mpf(t)
    return [mp.log1p(((s - t) ** 2 + (mp.mpf(m) - n) ** 2) / (4 * s * t))]


def _parameters(p: Distribution) -> tuple[type, list[tuple[float, ...]]] | None:
    """The family, and a tuple of parameters for each independent coordinate; the kind of a probability is part of them."""
    base = p.base_dist if isinstance(p, Independent) else p
    if isinstance(base, OneHotCategorical):
        base = base._categorical
    kind = next((one for one in LAWS if isinstance(base, one)), None)
    if kind is None or p.batch_shape != ():
        return None
    given, columns = vars(base), []
    for name in LAWS[kind][1]:
        form = "logits" if name == "probs" and "probs" not in given else name
        value = tensor_of(getattr(base, form)).detach().cpu().to(torch.float64)
        if name == "probs":
            columns.append(torch.full_like(value[..., :1] if kind is Categorical else value, float(form == "logits")))
        columns.append(value)
    if kind in (Categorical, Dirichlet):
        each = torch.cat(columns, -1)
        return kind, [tuple(row) for row in each.reshape(-1, each.shape[-1]).tolist()]
    rows: Tensor = torch.stack([one.expand(base.batch_shape).reshape(-1) for one in columns], 1)
    return kind, [tuple(row) for row in rows.tolist()]
