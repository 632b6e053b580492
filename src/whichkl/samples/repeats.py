"""Repeats: rows that are equal to others; they add no evidence, and leak across a split."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_MAX_ROWS_COMPARED_AT_ONCE = 20_000
"""With more rows, this many at random decide whether comparing all is worth it."""
_MIN_SHARE = 0.01
"""Least share of repeated rows, and of distinct rows that occur several times, for repeats to matter."""
_MIN_REPEATED = 3
"""Least number of distinct rows that occur several times."""
_FIRST_COLUMNS = 4
"""Columns that are compared first: where no row repeats in these, none repeats."""
_COARSE_DIGITS = 5
"""A column whose numbers all have at most this many digits is coarse, and repeats by nature."""
_DIGIT_TOLERANCE = 0.01
"""Distance from such a number that still counts, above half of the noise of float32."""
_CONSTANTS = np.random.default_rng(0).integers(0, 2**63, 3, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Repeats:
    """Groups of equal rows."""

    group: Int[Tensor, " n"]
    """For each row, the number of the distinct row that it equals."""
    count: int
    """The number of distinct rows."""
    in_turn: bool
    """Whether most repeats follow directly, as where a Markov chain rejects."""

    @property
    def note(self) -> str:
        """Their meaning for a fit, in words."""
        rows, share = len(self.group), 1 - self.count / len(self.group)
        said = f"{share:.0%} of the rows repeat others ({rows:,} rows were compared, {self.count:,} of them distinct)"
        chains = ". If a Markov chain drew them, pass `chains=`: errors then count effective draws" if self.in_turn else ""
        return f"{said}: equal rows are held out together, and errors count them as one{chains}"

    def rank(self, seed: int) -> Int[Tensor, " n"]:
        """Number the distinct rows from 0 in random order, and return the number of each row."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed), device="cpu")
        return order.to(self.group.device)[self.group]

    def folds(self, count: int, seed: int) -> list[Int[Tensor, " m"]]:
        """Distribute the distinct rows over folds at random; return the numbers of all rows of each fold."""
        count = min(count, self.count)
        fold = self.rank(seed) * count // self.count
        return [(fold == i).nonzero()[:, 0] for i in range(count)]


def repeats_of(x: Float[Tensor, "n d"], context: Float[Tensor, "n c"] | None = None) -> Repeats | None:
    """Find equal rows, where they are many and no accident.

    Whole numbers, numbers of few digits and columns of few values repeat by nature: rows of such columns alone return None. So do
    single values that have mass, such as many zeros: at least 1 % of the distinct rows, and three, must occur several times.

    Args:
        x: rows.
        context: what they are conditioned on; it counts as further columns.

    >>> x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> repeats_of(x.repeat(75, 1)).count, repeats_of(x), repeats_of(x.round().repeat(75, 1))
    (4, None, None)
    """
    columns = x.detach() if context is None else torch.cat([x.detach(), context.detach().to(x)], 1)
    n = len(columns)
    if n > _MAX_ROWS_COMPARED_AT_ONCE:
        chosen = np.random.default_rng(0).choice(n, _MAX_ROWS_COMPARED_AT_ONCE, replace=False)
        some = _rows(columns[torch.from_numpy(np.sort(chosen)).to(columns.device)])
        if not _matter(np.unique(_keys(some, _FIRST_COLUMNS), return_counts=True)[1], (_MAX_ROWS_COMPARED_AT_ONCE / n) ** 2):
            return None
    rows = _rows(columns)
    keys = np.sort(_keys(rows, _FIRST_COLUMNS))  # `np.unique` would load NumPy's masked arrays
    if not bool((keys[1:] == keys[:-1]).any()):
        return None
    _, first, group, counts = np.unique(_keys(rows), return_index=True, return_inverse=True, return_counts=True)
    if not _matter(counts) or not any(_is_continuous(column) for column in rows[first].T):
        return None
    again = n - len(counts)
    in_turn = 2 * int((group[1:] == group[:-1]).sum()) > again
    return Repeats(torch.from_numpy(group.reshape(-1)).to(x.device), len(counts), in_turn)


def row_keys(x: Float[Tensor, "n d"], context: Float[Tensor, "n c"] | None = None) -> Int[Tensor, " n"]:
    """Return a hash of each row, equal for equal rows."""
    columns = x if context is None else torch.cat([x, context.to(x)], 1)
    return torch.from_numpy((_keys(_rows(columns)) >> np.uint64(1)).view(np.int64)).to(x.device)


def _rows(columns: Tensor) -> np.ndarray:
    return np.ascontiguousarray(columns.cpu().to(torch.float64).numpy()) + 0.0  # −0 is 0


def _keys(rows: np.ndarray, most: int | None = None) -> np.ndarray:
    """Mix the bits of the columns, one after the other. Source: Steele, Lea & Flood (2014)."""
    key = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T[:most]:
        key = (key ^ column.copy().view(np.uint64)) * _CONSTANTS[0]
        key = (key ^ (key >> np.uint64(32))) * _CONSTANTS[1]
        key = (key ^ (key >> np.uint64(29))) * _CONSTANTS[2]
        key ^= key >> np.uint64(32)
    return key


def _matter(counts: np.ndarray, seen: float = 1.0) -> bool:
    """Whether many rows repeat many others; `seen` is the share of all pairs of rows that was compared."""
    rows, distinct, several = int(counts.sum()), len(counts), int((counts > 1).sum())
    is_noticeable = rows - distinct >= _MIN_SHARE * seen * rows
    return is_noticeable and (several == distinct or several >= max(_MIN_REPEATED, _MIN_SHARE * seen * distinct))


def _is_continuous(column: np.ndarray) -> bool:
    """Whether the values of distinct rows are different numbers of many digits."""
    values = np.unique(column)
    reach = float(np.abs(values).max())
    if 2 * len(values) <= len(column) or reach == 0 or not math.isfinite(reach):
        return False
    grid = values / reach * 10.0 ** (math.log10(reach) % 1 + _COARSE_DIGITS - 1)
    is_coarse = bool((np.abs(grid - np.round(grid)) <= _DIGIT_TOLERANCE).all())
    is_whole = bool((values == np.round(values)).all())
    return not (is_coarse or is_whole)
