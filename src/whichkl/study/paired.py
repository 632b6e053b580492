"""Paired tests: whether one arm is better than another over the same seeds, by the t test and by flipping signs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

Array = npt.NDArray[np.float64]
MIN_PAIRS = 6
"""Pairs below which no test is made: flipping five signs can't give a p-value below 1/16, whatever the differences."""
_MAX_EXACT_PAIRS = 12
_RANDOM_FLIPS = 4_095


@dataclass(frozen=True)
class PairedDifferences:
    """Means of paired differences with their standard errors and t tests; columns are comparisons."""

    pairs: npt.NDArray[np.int64]
    mean: Array
    stderr: Array
    p: Array
    """p-values of the two-sided paired t test; NaN where there are fewer pairs than `MIN_PAIRS`."""


def paired(differences: Array) -> PairedDifferences:
    """Test each column of differences against 0 by Student's paired t test.

    In a column with an infinite difference all differences count by their sign alone: +∞ in most seeds is a mean of +∞.

    Args:
        differences: a row per seed, a column per comparison; NaN where a side has no value.

    >>> import numpy as np
    >>> found = paired(np.array([[1.0, 0.1], [1.2, -0.1], [0.9, 0.2], [1.1, -0.2], [1.0, 0.3], [0.8, -0.3]]))
    >>> found.p.round(4).tolist(), found.mean.round(4).tolist()
    ([0.0, 1.0], [1.0, 0.0])
    """
    known = ~np.isnan(differences)
    pairs = known.sum(0)
    tested, infinite = _tested(differences)
    some = np.maximum(pairs, 1)
    mean = np.where(known, tested, 0.0).sum(0) / some
    squares = np.where(known, (tested - mean) ** 2, 0.0).sum(0)
    stderr = np.sqrt(squares / np.maximum(pairs - 1, 1) / some)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(stderr > 1e-13 * np.abs(mean), np.abs(mean) / stderr, np.where(mean == 0, 0.0, np.inf))
    p = np.where(pairs >= MIN_PAIRS, 2 * scipy.special.stdtr(np.maximum(pairs - 1, 1), -t), np.nan)
    shown = np.where(infinite & (mean != 0), np.copysign(np.inf, mean), mean)
    return PairedDifferences(pairs, shown, np.where(infinite, np.inf, stderr), p)


def half_width(stderr: float, pairs: int, level: float) -> float:
    """Half of the (1 − level) interval of a mean."""
    return -float(scipy.special.stdtrit(pairs - 1, level / 2)) * stderr if pairs > 1 else float("inf")


def sign_flip(differences: Array) -> float:
    """p-value of a mean of paired differences under flips of their signs, which is exact where they are symmetric about 0.

    All flips up to twelve pairs, else 4,095 at random (the same in every run) and the one observed.

    Source: Fisher (1935), The Design of Experiments, §21.

    >>> import numpy as np
    >>> sign_flip(np.arange(1.0, 7.0))
    0.03125
    """
    d = _tested(differences[~np.isnan(differences)][:, None])[0][:, 0]
    n = len(d)
    if n == 0 or not d.any():
        return 1.0
    if n <= _MAX_EXACT_PAIRS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        random = np.random.default_rng(n).integers(0, 2, (_RANDOM_FLIPS, n))
        signs = np.concatenate([np.ones((1, n)), 1.0 - 2.0 * random])
    means = np.abs(signs @ d)
    return float((means >= abs(d.sum()) * (1 - 1e-12)).mean())


def holm(p: Array) -> Array:
    """Adjust p-values so that the chance of any false one is as stated; NaN, which wasn't tested, stays.

    Source: Holm (1979).

    >>> import numpy as np
    >>> holm(np.array([0.01, 0.04, np.nan, 0.03])).round(4).tolist()
    [0.03, 0.06, nan, 0.06]
    """
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted


def _tested(differences: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    """The differences, or in columns with an infinite one their signs."""
    infinite = np.asarray(np.isinf(differences).any(0))
    return np.where(infinite, np.sign(differences), differences), infinite
