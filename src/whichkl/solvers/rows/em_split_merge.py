"""Split and merge: other places for the components of a mixture, where EM alone would have to cross worse ones."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.rows.em_expectation import State

_MERGES, _SPLITS = 3, 3
_APART = 0.8
"""The halves of a split stand so many standard deviations from its middle, along the longest axis."""


def rearranged(state: State) -> State | None:
    """Return up to nine states in which two near components are one and a wide one is two; None under three components.

    Pairs are those whose merger loses least by Runnalls' bound, ½ [(πᵢ + πⱼ) log|Σᵢⱼ| − πᵢ log|Σᵢ| − πⱼ log|Σⱼ|]; what is
    split has the largest volume. Both moves keep the moments.

    Source: split and merge EM, Ueda, Nakano, Ghahramani & Hinton (2000); the bound, Runnalls (2007).
    """
    probs, loc, cov = state.probs[0], state.loc[0], state.cov[0]
    count = len(probs)
    if count < 3:
        return None
    volume = _log_det(cov)
    cost = _merge_cost(probs, loc, cov, volume)
    row, column = torch.triu_indices(count, count, 1, device="cpu")
    nearest = cost[row, column].argsort()
    widest = torch.where(probs > 0.25 / count, volume, -math.inf).argsort(descending=True)
    found: list[State] = []
    for pair in nearest.tolist()[:_MERGES]:
        i, j = int(row[pair]), int(column[pair])
        for k in [one for one in widest.tolist() if one not in (i, j)][:_SPLITS]:
            found.append(_moved(state, i, j, k))
    return functools.reduce(State.beside, found)


def _merge_cost(probs: Tensor, loc: Tensor, cov: Tensor, volume: Tensor) -> Float[Tensor, "k k"]:
    weight = probs[:, None] + probs
    share = probs[:, None] / weight
    apart = loc[:, None] - loc
    between = (share * (1 - share))[..., None, None] * apart[..., :, None] * apart[..., None, :]
    merged = share[..., None, None] * cov[:, None] + (1 - share)[..., None, None] * cov + between
    cost: Tensor = (weight * _log_det(merged) - probs[:, None] * volume[:, None] - probs * volume) / 2
    return cost


def _log_det(cov: Float[Tensor, "... d d"]) -> Float[Tensor, ...]:
    """Log determinants by Cholesky: torch's LU of a batch can be wrong (see `whichkl.process.threads`)."""
    total: Tensor = 2 * torch.linalg.cholesky(cov).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return total


def _moved(state: State, i: int, j: int, k: int) -> State:
    """Merge i and j into i, and split k into k and j."""
    probs, loc, cov = state.probs.clone(), state.loc.clone(), state.cov.clone()
    a = float(probs[0, i] / (probs[0, i] + probs[0, j]))
    apart = loc[0, i] - loc[0, j]
    cov[0, i] = a * cov[0, i] + (1 - a) * cov[0, j] + a * (1 - a) * torch.outer(apart, apart)
    loc[0, i] = a * loc[0, i] + (1 - a) * loc[0, j]
    probs[0, i] = probs[0, i] + probs[0, j]
    value, vector = torch.linalg.eigh(cov[0, k])
    step = _APART * value[-1].sqrt() * vector[:, -1]
    cov[0, k] = cov[0, k] - torch.outer(step, step)
    cov[0, j] = cov[0, k]
    loc[0, j], loc[0, k] = loc[0, k] - step, loc[0, k] + step
    probs[0, k] = probs[0, k] / 2
    probs[0, j] = probs[0, k]
    return State(probs, loc, cov, state.df)
