"""Point masses: single values that many rows have, in columns whose other values are continuous, such as zeros of amounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_MAX_ROWS = 20_000
"""Largest number of rows, chosen at random, in which values are counted."""
_MIN_ROWS, _MIN_SHARE = 10, 0.01
"""Least number of rows with a value that has mass, and their least share."""
_MIN_RATIO = 5.0
"""Least ratio of these rows to those of any other value; rounded values occur about as often as their neighbours."""
_MAX_MASSES = 5
_MIN_OTHERS = 20
"""Least number of other values in a column that is continuous elsewhere."""

Masses = Mapping[int, Mapping[float, float]]
"""Of columns, by their numbers, the values that have mass, with their shares of the rows."""


def point_masses(x: Float[Tensor, "n d"]) -> Masses:
    """Return the values with mass of each column that has some.

    >>> z = torch.arange(100, dtype=torch.float64)[:, None] / 7
    >>> point_masses(torch.cat([z, 0 * z])), point_masses(z), point_masses(z.round())
    ({0: {0.0: 0.505}}, {}, {})
    """
    rows = x.detach().double().cpu()
    if len(rows) > _MAX_ROWS:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0), device="cpu")[:_MAX_ROWS]]
    repeats = (np.diff(np.sort(rows.T.numpy())) == 0).any(1)  # in a fifth of the time that torch takes to count each value
    found = {i: _masses_of(rows[:, i]) for i in np.flatnonzero(repeats).tolist()}
    return {i: masses for i, masses in found.items() if masses}


def _masses_of(column: Float[Tensor, " n"]) -> dict[float, float]:
    values, counts = column.unique(return_counts=True)
    if len(values) < _MIN_OTHERS:
        return {}
    counts, order = counts.sort(descending=True)
    least = max(_MIN_ROWS, _MIN_SHARE * len(column))
    most = min(_MAX_MASSES, len(values) - _MIN_OTHERS)
    number = next((k for k in range(most, 0, -1) if counts[k - 1] >= max(least, _MIN_RATIO * float(counts[k]))), 0)
    return {float(values[i]): int(count) / len(column) for i, count in zip(order[:number], counts, strict=False)}


def in_words(masses: Masses, names: Sequence[str]) -> str:
    """Write where the masses are.

    >>> in_words({0: {0.0: 0.505}}, ["rain"])
    '50% of the rows are exactly 0 in `rain`'
    """
    of_each = [
        f"{share:.0%} of the rows are exactly {value:.6g} in `{names[i]}`" for i in masses for value, share in masses[i].items()
    ]
    return ", ".join(of_each[:_MAX_MASSES]) + ", …" * (len(of_each) > _MAX_MASSES)
