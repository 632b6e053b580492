"""Field checks: what several families refuse in their own fields, in a user's model and in the columns of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot

Kind = TypeVar("Kind")
_MIN_EIGENVALUE_RATIO = 1e-12
"""Smallest ratio of the least to the largest eigenvalue of correlations; below it columns determine each other."""
_MIN_ENTRY = 1e-3
"""Smallest entry of the least eigenvector by which a column counts as one of those that determine each other."""


def check_choice(family: Any, field: str, choices: Sequence[str]) -> None:
    """Refuse a field that isn't one of the choices."""
    value = getattr(family, field)
    if value not in choices:
        *others, last = map(repr, choices)
        because = f"`{field}={value!r}` isn't one of its choices"
        raise InputError(cannot(f"use `{type(family).__name__}`", because, f"Choose {', '.join(others)} or {last}"))


def check_whole(family: Any, field: str, instead: str = "") -> None:
    """Refuse a field that isn't a whole number of at least 1."""
    value = getattr(family, field)
    if not _is_whole(value):
        because = f"`{field}={value!r}` isn't a whole number of at least 1"
        raise InputError(cannot(f"use `{type(family).__name__}`", because, instead or f"Give, say, {field}=4"))


def check_not_negative(family: Any, field: str) -> None:
    """Refuse a field that isn't a finite number of at least 0."""
    value = getattr(family, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        because = f"`{field}={value!r}` isn't a finite number of at least 0"
        raise InputError(cannot(f"use `{type(family).__name__}`", because, f"Give, say, {field}=0 or {field}=1.0"))


def check_widths(family: Any) -> None:
    """Refuse a field `hidden` that isn't the widths of layers; keep it as a tuple, since a saved configuration has a list."""
    hidden = family.hidden
    widths = tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,)
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


def dependent_columns(covariance: Float[Tensor, "d d"]) -> list[int]:
    """Return the columns that determine each other linearly; none if the correlations have full rank."""
    sd = covariance.diagonal().sqrt()
    eigenvalues, vectors = torch.linalg.eigh(covariance / torch.outer(sd, sd))
    if float(eigenvalues[0]) >= _MIN_EIGENVALUE_RATIO * float(eigenvalues[-1]):
        return []
    columns: list[int] = (vectors[:, 0].abs() > _MIN_ENTRY).nonzero().flatten().tolist()
    return columns


def quoted(names: Sequence[str], columns: Sequence[int]) -> str:
    """Write the names of some columns, each in backticks."""
    return ", ".join(f"`{names[i]}`" for i in columns)
