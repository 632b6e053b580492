"""SQUAREM: leaps along the difference of two EM steps, which make EM several times faster."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.rows.em_steps import FREEDOM, State

_LIKE_A_STEP = 1.1
"""Length of a leap up to which it ends about where two EM steps do; with the length 1 it's these two steps."""


def squarem_cycle(
    state: State, update: Callable[[State], tuple[Tensor, State]], before: Float[Tensor, " s"], least: float
) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"], State, int, bool]:
    """Take two EM steps, a leap along their difference, and a step from there where the leap raised the likelihood.

    States have settled as soon as a step gains less than `least`. If this is the step that led here, over `before`, the
    likelihood a step ago, one step is all; if it is the first one, two are. A leap that is hardly longer than the second step
    stands for it.

    Returns:
        The likelihood at the beginning, the largest likelihood that was met, the state one step after that, the steps taken, and
        whether the states have settled.

    Source: SQUAREM, Varadhan & Roland (2008).
    """
    here, first = update(state)
    if float((here - before).max()) < least:
        return here, here, first, 1, True
    ahead, second = update(first)
    if float((ahead - here).max()) < least:
        return here, ahead, second, 2, True
    points = [_flat(one) for one in (state, first, second)]
    slope = points[1] - points[0]
    bend = points[2] - points[1] - slope
    length = (slope.square().sum(-1) / bend.square().sum(-1).clamp(min=1e-300)).sqrt().clamp(1.0, 1e4)[:, None]
    leap = _unflat(points[0] + 2 * length * slope + length.square() * bend, second)
    # A leap can leave the set of mixtures: its covariances needn't be positive, nor its weights finite.
    safe = (torch.linalg.cholesky_ex(leap.cov)[1] == 0).all(-1)
    safe = safe & leap.probs.isfinite().all(-1) & leap.loc.isfinite().all((-1, -2))
    there, third = update(_where(safe, leap, second))
    better = safe & (there >= ahead)
    has_settled = bool((better & (length[:, 0] < _LIKE_A_STEP) & (there - ahead < least)).all())
    return here, torch.where(better, there, ahead), _where(better, third, second), 3, has_settled


def _flat(state: State) -> Float[Tensor, "s f"]:
    parts = [state.probs.log()[..., None], state.loc, state.cov.flatten(2)]
    if state.df is not None:
        parts.append(state.df.log()[..., None])
    return torch.cat(parts, -1).flatten(1)


def _unflat(flat: Float[Tensor, "s f"], like: State) -> State:
    dim = like.loc.shape[-1]
    rows = flat.reshape(*like.probs.shape, -1)
    cov = rows[..., dim + 1 : dim + 1 + dim * dim].unflatten(-1, (dim, dim))
    df = None if like.df is None else rows[..., -1].clamp(math.log(FREEDOM[0]), math.log(FREEDOM[1])).exp()
    return State(rows[..., 0].softmax(-1), rows[..., 1 : dim + 1], cov, df)


def _where(flag: Tensor, new: State, old: State) -> State:
    return new.each(lambda a, b: torch.where(flag.reshape(-1, *[1] * (a.ndim - 1)), a, b), old)
