"""EM scales: the coordinates in which EM works, and the floor of its covariances, both from a sample of the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.families import Mixture, StudentT
from whichkl.families.field_checks import refuse_dependent
from whichkl.samples import Block

_FLOOR = 1e-6
"""Smallest variance of a component in any direction, relative to that of all rows in this direction."""
_ROWS_WITH_REPEATS = 1_000
"""Rows of which two share a value, almost surely, if most values of some ten thousand rows repeat."""
_MIN_EIGENVALUE_RATIO = 1e-4
"""Smallest ratio of the eigenvalues of correlations at which columns are only scaled; below it they are made uncorrelated."""


def scales_of(
    sample: Block, family: Mixture | StudentT, names: Sequence[str]
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"], Float[Tensor, "d d"] | None, Float[Tensor, "d d"]]:
    """Return the means m and standard deviations s of columns, L or None, and F of the condition Σ ⪰ F for every component.

    The coordinates are (x − m)/s. Rounding would spoil the likelihood where columns nearly agree: there, rows are multiplied by
    L⁻¹, where LLᵀ are the correlations of all rows. F is 1e-6 times the covariance of all rows, plus h²/12 for a column that was
    recorded to a step h; it is relative to all rows in every direction, so that columns that nearly agree don't rest on it.

    Raises:
        InputError: columns determine each other, and the family's covariance isn't diagonal.
    """
    x, w = sample.x, sample.w / sample.w.sum()
    shift = w @ x
    scale = (w @ (x - shift).square()).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    # A value recorded to a step h stands for an interval, whose variance is h²/12: no component may claim to know more.
    rounding = torch.diag((resolution(x) / scale).square() / 12)
    whole = torch.eye(len(scale), dtype=x.dtype, device=x.device)
    if family.covariance == "diagonal" or len(scale) == 1:
        return shift, scale, None, rounding + _FLOOR * whole
    y = (x - shift) / scale
    correlations = (w[:, None] * y).T @ y
    refuse_dependent(family, correlations, names, "covariance='diagonal'")
    eigenvalues = torch.linalg.eigvalsh(correlations)
    if float(eigenvalues[0]) >= _MIN_EIGENVALUE_RATIO * float(eigenvalues[-1]):
        return shift, scale, None, rounding + _FLOOR * correlations
    mixing = torch.linalg.cholesky(correlations)
    half = torch.linalg.solve_triangular(mixing, rounding, upper=False)
    return shift, scale, mixing, torch.linalg.solve_triangular(mixing, half.T, upper=False) + _FLOOR * whole


def resolution(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Return the step in which each column was recorded: its smallest gap if most values repeat, else 0."""
    columns = x.T.cpu().numpy()
    some = np.random.default_rng(0).choice(len(x), min(len(x), _ROWS_WITH_REPEATS), replace=False)
    if (np.diff(np.sort(columns[:, some])) > 0).all():
        return torch.zeros_like(x[0])
    gaps = torch.from_numpy(np.diff(np.sort(columns)))  # NumPy sorts many times faster than torch
    is_new = gaps > 0
    repeats = is_new.sum(1) + 1 < x.shape[0] / 2
    return torch.where(repeats & is_new.any(1), torch.where(is_new, gaps, math.inf).amin(1), 0.0).to(x)
