"""Law statistics: laws as log p(x) = Σ cₖ Tₖ(x), with the expectations of the Tₖ, in mpmath's numbers of any precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import mpmath as mp
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    ContinuousBernoulli,
    Dirichlet,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfNormal,
    Laplace,
    NegativeBinomial,
    Normal,
    Pareto,
    Poisson,
    Uniform,
    VonMises,
    Weibull,
)

INFINITY = math.inf
Statistic = Any


class Law(NamedTuple):
    """A law with log p(x) = Σ cₖ Tₖ(x) on an interval, and E[Tₖ] where it's known, in mpmath's numbers.

    The statistics Tₖ are "1", "x", "x²", "log x", "log(1−x)", ("exp", s) for exp(−x/s), ("abs", m) for |x − m|, ("power", k) for
    xᵏ, and what only one family has.
    """

    coefficients: Mapping[Statistic, Any]
    mean_of: Callable[[Statistic], Any]
    low: Any = -INFINITY
    high: Any = INFINITY


def _normal(m: Any, s: Any) -> Law:
    m, s = mp.mpf(m), mp.mpf(s)

    def mean_of(statistic: Any) -> Any:
        if statistic[0] == "exp":
            return mp.exp(-m / statistic[1] + s**2 / (2 * statistic[1] ** 2))
        if statistic[0] == "abs":
            d = m - statistic[1]
            return s * mp.sqrt(2 / mp.pi) * mp.exp(-(d**2) / (2 * s**2)) + d * mp.erf(d / (s * mp.sqrt(2)))
        return {"x": m, "x²": m**2 + s**2}.get(statistic)

    constant = -(m**2) / (2 * s**2) - mp.log(2 * mp.pi * s**2) / 2
    return Law({"1": constant, "x": m / s**2, "x²": -1 / (2 * s**2)}, mean_of)


def _half_normal(s: Any) -> Law:
    s = mp.mpf(s)
    known = {"x": s * mp.sqrt(2 / mp.pi), "x²": s**2, "log x": mp.log(s) + (mp.digamma(mp.mpf(1) / 2) + mp.log(2)) / 2}
    return Law({"1": mp.log(2 / (mp.pi * s**2)) / 2, "x²": -1 / (2 * s**2)}, known.get, low=0)


def _laplace(m: Any, b: Any) -> Law:
    m, b = mp.mpf(m), mp.mpf(b)

    def mean_of(statistic: Any) -> Any:
        if statistic[0] == "abs":
            d = abs(m - statistic[1])
            return d + b * mp.exp(-d / b)
        return {"x": m, "x²": m**2 + 2 * b**2}.get(statistic)

    return Law({"1": -mp.log(2 * b), ("abs", m): -1 / b}, mean_of)


def _gamma(a: Any, rate: Any) -> Law:
    a, rate = mp.mpf(a), mp.mpf(rate)

    def mean_of(statistic: Any) -> Any:
        if statistic == "log x":
            return mp.digamma(a) - mp.log(rate)
        if statistic[0] == "exp":
            return (1 + 1 / (rate * statistic[1])) ** -a
        if statistic[0] == "power":
            return mp.exp(mp.loggamma(a + statistic[1]) - mp.loggamma(a) - statistic[1] * mp.log(rate))
        return {"x": a / rate, "x²": a * (a + 1) / rate**2}.get(statistic)

    return Law({"1": a * mp.log(rate) - mp.loggamma(a), "x": -rate, "log x": a - 1}, mean_of, low=0)


def _beta(a: Any, b: Any) -> Law:
    a, b = mp.mpf(a), mp.mpf(b)

    def mean_of(statistic: Any) -> Any:
        if statistic in ("log x", "log(1−x)"):
            return mp.digamma(a if statistic == "log x" else b) - mp.digamma(a + b)
        return {"x": a / (a + b), "x²": a * (a + 1) / ((a + b) * (a + b + 1))}.get(statistic)

    constant = mp.loggamma(a + b) - mp.loggamma(a) - mp.loggamma(b)
    return Law({"1": constant, "log x": a - 1, "log(1−x)": b - 1}, mean_of, 0, 1)


def _uniform(low: Any, high: Any) -> Law:
    low, high = mp.mpf(low), mp.mpf(high)

    def log_mean(a: Any, b: Any) -> Any:
        """Mean of log x over (a, b), or None below 0."""
        whole = [x * mp.log(x) if x > 0 else 0 for x in (a, b)]
        return (whole[1] - whole[0]) / (b - a) - 1 if a >= 0 else None

    def mean_of(statistic: Any) -> Any:
        if statistic in ("log x", "log(1−x)"):
            return log_mean(low, high) if statistic == "log x" else log_mean(1 - high, 1 - low)
        if statistic[0] == "exp":
            s = statistic[1]
            return s * (mp.exp(-low / s) - mp.exp(-high / s)) / (high - low)
        if statistic[0] == "abs":
            a, b = low - statistic[1], high - statistic[1]
            return (b * abs(b) - a * abs(a)) / (2 * (high - low))
        return {"x": (low + high) / 2, "x²": (low**2 + low * high + high**2) / 3}.get(statistic)

    return Law({"1": -mp.log(high - low)}, mean_of, low, high)


def _continuous_bernoulli(is_logit: Any, number: Any) -> Law:
    """Log p(x) = x t + log(t / (eᵗ − 1)), t the logit."""
    t = mp.mpf(number) if is_logit else mp.log(number) - mp.log1p(-mp.mpf(number))
    if t == 0:
        return _uniform(0, 1)
    end = -1 / mp.expm1(-t)
    known = {"x": end - 1 / t, "x²": (1 - 2 / t) * end + 2 / t**2}
    return Law({"1": mp.log(t / mp.expm1(t)), "x": t}, known.get, 0, 1)


def _pareto(scale: Any, a: Any) -> Law:
    scale, a = mp.mpf(scale), mp.mpf(a)
    first = a * scale / (a - 1) if a > 1 else INFINITY
    second = a * scale**2 / (a - 2) if a > 2 else INFINITY
    known = {"x": first, "x²": second, "log x": mp.log(scale) + 1 / a}
    return Law({"1": mp.log(a) + a * mp.log(scale), "log x": -a - 1}, known.get, low=scale)


def _gumbel(m: Any, s: Any) -> Law:
    m, s = mp.mpf(m), mp.mpf(s)
    mean = m + s * mp.euler

    def mean_of(statistic: Any) -> Any:
        if statistic[0] == "exp":
            return mp.exp(-m / statistic[1] + mp.loggamma(1 + s / statistic[1]))
        return {"x": mean, "x²": mean**2 + (mp.pi * s) ** 2 / 6}.get(statistic)

    return Law({"1": m / s - mp.log(s), "x": -1 / s, ("exp", s): -mp.exp(m / s)}, mean_of)


def _weibull(scale: Any, k: Any) -> Law:
    scale, k = mp.mpf(scale), mp.mpf(k)

    def mean_of(statistic: Any) -> Any:
        if statistic == "log x":
            return mp.log(scale) - mp.euler / k
        power = statistic[1] if statistic[0] == "power" else {"x": 1, "x²": 2}.get(statistic)
        return None if power is None else scale**power * mp.gamma(1 + power / k)

    return Law({"1": mp.log(k) - k * mp.log(scale), "log x": k - 1, ("power", k): -(scale**-k)}, mean_of, low=0)


def _von_mises(m: Any, k: Any) -> Law:
    m, k = mp.mpf(m), mp.mpf(k)
    bessel = mp.besseli(0, k)
    length = mp.besseli(1, k) / bessel
    known = {"cos": length * mp.cos(m), "sin": length * mp.sin(m)}
    return Law({"1": -mp.log(2 * mp.pi * bessel), "cos": k * mp.cos(m), "sin": k * mp.sin(m)}, known.get)


def _chances(is_logit: Any, number: Any) -> tuple[Any, Any, Any]:
    """A probability and the logs of it and of its complement."""
    if is_logit:
        yes, no = -mp.log1p(mp.exp(-mp.mpf(number))), -mp.log1p(mp.exp(mp.mpf(number)))
        return mp.exp(yes), yes, no
    chance = mp.mpf(number)
    return chance, mp.log(chance) if chance > 0 else -INFINITY, mp.log1p(-chance) if chance < 1 else -INFINITY


def _binomial(is_logit: Any, number: Any, n: Any = 1) -> Law:
    """Log p(x) = x log π + (n − x) log(1 − π) and the log of the number of ways, which is 0 for n = 1, as log x! is."""
    chance, yes, no = _chances(is_logit, number)
    known = {"yes": n * chance, "no": n * (1 - chance), "x": n * chance} | ({"x!": 0} if n == 1 else {})
    return Law({"yes": yes, "no": no} | ({} if n == 1 else {("ways", n): 1}), known.get, 0, n)


def _geometric(is_logit: Any, number: Any) -> Law:
    chance, yes, no = _chances(is_logit, number)
    return Law({"1": yes, "x": no}, {"x": (1 - chance) / chance}.get, low=0)


def _negative_binomial(is_logit: Any, number: Any, n: Any) -> Law:
    chance, yes, no = _chances(is_logit, number)
    mean = mp.mpf(n) * chance / (1 - chance) if chance < 1 else INFINITY
    return Law({"1": mp.mpf(n) * no, "x": yes, ("ways", n): 1}, {"x": mean}.get, low=0)


def _poisson(rate: Any) -> Law:
    rate = mp.mpf(rate)
    return Law({"1": -rate, "x": mp.log(rate) if rate > 0 else -INFINITY, "x!": -1}, {"x": rate}.get, low=0)


def _categorical(is_logit: Any, *numbers: Any) -> Law:
    logs = [mp.mpf(one) if is_logit else mp.log(one) if one > 0 else -INFINITY for one in numbers]
    log_total = mp.log(mp.fsum(mp.exp(one) for one in logs))
    logs = [one - log_total for one in logs]
    known = {("atom", i): mp.exp(one) for i, one in enumerate(logs)}
    return Law({("atom", i): one for i, one in enumerate(logs)}, known.get)


def _dirichlet(*a: Any) -> Law:
    each = [mp.mpf(one) for one in a]
    total = mp.fsum(each)
    middle = mp.digamma(total)
    constant = mp.loggamma(total) - mp.fsum(mp.loggamma(one) for one in each)
    return Law(
        {"1": constant} | {("log x", i): one - 1 for i, one in enumerate(each)},
        lambda statistic: mp.digamma(each[statistic[1]]) - middle,
    )


LAWS: dict[type, tuple[Callable[..., Law], tuple[str, ...]]] = {
    Bernoulli: (_binomial, ("probs",)),
    Beta: (_beta, ("concentration1", "concentration0")),
    Binomial: (_binomial, ("probs", "total_count")),
    Categorical: (_categorical, ("probs",)),
    Cauchy: (_normal, ("loc", "scale")),
    ContinuousBernoulli: (_continuous_bernoulli, ("probs",)),
    Dirichlet: (_dirichlet, ("concentration",)),
    Exponential: (partial(_gamma, 1), ("rate",)),
    Gamma: (_gamma, ("concentration", "rate")),
    Geometric: (_geometric, ("probs",)),
    Gumbel: (_gumbel, ("loc", "scale")),
    HalfNormal: (_half_normal, ("scale",)),
    Laplace: (_laplace, ("loc", "scale")),
    NegativeBinomial: (_negative_binomial, ("probs", "total_count")),
    Normal: (_normal, ("loc", "scale")),
    Pareto: (_pareto, ("scale", "alpha")),
    Poisson: (_poisson, ("rate",)),
    Uniform: (_uniform, ("low", "high")),
    VonMises: (_von_mises, ("loc", "concentration")),
    Weibull: (_weibull, ("scale", "concentration")),
}
"""How each law is built, and the names of its parameters in torch; Cauchy laws have no statistics, only their names here."""
DISCRETE = (Bernoulli, Binomial, Categorical, Geometric, NegativeBinomial, Poisson)
