"""Value ranges: the values that a column may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

MAX_CATEGORIES = 1_000_000
"""Largest number of categories of a column: a larger code is more likely a number that isn't a code."""


@dataclass(frozen=True)
class ValueRange:
    """An interval of numbers, or the whole numbers in it; NaN and infinities are never inside.

    Args:
        words: the values in words, for messages.
        low: the lower end.
        high: the upper end.
        is_open: whether the ends themselves are outside.
        is_whole: whether only whole numbers are inside.
    """

    words: str
    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False
    is_whole: bool = False

    def contains(self, values: Float[Tensor, "*b"]) -> Bool[Tensor, "*b"]:
        """Return which values are inside."""
        inside = (values > self.low) & (values < self.high) if self.is_open else (values >= self.low) & (values <= self.high)
        return inside & values.isfinite() & (values == values.round() if self.is_whole else True)


REAL = ValueRange("finite numbers")
POSITIVE = ValueRange("numbers above 0", low=0, is_open=True)
NOT_NEGATIVE = ValueRange("numbers from 0", low=0)
INSIDE_UNIT = ValueRange("numbers between 0 and 1, without the ends", low=0, high=1, is_open=True)
BITS = ValueRange("0 and 1", low=0, high=1, is_whole=True)
COUNTS = ValueRange("whole numbers from 0", low=0, is_whole=True)


def codes_of(categories: int | None = None, noun: str = "categories") -> ValueRange:
    """Return the codes 0 … K − 1; K is at most `MAX_CATEGORIES` unless given."""
    words = f"whole numbers from 0 to K − 1, the codes of K {noun}"
    return ValueRange(words, low=0, high=(categories or MAX_CATEGORIES) - 1, is_whole=True)


def first_outside(values: Float[Tensor, " n"], inside: ValueRange) -> tuple[int, str] | None:
    """Return the first row whose value is outside, and that value as text; None if all are inside."""
    rows = (~inside.contains(values)).nonzero()
    return (int(rows[0, 0]), shown(float(values[int(rows[0, 0])]))) if len(rows) else None


def shown(value: float) -> str:
    """Write a number for a message, with a real minus sign."""
    return f"{value:g}".replace("-", "−")
