"""Field checks: what families refuse in their own fields and in a user's model, and the values that a column may hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import InputError, as_int, as_number, cannot

Kind = TypeVar("Kind")
_MIN_EIGENVALUE_RATIO = 1e-12
"""Smallest ratio of the least to the largest eigenvalue of correlations; below it columns determine each other."""
_MIN_ENTRY = 1e-3
"""Smallest entry of the least eigenvector by which a column counts as one of those that determine each other."""
_MAX_CODES = 1_000_000
"""Largest number of categories of a column: a larger code is more likely a number that isn't a code."""


def check_choice(family: Any, field: str, choices: Sequence[str]) -> None:
    """Refuse a field that isn't one of the choices."""
    value = getattr(family, field)
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        because = f"`{field}={value!r}` isn't one of its choices"
        raise InputError(cannot(f"use `{type(family).__name__}`", because, f"Choose {', '.join(others)} or {last}"))


def check_whole(family: Any, field: str, instead: str = "") -> None:
    """Refuse a field that isn't a whole number of at least 1."""
    value = as_int(getattr(family, field))
    object.__setattr__(family, field, value)
    if not _is_whole(value):
        because = f"`{field}={value!r}` isn't a whole number of at least 1"
        raise InputError(cannot(f"use `{type(family).__name__}`", because, instead or f"Give, say, {field}=4"))


def check_not_negative(family: Any, field: str) -> None:
    """Refuse a field that isn't a finite number of at least 0."""
    value = as_number(getattr(family, field))
    object.__setattr__(family, field, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        because = f"`{field}={value!r}` isn't a finite number of at least 0"
        raise InputError(cannot(f"use `{type(family).__name__}`", because, f"Give, say, {field}=0 or {field}=1.0"))


def check_widths(family: Any) -> None:
    """Refuse a field `hidden` that isn't the widths of layers; keep it as a tuple, since a saved configuration has a list."""
    hidden = family.hidden
    widths = tuple(map(as_int, hidden)) if isinstance(hidden, (tuple, list)) else (as_int(hidden),)
    if not all(map(_is_whole, widths)):
        because = f"`hidden={hidden!r}` isn't the widths of layers"
        raise InputError(cannot(f"use `{type(family).__name__}`", because, "Give, say, hidden=(64, 64)"))
    object.__setattr__(family, "hidden", widths)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def expect(model: Any, kind: type[Kind], what: str, instead: str = "Use a model of this family") -> Kind:
    """Return a model if it is of the expected class."""
    if not isinstance(model, kind):
        raise InputError(cannot(f"read {what} from this model", f"it is a `{type(model).__name__}`", instead))
    return model


def dependent_columns(covariance: Float[Tensor, "d d"]) -> Bool[Tensor, " d"]:
    """Return which columns determine each other linearly; none if the correlations have full rank."""
    sd = covariance.diagonal().sqrt()
    eigenvalues, vectors = torch.linalg.eigh(covariance / torch.outer(sd, sd))
    if float(eigenvalues[0]) >= _MIN_EIGENVALUE_RATIO * float(eigenvalues[-1]):
        return torch.zeros_like(sd, dtype=torch.bool)
    involved: Tensor = vectors[:, 0].abs() > _MIN_ENTRY
    return involved


def refuse_dependent(family: Any, covariance: Float[Tensor, "d d"], names: Sequence[str], instead: str) -> None:
    """Refuse columns that determine each other linearly, for a family whose covariance is full.

    Args:
        family: what can't be fitted.
        covariance: of all rows.
        names: the columns' names.
        instead: how the family is written with a diagonal covariance.
    """
    dependent = dependent_columns(covariance)
    if bool(dependent.any()):
        because = f"the columns {quoted(names, dependent)} are linearly dependent, so the covariance is singular"
        family.refuse(because, f"Drop one of them, or use {instead}")


def quoted(names: Sequence[str], is_named: Bool[Tensor, " d"]) -> str:
    """Write the names of some columns, each in backticks."""
    return ", ".join(f"`{name}`" for name, is_in in zip(names, is_named.tolist(), strict=False) if is_in)


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
    """Return the codes 0 … K − 1; K is at most `_MAX_CODES` unless given."""
    words = f"whole numbers from 0 to K − 1, the codes of K {noun}"
    return ValueRange(words, low=0, high=(categories or _MAX_CODES) - 1, is_whole=True)


def first_outside(values: Float[Tensor, " n"], inside: ValueRange) -> tuple[int, str] | None:
    """Return the first row whose value is outside, and that value as text; None if all are inside."""
    rows = (~inside.contains(values)).nonzero()
    return (int(rows[0, 0]), shown(float(values[int(rows[0, 0])]))) if len(rows) else None


def shown(value: float) -> str:
    """Write a number for a message, with a real minus sign."""
    return f"{value:g}".replace("-", "−")
