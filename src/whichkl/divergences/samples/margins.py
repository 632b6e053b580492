"""Margins: KL of few columns alone, which bounds that of all from below, whatever the shape of the laws."""

from __future__ import annotations

import itertools
import math

import numpy as np

from whichkl.divergences.samples.neighbor_terms import Samples, finite, terms_of

_NEIGHBORS = 5
_ROWS_OF_SEARCH = 1_000
_MAX_ROWS = 20_000
_MAX_PAIRS = 66
_ERROR_FACTOR = 1.3
"""Terms of neighbours share rows: their mean is this much less certain than that of independent ones."""


def hidden(x: Samples, y: Samples, upper: float, seed: int = 0) -> list[str]:
    """Report a column, or a pair of columns, with a larger KL than the upper end of an interval for all.

    By the data-processing inequality no margin has more. The margin with the largest bound on 1,000 rows is checked on up to
    20,000 rows.

    Args:
        x: rows of p, (n, d).
        y: rows of q, (m, d).
        upper: the upper end of the interval.
        seed: of the rows chosen.

    Source: Cover & Thomas (2006), section 2.8.

    >>> rng = np.random.default_rng(0)
    >>> y = rng.normal(size=(2000, 3))
    >>> x = np.column_stack([np.sign(y[:1000, 0]) + 0.1 * y[1000:, 0], y[:1000, 1:]])
    >>> hidden(x, y, 0.5)[0].startswith("column 1 alone")
    True
    """
    dim, generator = x.shape[1], np.random.default_rng(seed)
    if dim == 1 or min(len(x), len(y)) < 50:
        return []
    pairs = [*itertools.combinations(range(dim), 2)] if dim > 2 and dim * (dim - 1) // 2 <= _MAX_PAIRS else []
    a, b = (part[generator.choice(len(part), min(len(part), _ROWS_OF_SEARCH), False)] for part in (x, y))
    singles: list[tuple[int, ...]] = [(j,) for j in range(dim)]
    best = max([*singles, *pairs], key=lambda some: _lower(a, b, some))
    if _lower(a, b, best, 0.0) < upper:
        return []
    a, b = (part[generator.choice(len(part), min(len(part), _MAX_ROWS), False)] for part in (x, y))
    least = _lower(a, b, best, 3.0)
    if least <= upper:
        return []
    which = " and ".join(str(j + 1) for j in best)
    return [
        f"column{'s' if len(best) > 1 else ''} {which} alone {'have' if len(best) > 1 else 'has'} at least {least:.3g}, "
        f"more than the {upper:.3g} at most that all columns together show"
    ]


def _lower(x: Samples, y: Samples, columns: tuple[int, ...], errors: float = 2.0) -> float:
    """KL of these columns minus `errors` standard errors; −∞ where their values repeat."""
    scale = y[:, columns].std(0)
    if not (scale > 0).all():
        return -math.inf
    a, b = x[:, columns] / scale, y[:, columns] / scale
    if any(len(np.unique(part[:, 0])) < 0.99 * len(part) for part in (a, b)):
        return -math.inf
    terms = terms_of(a, b, min(_NEIGHBORS, len(a) - 1, len(b)), "bias_reduced")
    return float(terms.mean()) + finite(a, b) - errors * _ERROR_FACTOR * float(terms.std()) / math.sqrt(len(terms))
