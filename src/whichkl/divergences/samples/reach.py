"""Reach: how much of KL(p‖q) lies beyond the ends of y, where no draw of q shows its density."""

from __future__ import annotations

import math

import numpy as np

from whichkl.divergences.samples.neighbors import Radii, Rows

MAX_UNSEEN_ERRORS = 1.3
"""Standard errors of sampling that an unseen bias may reach; it widens the interval, which can't make up for more."""
UNSEEN_BIAS_FACTOR = 1.5
"""Factor by which a bias may exceed what the rows show of it: what hides beyond reach has an error of about half."""
_END_ROWS, _WIDER_END_ROWS = 15, 60
"""Rows of y beyond an end, which show how fast q falls there, and beyond a wider one, which show how that changes."""


def beyond_reach(x: Rows, y: Rows) -> float:
    """Nats of KL(p‖q) that hide beyond the ends of y: of the worst column, or of the distance from the middle of y.

    KL is that of the shares beyond an end, which the rows show, plus the share of p there times the KL of the two laws there,
    which they don't. With v the rank among the rows of x there, from 0 at the outermost to 1 at the end, p is uniform in v. q is
    taken to be a vᵃ⁻¹, which holds for exponential tails and for powers at the end of a support, so that the latter KL is
    a − 1 − log a. Where a grows towards the end, as for a Gaussian q, it is extrapolated from the rows of y to those of x.

    >>> ranks = (np.arange(2000) + 0.5) / 2000
    >>> x, y = ranks[:, None], np.sqrt(ranks)[:, None]  # the density of q is 2 x: a = 2 at 0, where 9 % of p lie
    >>> round(beyond_reach(x, y) / (0.09 * (1 - math.log(2))), 1)
    1.0
    """
    ends = max(sum(_beyond_an_end(sign * a, sign * b) for sign in (1.0, -1.0)) for a, b in zip(x.T, y.T, strict=True))
    return ends if x.shape[1] == 1 else max(ends, _beyond_an_end(*distances(x, y)))


def distances(x: Rows, y: Rows) -> tuple[Radii, Radii]:
    """Mahalanobis distances of both from the middle of y, in its covariance."""
    root = np.linalg.cholesky(np.atleast_2d(np.cov(y.T)))
    of_x, of_y = (np.linalg.norm(np.linalg.solve(root, (part - y.mean(0)).T), axis=0) for part in (x, y))
    return of_x, of_y


def _beyond_an_end(x: Radii, y: Radii) -> float:
    """The same beyond the upper end of one column."""
    ordered = np.sort(y)
    if len(y) <= _WIDER_END_ROWS:
        return 0.0
    (power, rows), (wider_power, more_rows) = (_power(x, ordered[-k - 1 :]) for k in (_END_ROWS, _WIDER_END_ROWS))
    if rows <= _END_ROWS or power <= 1:  # p has no more there than q
        return 0.0
    # The rows of y lie at −log v = 1/a on average, those of x at 1.
    growth = max(0.0, power - wider_power) / max(math.log(more_rows / rows), 1.0)
    power += growth * (1 - 1 / power)
    return rows / len(x) * (power - 1 - math.log(power))


def _power(x: Radii, end: Radii) -> tuple[float, int]:
    """The power a beyond the first number of `end`, whose others are rows of y, and how many rows of x lie there."""
    above = np.sort(x[x > end[0]])
    ranks = (len(above) - np.searchsorted(above, end[1:]) + 0.5) / (len(above) + 1)
    return -1 / min(float(np.log(ranks).mean()), -1e-9), len(above)
