"""Enumeration: every row of a finite discrete support, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

MOST = 1 << 16
"""Largest number of rows that are listed: all rows of 16 columns of 0 and 1."""


def count(levels: Sequence[tuple[int, int]]) -> int:
    """Return the number of rows.

    >>> count([(0, 1), (0, 2)])
    6
    """
    return math.prod(high - low + 1 for low, high in levels)


def rows(levels: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float64) -> Float[Tensor, "n d"]:
    """Return every row; the last column changes fastest.

    >>> rows([(0, 1), (1, 2)]).tolist()
    [[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [1.0, 2.0]]
    """
    columns = [torch.arange(low, high + 1, dtype=dtype, device="cpu") for low, high in levels]
    return torch.stack(torch.meshgrid(*columns, indexing="ij"), -1).reshape(-1, len(levels))
