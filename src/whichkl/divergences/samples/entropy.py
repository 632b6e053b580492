"""Entropy: E[log p] of one sample by nearest neighbours in each column, and among the normal scores of all columns."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from whichkl.divergences.samples.logistic import normal_scores
from whichkl.divergences.samples.neighbors import Rows, entropy_term
from whichkl.divergences.samples.reach import BIAS_FACTOR

_ROOT_OF_ROWS = 10
"""√n from which twice k neighbours are used in one column of several, three times k from 2.5 times as large a √n, and so on."""
_DRAWS = 5
"""Gaussian draws that show what wide balls lose without a shape, and how noisy that is."""
_MAX_ROWS_OF_BLUR = 10_000


def mean_log_density(x: Rows, k: int) -> float:
    """E_p[log p] of rows: that of each column, and what their dependence adds.

    By Sklar (1959) log p(x) is Σⱼ log pⱼ(xⱼ) plus the log density of the ranks. In several columns, balls that hold k rows are so
    wide that skew, tails and ends of supports bias what neighbours show. One column has narrow balls, and normal scores have
    neither skew nor ends: what the balls are too wide for is only the dependence.

    >>> x = np.random.default_rng(0).exponential(size=(2000, 2))
    >>> round(mean_log_density(x, 5), 1)  # the truth is −2
    -2.0
    """
    return _of_columns(x, k) + (_of_dependence(x, k) if x.shape[1] > 1 else 0.0)


def blur(x: Rows, k: int, generator: np.random.Generator) -> float:
    """Bias of `mean_log_density` by balls wider than the shape, such as across an end of the support.

    It is proportional to the radius, which goes as k^(1/d): twice and four times as many neighbours, whose terms have less noise,
    show how large it is. In several columns that's what the rows lose beyond draws of a Gaussian.
    """
    n, dim = x.shape
    if 4 * k >= n:
        return 0.0
    if dim == 1:
        return BIAS_FACTOR * _extrapolated(_loss(_of_columns, x, k), 1)
    some = x[generator.choice(n, min(n, _MAX_ROWS_OF_BLUR), False)]
    draws = [some, *(generator.normal(size=some.shape) for _ in range(_DRAWS))]
    found = 0.0
    for part, of_dimension in ((_of_columns, 1), (_of_dependence, dim)):
        loss, *others = (_loss(part, one, k) for one in draws)
        # The mean square of the noise, which the draws show, is subtracted.
        square = (loss - float(np.mean(others))) ** 2 - (1 + 1 / _DRAWS) * float(np.var(others, ddof=1))
        found += _extrapolated(math.sqrt(max(0.0, square)), of_dimension)
    return BIAS_FACTOR * found


def _loss(part: Callable[[Rows, int], float], x: Rows, k: int) -> float:
    return part(x, 2 * k) - part(x, 4 * k)


def _extrapolated(loss: float, dim: int) -> float:
    """The bias with k neighbours, from what 4 k lose against 2 k."""
    step = math.log(2) / dim
    return abs(loss) / (math.exp(2 * step) - math.exp(step))


def _of_columns(x: Rows, k: int) -> float:
    # The noise of several columns adds up. The bias of one column by wider balls falls as their share of the rows.
    many = k * max(1, round(math.sqrt(len(x)) / _ROOT_OF_ROWS)) if x.shape[1] > 1 else k
    return sum(entropy_term(x[:, j : j + 1], min(many, len(x) - 1)) for j in range(x.shape[1]))


def _of_dependence(x: Rows, k: int) -> float:
    scores = normal_scores(torch.from_numpy(x)).numpy()
    log_normal = -(scores**2).sum(1).mean() / 2 - x.shape[1] * math.log(2 * math.pi) / 2
    return entropy_term(scores, k) - float(log_normal)
