"""Exact fits: sums over rows, the fit without the held-out rows, and the only optimum, for closed forms and Newton's method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from whichkl._checks import InputError
from whichkl.samples import Block, Slice
from whichkl.solvers.rows.rows import Rows, mean_log_likelihood
from whichkl.solvers.solver import Held, Optimum

Sums = dict[str, Tensor]

_MAX_SHIFT = 1e3
"""Standard deviations. Squares about a point farther than this from the mean have lost six digits."""


def add_sums(sums: Sums, more: Mapping[str, Tensor]) -> None:
    """Add sums to others in place; a shorter count of categories is 0 for the categories that it lacks."""
    for name, value in more.items():
        if name not in sums:
            sums[name] = value.clone()
        elif sums[name].shape == value.shape:
            sums[name] += value
        else:
            size = max(len(sums[name]), len(value))
            a, b = (torch.nn.functional.pad(one, (0, size - len(one))) for one in (sums[name], value))
            sums[name] = a + b


def shift_to_mean(weight: Tensor, first: Tensor, second: Tensor) -> Tensor | None:
    """Return the vector from the origin of some sums to the mean if it is too long for their precision, else None.

    Args:
        weight: Σ w.
        first: Σ w z, where z is a row minus the origin.
        second: Σ w z².
    """
    shift = first / weight
    variance = second / weight - shift.square()
    return shift if bool((shift.square() > _MAX_SHIFT**2 * variance.clamp(min=0)).any()) else None


def fit_held(block: Block, fit: Callable[[], Any]) -> tuple[Held | None, tuple[str, ...]]:
    """Return a model that was fitted without these rows, or a note that the others don't determine one."""
    try:
        return Held(block, fit()), ()
    except InputError as error:
        return None, (f"no rows could be held out, since the others alone don't determine a model: {error}",)


def optimum_on(rows: Rows, model: Any, held: Held | None, *, converged: bool) -> Optimum:
    """Return the only optimum, with its loss on all rows; on the held-out rows for a stream, which saves a pass."""
    judged = Rows((Slice(held.block),), rows.names) if held is not None and rows.start is not None else rows
    return Optimum(model, -mean_log_likelihood(model, judged), converged, is_global=True)
