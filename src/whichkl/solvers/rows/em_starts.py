"""EM starts: k-means++ centres, and splits and mergers of components, which reach optima that EM alone wouldn't."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.rows.em_steps import State

_FIRST_FREEDOM = 10.0
"""Degrees of freedom of a Student-t component at the start."""
_MAX_MERGERS, _MAX_SPLITS = 3, 3
"""Largest number of pairs to merge, and of components to split for each of them."""
_SPLIT_DISTANCE = 0.8
"""Distance of the halves of a split component from its mean, in standard deviations along the longest axis."""


def seed_states(
    y: Float[Tensor, "n d"], w: Float[Tensor, " n"], starts: int, count: int, seed: int, *, is_student: bool
) -> State:
    """Return k-means++ starts: each next centre is drawn with probability proportional to w × squared distance to the nearest.

    Each centre is the best of 2 + log K draws, the one that leaves the least sum of these. Covariances start as the identity over
    K^(2/d), weights are equal, and the degrees of freedom are ten.

    Source: Arthur & Vassilvitskii (2007).
    """
    generator = torch.Generator(y.device).manual_seed(seed)
    first = torch.multinomial(w, starts, replacement=True, generator=generator)
    centres = y[first][:, None]
    nearest = torch.cdist(y, centres[:, 0]).square()
    trials = 2 + int(math.log(count))
    for _ in range(1, count):
        chance = (w[:, None] * nearest).T + 1e-300
        drawn = y[torch.multinomial(chance, trials, replacement=True, generator=generator)]
        left = torch.stack([torch.minimum(nearest, torch.cdist(y, drawn[:, t]).square()) for t in range(trials)])
        best = (w[:, None] * left).sum(1).argmin(0)
        each = torch.arange(starts, device="cpu")
        centres = torch.cat([centres, drawn[each, best][:, None]], 1)
        nearest = left[best, :, each].T
    dim = y.shape[1]
    spread = torch.eye(dim, dtype=y.dtype, device=y.device) / max(1.0, count ** (1 / dim)) ** 2
    even = torch.full((starts, count), 1 / count, dtype=y.dtype, device=y.device)
    df = torch.full_like(even, _FIRST_FREEDOM) if is_student else None
    return State(even, centres, spread.expand(starts, count, dim, dim), df)


def split_and_merge(state: State) -> State | None:
    """Return up to nine states in which two components are merged and a third is split; None for fewer than three components.

    The pairs are those that lose least by Runnalls' bound, ½ [(πᵢ + πⱼ) log|Σᵢⱼ| − πᵢ log|Σᵢ| − πⱼ log|Σⱼ|]. The components of
    largest volume are split. Both moves keep the moments.

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
    for pair in nearest.tolist()[:_MAX_MERGERS]:
        i, j = int(row[pair]), int(column[pair])
        for k in [one for one in widest.tolist() if one not in (i, j)][:_MAX_SPLITS]:
            found.append(_moved(state, i, j, k))
    return found[0].beside(*found[1:])


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
    step = _SPLIT_DISTANCE * value[-1].sqrt() * vector[:, -1]
    cov[0, k] = cov[0, k] - torch.outer(step, step)
    cov[0, j] = cov[0, k]
    loc[0, j], loc[0, k] = loc[0, k] - step, loc[0, k] + step
    probs[0, k] = probs[0, k] / 2
    probs[0, j] = probs[0, k]
    return State(probs, loc, cov, state.df)
