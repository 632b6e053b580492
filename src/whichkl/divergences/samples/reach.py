"""Reach: how much of KL(p‖q) lies beyond the ends of y, where no draw of q shows its density."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from whichkl.divergences.samples.neighbors import Rows

_END_ROWS = 10
"""Rows of y beyond which an end begins: few enough for an end, enough to see how fast q falls there."""
MAX_ERRORS_BEYOND_REACH = 1.5
"""Standard errors that may hide beyond reach: they widen the interval, and more can't be made up for by that."""


def beyond_reach(x: Rows, y: Rows) -> float:
    """Nats of KL(p‖q) that hide beyond the ends of y: of the worst column, or of the distance from the middle of y.

    KL is that of the shares beyond an end, which the rows show, plus the share of p there times the KL of the two laws there,
    which they don't. With v the rank among the rows of x there, from 0 at the outermost to 1 at the end, p is uniform in v. q is
    taken to be a vᵃ⁻¹, which holds for exponential tails and for powers at the end of a support, so that the latter KL is
    a − 1 − log a.

    >>> ranks = (np.arange(2000) + 0.5) / 2000
    >>> x, y = ranks[:, None], np.sqrt(ranks)[:, None]  # the density of q is 2 x: a = 2 at 0, where 7 % of p lie
    >>> round(beyond_reach(x, y) / (0.07 * (1 - math.log(2))), 1)
    1.0
    """
    ends = sum((_beyond_an_end(sign * x, sign * y) for sign in (1.0, -1.0)), np.zeros(x.shape[1]))
    if x.shape[1] == 1:
        return float(ends[0])
    root = np.linalg.cholesky(np.cov(y.T))
    radius = [np.linalg.norm(np.linalg.solve(root, (part - y.mean(0)).T), axis=0)[:, None] for part in (x, y)]
    return float(max(ends.max(), _beyond_an_end(*radius)[0]))


def _beyond_an_end(x: Rows, y: Rows) -> Float[np.ndarray, " d"]:
    """The same beyond the upper end of y, column by column."""
    hidden = np.zeros(x.shape[1])
    for j, (a, b) in enumerate(zip(x.T, y.T, strict=True)):
        outer = np.sort(b)[-_END_ROWS - 1 :]
        above = np.sort(a[a > outer[0]])
        if len(above) <= _END_ROWS or len(outer) <= _END_ROWS:  # where p has no more than q, nothing of p's is out of reach
            continue
        ranks = (len(above) - np.searchsorted(above, outer[1:]) + 0.5) / (len(above) + 1)
        power = -1 / float(np.log(ranks).mean())
        hidden[j] = len(above) / len(a) * (power - 1 - math.log(power)) if power > 1 else 0.0
    return hidden
