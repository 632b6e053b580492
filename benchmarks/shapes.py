"""Pairs of laws that aren't Gaussian: tails, skew, ends of supports, bumps and mixtures in 1, 2 and 5 dimensions, with their KLs.

A truth is a quadrature, or the mean over two million draws.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import integrate, stats

DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys", "jensen_shannon", "total_variation")
_DRAWS = 500_000
_ROUNDS = 4


@dataclass(frozen=True)
class Columns:
    """Independent columns, turned by a matrix if there is one."""

    margins: tuple[Any, ...]
    turn: Any = None

    def sample(self, n, rng):
        """Draws, (n, d)."""
        x = np.column_stack([one.rvs(n, random_state=rng) for one in self.margins])
        return x if self.turn is None else x @ np.asarray(self.turn).T

    def log_prob(self, x):
        """Log densities, (n,)."""
        if self.turn is None:
            return sum(one.logpdf(column) for one, column in zip(self.margins, x.T, strict=True))
        turn = np.asarray(self.turn)
        return Columns(self.margins).log_prob(np.linalg.solve(turn, x.T).T) - np.linalg.slogdet(turn)[1]


@dataclass(frozen=True)
class Joint:
    """A law of scipy with dependent columns."""

    law: Any

    def sample(self, n, rng):
        """Draws, (n, d)."""
        return self.law.rvs(n, random_state=rng).reshape(n, -1)

    def log_prob(self, x):
        """Log densities, (n,)."""
        return np.atleast_1d(self.law.logpdf(x))


@dataclass(frozen=True)
class Bumps:
    """A mixture of laws."""

    weights: tuple[float, ...]
    parts: tuple[Any, ...]

    def sample(self, n, rng):
        """Draws, (n, d)."""
        counts = rng.multinomial(n, self.weights)
        rows = np.concatenate([part.sample(count, rng) for part, count in zip(self.parts, counts, strict=True) if count])
        return rng.permutation(rows)

    def log_prob(self, x):
        """Log densities, (n,)."""
        terms = [math.log(weight) + part.log_prob(x) for weight, part in zip(self.weights, self.parts, strict=True)]
        return np.logaddexp.reduce(terms)


@dataclass(frozen=True)
class Banana:
    """N(0, I) with its second column bent by the square of the first."""

    bend: float

    def sample(self, n, rng):
        """Draws, (n, d)."""
        x = rng.normal(size=(n, 2))
        x[:, 1] += self.bend * (x[:, 0] ** 2 - 1)
        return x

    def log_prob(self, x):
        """Log densities, (n,)."""
        return stats.norm.logpdf(x[:, 0]) + stats.norm.logpdf(x[:, 1] - self.bend * (x[:, 0] ** 2 - 1))


def line(*margins, turn=None):
    return Columns(margins, turn)


def bumps(*weights_and_parts):
    return Bumps(weights_and_parts[::2], tuple(line(stats.norm(*one)) for one in weights_and_parts[1::2]))


def gaussian(mean, covariance):
    return Joint(stats.multivariate_normal(mean, covariance))


def corners(weights, dim, scale, distance):
    """Gaussian bumps at the first corners of a simplex, `distance` from the middle."""
    return Bumps(weights, tuple(gaussian(distance * row, scale**2 * np.eye(dim)) for row in np.eye(dim)[: len(weights)]))


def bank():
    """Name → (kind, p, q)."""
    s, normal = stats, stats.norm
    ar = 0.6 ** np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    mixed = np.array([[1.0, 0.8], [0.0, 0.6]])
    return {
        "laplace | normal": ("tails", line(s.laplace()), line(normal())),
        "laplace | normal of its variance": ("tails", line(s.laplace()), line(normal(0, math.sqrt(2)))),
        "t5 | N(0, 1.2)": ("tails", line(s.t(5)), line(normal(0, 1.2))),
        "t3 | t6": ("tails", line(s.t(3)), line(s.t(6))),
        "logistic | N(0, 1.8)": ("tails", line(s.logistic()), line(normal(0, 1.8))),
        "N(0, 1.5) | laplace": ("tails", line(normal(0, 1.5)), line(s.laplace())),
        "laplace(0.5) | laplace": ("tails", line(s.laplace(0.5)), line(s.laplace())),
        "N(1, 1) | normal": ("tails", line(normal(1)), line(normal())),
        "normal | N(0, 2)": ("tails", line(normal()), line(normal(0, 2))),
        "gumbel | N(0.58, 1.28)": ("skew", line(s.gumbel_r()), line(normal(0.577, 1.283))),
        "skew normal | normal": ("skew", line(s.skewnorm(4)), line(normal(0.7, 0.8))),
        "gamma(3) | lognormal": ("skew", line(s.gamma(3)), line(s.lognorm(0.6, 0, 2.5))),
        "lognormal | gamma(4)": ("skew", line(s.lognorm(0.5)), line(s.gamma(4, 0, 0.28))),
        "gamma(4) | normal": ("skew", line(s.gamma(4)), line(normal(4, 2))),
        "exponential | gamma(2)": ("ends", line(s.expon()), line(s.gamma(2))),
        "gamma(3) | gamma(2)": ("ends", line(s.gamma(3)), line(s.gamma(2))),
        "uniform | beta(2, 2)": ("ends", line(s.uniform()), line(s.beta(2, 2))),
        "beta(2, 5) | beta(3, 3)": ("ends", line(s.beta(2, 5)), line(s.beta(3, 3))),
        "exponential | half normal": ("ends", line(s.expon()), line(s.halfnorm(0, 1.3))),
        "uniform | triangle": ("ends", line(s.uniform(0, 2)), line(s.triang(0.3, 0, 2))),
        "bump aside | normal": ("bumps", bumps(0.8, (0, 1), 0.2, (3, 0.4)), line(normal(0.6, 1.5))),
        "two bumps, other weights": ("mixtures", bumps(0.7, (-2, 0.5), 0.3, (2, 0.5)), bumps(0.4, (-2, 0.5), 0.6, (2, 0.5))),
        "normal | two bumps": ("bumps", line(normal(0, 1.2)), bumps(0.5, (-1, 0.7), 0.5, (1, 0.7))),
        "three bumps | wider ones": (
            "mixtures",
            bumps(0.3, (-3, 0.6), 0.4, (0, 0.6), 0.3, (3, 0.6)),
            bumps(0.3, (-3, 0.9), 0.4, (0, 0.9), 0.3, (3, 0.9)),
        ),
        "2: laplace | normal of its variance": ("tails", line(s.laplace(), s.laplace()), line(normal(0, 1.41), normal(0, 1.41))),
        "2: t5 | N(0, 1.2)": ("tails", Joint(s.multivariate_t([0, 0], np.eye(2), 5)), gaussian([0, 0], 1.44 * np.eye(2))),
        "2: gamma(4) | gamma(3), turned": (
            "skew",
            line(s.gamma(4), s.gamma(4), turn=mixed),
            line(s.gamma(3), s.gamma(3), turn=mixed),
        ),
        "2: uniform | beta(2, 2)": ("ends", line(s.uniform(), s.uniform()), line(s.beta(2, 2), s.beta(2, 2))),
        "2: exponential | gamma(2), normal": ("ends", line(s.expon(), normal()), line(s.gamma(2), normal(0.3))),
        "2: banana | normal": ("bumps", Banana(0.5), gaussian([0, 0], np.diag([1.0, 1.5]))),
        "2: bumps, other weights": ("mixtures", corners((0.7, 0.3), 2, 0.7, 2.0), corners((0.4, 0.6), 2, 0.7, 2.0)),
        "2: bumps | normal": ("bumps", corners((0.5, 0.5), 2, 0.7, 2.0), gaussian([1, 1], np.array([[1.5, -1.0], [-1.0, 1.5]]))),
        "5: laplace | normal of its variance": ("tails", line(*[s.laplace()] * 5), line(*[normal(0, 1.41)] * 5)),
        "5: t8 | normal": ("tails", Joint(s.multivariate_t(np.zeros(5), ar, 8)), gaussian(np.full(5, 0.2), 1.2 * ar)),
        "5: gamma(5) | gamma(4)": ("skew", line(*[s.gamma(5)] * 5), line(*[s.gamma(4)] * 5)),
        "5: N(0.3, 0.9) | normal": ("tails", gaussian(np.full(5, 0.3), 0.81 * ar), gaussian(np.zeros(5), ar)),
        "5: exponential | gamma(2), normal": ("ends", line(s.expon(), *[normal()] * 4), line(s.gamma(2), *[normal(0.2)] * 4)),
        "5: bumps, other weights": ("mixtures", corners((0.7, 0.3), 5, 0.7, 2.0), corners((0.4, 0.6), 5, 0.7, 2.0)),
    }


PAIRS = bank()


@cache
def truths(name):
    """All the divergences of a pair."""
    _, p, q = PAIRS[name]
    if getattr(p, "margins", None) is not None and getattr(q, "margins", None) is not None:
        forward, reverse = (
            sum(_on_the_line(a, b) for a, b in zip(one.margins, two.margins, strict=True)) for one, two in ((p, q), (q, p))
        )
    else:
        forward, reverse = _mean(p, lambda x: p.log_prob(x) - q.log_prob(x)), _mean(q, lambda x: q.log_prob(x) - p.log_prob(x))

    def half(x, one, two):
        return math.log(2) - np.logaddexp(0, two.log_prob(x) - one.log_prob(x))

    shannon = 0.5 * _mean(p, lambda x: half(x, p, q)) + 0.5 * _mean(q, lambda x: half(x, q, p))
    variation = _mean(p, lambda x: np.maximum(0, 1 - np.exp(np.minimum(q.log_prob(x) - p.log_prob(x), 0))))
    return dict(zip(DIVERGENCES, (forward, reverse, (forward + reverse) / 2, shannon, variation), strict=True))


def _mean(law, function):
    rng = np.random.default_rng(1)
    with np.errstate(all="ignore"):
        return float(np.mean([function(law.sample(_DRAWS, rng)).mean() for _ in range(_ROUNDS)]))


def _on_the_line(p, q):
    """KL of two laws of scipy, by quadrature between quantiles of p."""
    ends = p.ppf(np.array([1e-14, 1e-6, 1e-3, 0.05, 0.3, 0.5, 0.7, 0.95])), p.isf(np.array([1e-3, 1e-6, 1e-14]))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not np.isfinite(q.logpdf(np.concatenate(ends))).all():
            return math.inf
        pieces = np.concatenate(ends)
        return sum(
            integrate.quad(lambda x: math.exp(p.logpdf(x)) * (p.logpdf(x) - q.logpdf(x)), a, b, epsabs=1e-10)[0]
            for a, b in zip(pieces, pieces[1:], strict=False)
        )
