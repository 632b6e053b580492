"""Bands: the range of the whole distribution function of n uniform numbers, and the test that one has left it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy

LEVELS = 100
"""The distribution function is compared at k/100."""
_SIMULATED_CURVES = 2_000


def levels() -> np.ndarray:
    """Return 0.01, 0.02, …, 0.99."""
    return np.arange(1, LEVELS) / LEVELS


@lru_cache(maxsize=64)
def band(n: int, chance: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the lower and upper ends at every level that hold the whole curve with this chance.

    The ends are binomial quantiles with one tail for all levels, which is set on simulated curves. So the band is narrow at both
    ends, where that of Kolmogorov and Smirnov is as wide as in the middle.

    Args:
        n: number of uniform numbers.
        chance: chance that the whole curve is inside, such as 0.95.

    Source: Säilynoja, Bürkner & Vehtari (2022), section 2.2.

    >>> low, high = band(100, 0.95)
    >>> round(low[49], 2), round(high[49], 2)
    (0.36, 0.64)
    """
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(LEVELS, 1 / LEVELS), size=_SIMULATED_CURVES).cumsum(1)[:, :-1]
    z = levels()
    below, above = scipy.stats.binom.cdf(counts, n, z), scipy.stats.binom.sf(counts - 1, n, z)
    tail = float(np.quantile(2 * np.minimum(below, above).min(1), 1 - chance))
    low, high = scipy.stats.binom.ppf(tail / 2, n, z) / n, scipy.stats.binom.isf(tail / 2, n, z) / n
    return tuple(low.tolist()), tuple(high.tolist())


def distance(u: np.ndarray) -> float:
    """Return Kolmogorov and Smirnov's distance from uniform: the largest gap of the distribution functions."""
    u = np.sort(u)
    n = len(u)
    return float(max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max()))


def distance_p_value(d: float, n: float) -> float:
    """Return the chance of this distance or a larger one for n uniform numbers."""
    return float(scipy.stats.kstwo.sf(d, max(1, round(n))))
