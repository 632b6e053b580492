"""EM features: 1, the products of columns and the columns, in which the log density of a Gaussian is linear."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS = 4_096
"""Largest number of rows in one matrix product."""


def pairs_of(dim: int, *, diagonal: bool) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Return which columns each product multiplies: every column with itself, with the next one, with the one after that.

    Columns are in a circle, half of which has every pair once.
    """
    count = dim if diagonal else dim * (dim + 1) // 2
    number = torch.arange(count, device="cpu")
    return number % dim, (number % dim + number // dim) % dim


class Features:
    """A buffer for the features of up to `ROWS` rows.

    Args:
        dim: number of columns.
        dtype: their dtype.
        diagonal: whether each column is multiplied with itself alone.
    """

    def __init__(self, dim: int, dtype: torch.dtype, *, diagonal: bool) -> None:
        self.dim, self.shifts = dim, 1 if diagonal else (dim + 1) // 2
        self.halves = 0 if diagonal or dim % 2 else dim // 2
        """Products of columns that are half a circle apart: the pairs after these are the same."""
        self.count = 1 + dim * self.shifts + self.halves + dim
        self._again = 0 if diagonal else dim // 2
        self._buffer = torch.empty(self.count + self._again, ROWS, dtype=dtype, device="cpu")
        self._buffer[0] = 1

    def of(self, y: Float[Tensor, "m d"]) -> Float[Tensor, "p m"]:
        """Return the features of rows; the next call overwrites them."""
        buffer, dim, size = self._buffer[:, : len(y)], self.dim, len(y)
        circle = buffer[self.count - dim :]
        circle[:dim] = y.T
        circle[dim:] = circle[: self._again]
        # Once more around the circle, every shift is a window: one call multiplies them all.
        row = buffer.stride(0)
        windows = circle.as_strided((self.shifts, dim, size), (row, row, 1))
        torch.mul(windows, circle[:dim], out=buffer[1 : 1 + dim * self.shifts].unflatten(0, (self.shifts, dim)))
        if self.halves:
            half = self.halves
            torch.mul(circle[:half], circle[half:dim], out=buffer[1 + dim * self.shifts : self.count - dim])
        return buffer[: self.count]
