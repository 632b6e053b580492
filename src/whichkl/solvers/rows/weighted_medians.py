"""Weighted medians: exact ones, of columns that are read in parts, by counting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.samples import Block
from whichkl.solvers.rows.rows import Rows

_BITS = 16
_DIGITS = 1 << _BITS
_ROUNDING = 1e-12
"""Relative error up to which a weight counts as half of the total."""
_MAGNITUDE = 0x7FFFFFFFFFFFFFFF


def weighted_medians(rows: Rows, columns: Sequence[int]) -> Float[Tensor, " k"]:
    """Return the lower weighted median of each column: the least value up to which half of the weight lies.

    The 64 bits of a double are read as a whole number with the same order, and found 16 at a time. Each of four passes adds up
    the weight by the next digit, among the values that begin with the digits found so far.

    Args:
        rows: the rows, which are read four times.
        columns: the numbers of the columns.

    Source: radix selection, Knuth (1998), The Art of Computer Programming 3, 5.2.5.
    """
    found = torch.zeros(len(columns), dtype=torch.int64, device="cpu")
    half = below = torch.zeros(len(columns), dtype=torch.float64, device="cpu")
    for digit in range(64 // _BITS):
        nothing = torch.zeros(len(columns), _DIGITS, dtype=torch.float64, device="cpu")
        table = sum(rows.map(_Count(tuple(columns), found, digit)), nothing)
        half = table.sum(1) / 2 * (1 - _ROUNDING) if digit == 0 else half
        reached = below[:, None] + table.cumsum(1)
        at = ((reached >= half[:, None]) & (table > 0)).int().argmax(1)
        below = (reached - table).gather(1, at[:, None])[:, 0]
        found = found * _DIGITS + at - (_DIGITS // 2 if digit == 0 else 0)
    return torch.where(found < 0, found ^ _MAGNITUDE, found).view(torch.float64)


@dataclass(frozen=True)
class _Count:
    """Adds up the weight per value of digit number `digit`, among values whose earlier digits are `found`."""

    columns: tuple[int, ...]
    found: Int[Tensor, " k"]
    digit: int

    def __call__(self, blocks: Iterator[Block]) -> Tensor:
        table = torch.zeros(len(self.columns), _DIGITS, dtype=torch.float64, device="cpu")
        shift = 64 - _BITS * (self.digit + 1)
        for block in blocks:
            for i, column in enumerate(self.columns):
                order = _order(block.x[:, column].cpu())
                digits, weights = order >> shift, block.w.cpu()
                if self.digit == 0:
                    digits = digits + _DIGITS // 2
                else:
                    begins = digits >> _BITS == self.found[i]
                    digits, weights = digits[begins] & (_DIGITS - 1), weights[begins]
                table[i] += torch.bincount(digits, weights, _DIGITS)
        return table


def _order(x: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
    """Return doubles as whole numbers of 64 bits in the same order; −0 is 0."""
    bits = (x.to(torch.float64) + 0.0).contiguous().view(torch.int64)
    return torch.where(bits < 0, bits ^ _MAGNITUDE, bits)
