"""SQUAREM: two steps of a slow fixed point, a leap along their difference, and a step from there where it helped."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.rows.em_expectation import FREEDOM, State


def cycle(
    state: State, update: Callable[[State], tuple[Tensor, State]]
) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"], State]:
    """Two EM steps, a leap along their difference, and a step from there where the leap raised the likelihood.

    Returns the likelihood at the beginning of the cycle, the largest that was met in it, and the state at its end, which is a
    step better than that. Source: SQUAREM, Varadhan & Roland (2008).
    """
    here, first = update(state)
    ahead, second = update(first)
    points = [_flat(one) for one in (state, first, second)]
    slope = points[1] - points[0]
    bend = points[2] - points[1] - slope
    length = (slope.square().sum(-1) / bend.square().sum(-1).clamp(min=1e-300)).sqrt().clamp(1.0, 1e4)[:, None]
    leap = _read(points[0] + 2 * length * slope + length.square() * bend, second)
    safe = (torch.linalg.cholesky_ex(leap.cov)[1] == 0).all(-1)
    safe = safe & leap.probs.isfinite().all(-1) & leap.loc.isfinite().all((-1, -2))
    there, third = update(_where(safe, leap, second))
    better = safe & (there >= ahead)
    return here, torch.where(better, there, ahead), _where(better, third, second)


def _flat(state: State) -> Float[Tensor, "s f"]:
    parts = [state.probs.log()[..., None], state.loc, state.cov.flatten(2)]
    if state.df is not None:
        parts.append(state.df.log()[..., None])
    return torch.cat(parts, -1).flatten(1)


def _read(flat: Float[Tensor, "s f"], like: State) -> State:
    dim = like.loc.shape[-1]
    rows = flat.reshape(*like.probs.shape, -1)
    probs, loc = rows[..., 0].softmax(-1), rows[..., 1 : dim + 1]
    cov = rows[..., dim + 1 : dim + 1 + dim * dim].unflatten(-1, (dim, dim))
    df = None if like.df is None else rows[..., -1].clamp(math.log(FREEDOM[0]), math.log(FREEDOM[1])).exp()
    return State(probs, loc, cov, df)


def _where(flag: Tensor, new: State, old: State) -> State:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(flag.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    df = None if new.df is None or old.df is None else pick(new.df, old.df)
    return State(pick(new.probs, old.probs), pick(new.loc, old.loc), pick(new.cov, old.cov), df)
