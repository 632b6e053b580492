"""Reach: how much of KL(p‖q) lies beyond the ends of y, where no draw of q shows its density."""

from __future__ import annotations

import math

import numpy as np
import scipy

from whichkl.divergences.samples.neighbors import Radii, Rows

MAX_ERRORS_BEYOND_REACH = 2.0
"""Standard errors of sampling up to which what lies beyond reach widens the interval; more makes an answer unreliable.

The rows at an end show what lies beyond it to a factor of two or three: above two errors it could be most of the interval.
"""
MISSED_SHARE_BEYOND_REACH = 0.7
"""Share of what lies beyond reach that nearest neighbours miss on average, by which their value is raised."""
MAX_BIAS_ERRORS = 1.0
"""Standard errors of sampling up to which a bias of the shape widens the interval; more makes an answer unreliable."""
MAX_SHARE_BEYOND_REACH = 0.3
"""Share of the value up to which what lies beyond reach widens the interval, however many errors it is."""
_MIN_NOTED_ERRORS = 0.1
"""Standard errors from which a note states by how much a value is raised."""
BIAS_FACTOR = 1.5
"""Factor by which a bias may exceed what the rows show of it."""
_END_ROWS, _WIDER_END_ROWS = 15, 60
"""Rows of y beyond an end, and beyond a wider one, which show how fast q falls there; fewer where there are few rows."""
_MIN_ROWS = 50
_MAX_TAIL_ROWS = 60
"""Largest number of rows of x to whose excesses a generalised Pareto distribution is fitted, where the end lies beyond them."""
_SHAPE_ERRORS = 1.0
"""Standard errors by which Pareto's shape is raised: what is missed is convex in it."""
_MIN_ROWS_BEYOND_END = 2
"""Rows beyond the end of the other sample from which a KL may be infinite: one may lie there by an error of the end."""
_CHANCE_OF_GAUSSIAN_SHAPE = 0.05
"""Chance that any of several Gaussian columns has a skewness, or a kurtosis, too far from a Gaussian's to look like one."""
_MAX_SHAPE, _MAX_POWER = 0.9, 50.0
_RANKS = (np.arange(400) + 0.5) / 400


def beyond_reach(x: Rows, y: Rows) -> float:
    """Nats of KL(p‖q) that hide beyond the ends of y: of the worst column, or of the distance from the middle of y.

    Beyond an end of y, p has a share of mass that the rows show, times the KL of both laws there, which they don't. It is the
    larger of two. For tails, p's distance beyond the end is taken to follow a generalised Pareto distribution, and the mass of q
    beyond a distance t from the median to be ½ exp(−(t/s)ᵇ): b is 1 for exponential tails, grows to 2 for Gaussian ones, and is
    less for powers. For ends of supports, with v the rank among the rows of x there, from 0 at the outermost to 1 at the end, p
    is uniform in v and q is taken to be a vᵃ⁻¹, so that the KL is a − 1 − log a.

    Source: Hosking & Wallis (1987) for the fit by probability-weighted moments; Pickands (1975) for its law.

    >>> half = -np.log((np.arange(1000) + 0.5) / 1000)
    >>> y = np.concatenate([half, -half])[:, None]  # quantiles of a Laplace law
    >>> round(beyond_reach(y, y), 2), 0.1 < beyond_reach(3 * y, y) < 1
    (0.0, True)
    """
    found = []
    for beyond in (_beyond_a_tail, _beyond_a_support):
        found += [sum(beyond(sign * a, sign * b) for sign in (1.0, -1.0)) for a, b in zip(x.T, y.T, strict=True)]
        found += [beyond(*distances(x, y))] if x.shape[1] > 1 else []
    return max(found)


def raised_for_reach(x: Rows, y: Rows, sampling: float, value: float) -> tuple[float, float, list[str], list[str]]:
    """Return by how much to raise a KL by nearest neighbours for what lies beyond the ends of y, with error, notes and doubts.

    With u nats beyond, neighbours miss 0.7 u on average, and from nothing to 2 u: the value is raised by 0.7 u, with a standard
    error of u. Beyond 2 errors of `sampling` and 30 % of the value it isn't raised, and the answer isn't reliable.
    """
    unseen = beyond_reach(x, y)
    raised = MISSED_SHARE_BEYOND_REACH * unseen
    if unseen > max(MAX_ERRORS_BEYOND_REACH * sampling, MAX_SHARE_BEYOND_REACH * abs(value)):
        wrong = [f"{unseen:.2g} nats lie beyond the outermost rows of the other sample, where its density can't be seen"]
        return 0.0, unseen, [], wrong
    notes = [f"the value was raised by {raised:.2g} ± {unseen:.2g} for what lies beyond the outermost rows of the other sample"]
    return raised, unseen, notes if raised > _MIN_NOTED_ERRORS * sampling else [], []


def doubt_of_ends(x: Rows, y: Rows) -> list[str]:
    """Say that x goes on where y's support seems to end, so that KL(p‖q) may be infinite; nothing if it doesn't.

    A generalised Pareto distribution of negative shape has an end. Fitted to the outermost rows of a column of y, with its shape
    raised by a standard error, it's the end of y's support, or a tail so steep that it can't be distinguished from an end. A
    column that looks Gaussian has no end.

    >>> half = -np.log((np.arange(1000) + 0.5) / 1000)
    >>> y = np.concatenate([half, -half])[:, None]  # quantiles of a Laplace law
    >>> doubt_of_ends(2 * y, y), bool(doubt_of_ends(y, np.linspace(-3, 3, 500)[:, None]))
    ([], True)
    """
    if min(len(x), len(y)) < _MIN_ROWS:
        return []
    columns = [(a, b) for a, b in zip(x.T, y.T, strict=True) if not looks_gaussian(b[:, None], _errors_of_shape(x.shape[1]))]
    beyond = max((_rows_beyond_end(sign * a, sign * b) for a, b in columns for sign in (1.0, -1.0)), default=0)
    if beyond < _MIN_ROWS_BEYOND_END:
        return []
    return [f"{beyond:,} rows of a sample lie beyond where the other's support seems to end: the divergence may be infinite"]


def largest_shape(values: Radii, x: Rows) -> float:
    """Pareto's shape of the tail of numbers at rows x, raised by its standard error; from ½ on their variance may be infinite.

    It is 0 where x looks Gaussian: draws of heavy tails seldom do, and on Gaussian ones the raised shape is often above ½.
    """
    return 0.0 if looks_gaussian(x, _errors_of_shape(x.shape[1])) else _outermost(values)[1]


def looks_gaussian(x: Rows, errors: float = 4.0) -> bool:
    """Whether no column's skewness or kurtosis differs from a Gaussian's by more than this many standard errors."""
    standard = (x - x.mean(0)) / x.std(0, ddof=1)
    moments = ((standard**3).mean(0), 6.0), ((standard**4).mean(0) - 3, 24.0)
    return not any((np.abs(moment) > errors * math.sqrt(spread / len(x))).any() for moment, spread in moments)


def _errors_of_shape(columns: int) -> float:
    """Standard errors of skewness and kurtosis up to which Gaussian columns look like Gaussian ones."""
    return -float(scipy.special.ndtri(_CHANCE_OF_GAUSSIAN_SHAPE / (2 * columns)))


def _rows_beyond_end(x: Radii, y: Radii) -> int:
    """The number of rows of x beyond the upper end that the outermost rows of y suggest; 0 where they suggest none."""
    threshold, shape, scale = _outermost(y)
    return int((x > max(threshold - scale / shape, y.max())).sum()) if shape < 0 else 0


def _outermost(values: Radii) -> tuple[float, float, float]:
    """Threshold, raised shape (0 if none fits) and scale of the generalised Pareto distribution of the largest numbers."""
    ordered, rows = np.sort(values), min(_MAX_TAIL_ROWS, len(values) // 8)
    threshold = float(ordered[-rows - 1])
    return threshold, *((_pareto(ordered[-rows:] - threshold) if rows > 1 else None) or (0.0, 0.0))


def distances(x: Rows, y: Rows) -> tuple[Radii, Radii]:
    """Mahalanobis distances of both from the middle of y, in its covariance."""
    root = np.linalg.cholesky(np.atleast_2d(np.cov(y.T)))
    of_x, of_y = (np.linalg.norm(np.linalg.solve(root, (part - y.mean(0)).T), axis=0) for part in (x, y))
    return of_x, of_y


def _beyond_a_support(x: Radii, y: Radii) -> float:
    """The same beyond the upper end of one column, as at the end of q's support."""
    if min(len(x), len(y)) < _MIN_ROWS:
        return 0.0
    end = np.sort(y)[-min(_END_ROWS, len(y) // 16) - 1 :]
    above = np.sort(x[x > end[0]])
    if len(above) < len(end):
        return 0.0
    ranks = (len(above) - np.searchsorted(above, end[1:]) + 0.5) / (len(above) + 1)
    power = max(1.0, -1 / min(float(np.log(ranks).mean()), -1e-9))  # below 1, p has no more there than q
    return len(above) / len(x) * (power - 1 - math.log(power))


def _beyond_a_tail(x: Radii, y: Radii) -> float:
    """The same beyond the upper end of one column, as in tails."""
    if min(len(x), len(y)) < _MIN_ROWS:
        return 0.0
    middle, ordered = float(np.median(y)), np.sort(y)
    rows, more_rows = min(_END_ROWS, len(y) // 16), min(_WIDER_END_ROWS, len(y) // 4)
    end, wider_end = (float(ordered[-k - 1]) - middle for k in (rows, more_rows))
    if not 0 < wider_end < end:
        return 0.0
    # −log of twice the mass of q beyond each end, and the power with which it grows.
    hazard, wider = (math.log(len(y) / 2 / (k + 0.5)) for k in (rows, more_rows))
    power = min(math.log(hazard / wider) / math.log(end / wider_end), _MAX_POWER)
    share, shape, scale = _tail(x - middle, end)
    if share == 0 or scale <= 0:
        return 0.0
    excess = scale * (np.expm1(-shape * np.log1p(-_RANKS)) / shape if abs(shape) > 1e-9 else -np.log1p(-_RANKS))
    far = 1 + excess / end
    with np.errstate(over="ignore"):
        log_q = math.log(hazard * power / end) + (power - 1) * np.log(far) - hazard * (far**power - 1)
    return share * max(0.0, -math.log(scale) - (1 + shape) - float(log_q.mean()))


def _tail(x: Radii, end: float) -> tuple[float, float, float]:
    """The share of x beyond an end, and the shape and the scale of the generalised Pareto distribution of what exceeds it."""
    ordered = np.sort(x)
    rows = max(int((x > end).sum()), min(_MAX_TAIL_ROWS, len(x) // 8))
    if rows >= len(x):
        return 0.0, 0.0, 0.0
    threshold = min(float(ordered[-rows - 1]), end)
    fitted = _pareto(ordered[-rows:] - threshold)
    if fitted is None:
        return 0.0, 0.0, 0.0
    shape, scale = fitted
    reached = 1 + shape * (end - threshold) / scale
    if reached <= 0:
        return 0.0, 0.0, 0.0
    beyond = reached ** (-1 / shape) if abs(shape) > 1e-9 else math.exp(-(end - threshold) / scale)
    return rows / len(x) * beyond, shape, scale + shape * (end - threshold)


def _pareto(excess: Radii) -> tuple[float, float] | None:
    """Shape, raised by its error, and scale of the generalised Pareto distribution of sorted excesses; None where none fits."""
    rows = len(excess)
    mean, weighted = float(excess.mean()), float((excess * np.arange(rows - 1, -1, -1)).mean()) / (rows - 1)
    if mean <= 2 * weighted:
        return None
    shape, scale = 2 - mean / (mean - 2 * weighted), 2 * mean * weighted / (mean - 2 * weighted)
    return min(shape + _SHAPE_ERRORS * (1 + max(shape, 0.0)) / math.sqrt(rows), _MAX_SHAPE), scale
