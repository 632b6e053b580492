"""Entangled columns: rows near a curve or a sheet, along which a classifier of features of the columns sees little."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from whichkl.divergences.samples.neighbor_calibration import step_of
from whichkl.divergences.samples.neighbors import Rows, entropy_term, whiten

_MAX_TOTAL_CORRELATION = 0.5
"""Nats of dependence without a linear part above which rows lie near a curve; independent columns give 0 ± 0.1 at 500 rows."""
_SHARE_OF_DISTINCT = 0.99
"""Share of a column's values that are distinct below which it may be rounded."""
_MAX_ROWS, _MAX_COLUMNS, _NEIGHBORS = 1_000, 20, 5


def total_correlation(x: Rows) -> float:
    """Return Σ H(zⱼ) − H(z), in nats, of rows z that an affine map has made uncorrelated, by nearest neighbours.

    It is 0 for every Gaussian and for independent columns. Rounded values are spread evenly within their step: equal ones would
    look like a curve.

    Source: Watanabe (1960); entropies, Kozachenko & Leonenko (1987).
    """
    some = x[:: -(-len(x) // _MAX_ROWS)]
    step = [step_of(column) if len(np.unique(column)) < _SHARE_OF_DISTINCT * len(some) else 0.0 for column in some.T]
    white = whiten(some + np.random.default_rng(0).uniform(-0.5, 0.5, some.shape) * step)[0]
    columns = (entropy_term(white[:, j : j + 1], _NEIGHBORS) for j in range(white.shape[1]))
    return entropy_term(white, _NEIGHBORS) - sum(columns)


def doubt_of_curves(*samples: Tensor) -> list[str]:
    """Say that the columns of a sample are entangled, so that a divergence along them may not be seen; nothing if they aren't."""
    if not 1 < samples[0].shape[1] <= _MAX_COLUMNS:
        return []
    most = max(total_correlation(one.numpy()) for one in samples)
    if most <= _MAX_TOTAL_CORRELATION:
        return []
    return [
        f"the rows lie near a curve or a sheet ({most:.2g} nats of nonlinear dependence), along which a classifier sees little"
    ]
