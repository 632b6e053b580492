"""EM starts: k-means++, the neighbourhood of another mixture, and components that are merged or split."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MixtureSameFamily

from whichkl.families.mixture import mixture_parts
from whichkl.solvers.rows.em_steps import Frame, State

_FIRST_FREEDOM = 10.0
"""Degrees of freedom of a Student-t component at the start."""
_MAX_MERGERS, _MAX_SPLITS = 3, 3
"""Largest number of pairs to merge, and of components to split for each of them."""
MAX_MOVES = _MAX_MERGERS * _MAX_SPLITS
"""Largest number of states that `split_and_merge` returns."""
_SPLIT_DISTANCE = 0.8
"""Distance of the halves of a split component from its mean, in standard deviations along the longest axis."""


class Move(NamedTuple):
    """A mixture of which some components are another one's."""

    state: State
    new: tuple[int, ...]
    """The numbers of those that aren't."""
    kept: tuple[int, ...]
    """The numbers that the others have in the other mixture."""


def seed_states(
    y: Float[Tensor, "n d"], w: Float[Tensor, " n"], starts: int, count: int, seed: int, *, is_student: bool
) -> State:
    """Return k-means++ starts: each next centre is drawn with probability proportional to w × squared distance to the nearest.

    Each centre is the best of 2 + log K draws, the one that leaves the least sum of these. Covariances start as the identity over
    K^(2/d), weights are equal, and the degrees of freedom are ten.

    Source: Arthur & Vassilvitskii (2007).
    """
    # k-means++ spreads the centres; starts that share a cluster are EM's usual bad optimum.
    generator = torch.Generator(y.device).manual_seed(seed)
    first = torch.multinomial(w, starts, replacement=True, generator=generator)
    centres = y[first][:, None]
    nearest = torch.cdist(y, centres[:, 0]).square()
    trials = 2 + int(math.log(count))
    for _ in range(1, count):
        chance = (w[:, None] * nearest).T + 1e-300
        drawn = y[torch.multinomial(chance, trials, replacement=True, generator=generator)]
        apart = torch.cdist(y, drawn.flatten(0, 1)).square_().unflatten(1, (starts, trials))
        left = torch.minimum(nearest[:, :, None], apart, out=apart)
        best = (w @ left.flatten(1)).view(starts, trials).argmin(1)
        each = torch.arange(starts, device="cpu")
        centres = torch.cat([centres, drawn[each, best][:, None]], 1)
        nearest = left[:, each, best]
    dim = y.shape[1]
    spread = torch.eye(dim, dtype=y.dtype, device=y.device) / max(1.0, count ** (1 / dim)) ** 2
    even = torch.full((starts, count), 1 / count, dtype=y.dtype, device=y.device)
    df = torch.full_like(even, _FIRST_FREEDOM) if is_student else None
    return State(even, centres, spread.expand(starts, count, dim, dim), df)


def state_of(model: Any, frame: Frame) -> State | None:
    """Return another mixture as a state of as many components, or one more or fewer; None if it is none of these."""
    if not isinstance(model, MixtureSameFamily):
        return None
    probs, loc, tril, df = mixture_parts(model)
    if (df is None) == frame.is_student or abs(frame.count - len(probs)) > 1 or len(probs) == 1:
        return None
    tril = tril / frame.scale[:, None]
    if frame.mixing is not None:
        tril = torch.linalg.solve_triangular(frame.mixing, tril, upper=False)
    return State(probs[None], frame.standard(loc)[None], (tril @ tril.mT)[None], None if df is None else df[None])


def moves_to(count: int, state: State) -> list[Move]:
    """Return up to three mixtures of one component more, where one is split, or of one fewer, where a pair i < j is merged."""
    size = state.probs.shape[1]
    if count > size:
        return [Move(split(state, k), (k, size), _without(size, k)) for k in widest(state)[:_MAX_SPLITS]]
    return [Move(merge(state, i, j), (i,), _without(size, i, j)) for i, j in nearest(state)]


def split_and_merge(state: State) -> list[Move]:
    """Return up to nine mixtures of as many components, three or more, in which two are merged and a third is split.

    Source: split and merge EM, Ueda, Nakano, Ghahramani & Hinton (2000).
    """
    found, size = [], state.probs.shape[1]
    for i, j in nearest(state):
        fewer, number = merge(state, i, j), _without(size, j)
        third = [k for k in widest(fewer) if k != i][:_MAX_SPLITS]
        found += [Move(split(fewer, k), (i, k, size - 1), _without(size, i, j, number[k])) for k in third]
    return found


def _without(size: int, *gone: int) -> tuple[int, ...]:
    return tuple(k for k in range(size) if k not in gone)


def nearest(state: State) -> list[tuple[int, int]]:
    """Return the pairs i < j of components that lose least when they are merged, the best first.

    That is by Runnalls' bound, ½ [(πᵢ + πⱼ) log|Σᵢⱼ| − πᵢ log|Σᵢ| − πⱼ log|Σⱼ|].

    Source: Runnalls (2007).
    """
    probs, loc, cov = state.probs[0], state.loc[0], state.cov[0]
    volume = _log_det(cov)
    weight = probs[:, None] + probs
    share = probs[:, None] / weight
    apart = loc[:, None] - loc
    between = (share * (1 - share))[..., None, None] * apart[..., :, None] * apart[..., None, :]
    merged = share[..., None, None] * cov[:, None] + (1 - share)[..., None, None] * cov + between
    cost = (weight * _log_det(merged) - probs[:, None] * volume[:, None] - probs * volume) / 2
    row, column = torch.triu_indices(len(probs), len(probs), 1, device="cpu")
    best = cost[row, column].argsort()[:_MAX_MERGERS]
    return list(zip(row[best].tolist(), column[best].tolist(), strict=True))


def widest(state: State) -> list[int]:
    """Return the components by volume, the largest first; those of little weight come last."""
    # A component with hardly any rows can be large by chance, and splitting it gains nothing.
    volume = torch.where(state.probs[0] > 0.25 / state.probs.shape[1], _log_det(state.cov[0]), -math.inf)
    order: list[int] = volume.argsort(descending=True).tolist()
    return order


def _log_det(cov: Float[Tensor, "... d d"]) -> Float[Tensor, ...]:
    """Log determinants by Cholesky: torch's LU of a batch can be wrong (see `whichkl.process.threads`)."""
    total: Tensor = 2 * torch.linalg.cholesky(cov).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return total


def merge(state: State, i: int, j: int) -> State:
    """Put one component with the moments of both in the place of i, and leave j out."""
    probs, loc, cov = state.probs[0], state.loc[0], state.cov[0]
    weight = probs[i] + probs[j]
    a, apart = probs[i] / weight, loc[i] - loc[j]
    moment = a * cov[i] + (1 - a) * cov[j] + a * (1 - a) * torch.outer(apart, apart)
    mean, keep = a * loc[i] + (1 - a) * loc[j], [k for k in range(len(probs)) if k != j]
    place = keep.index(i)
    fewer = state.each(lambda part: part[:, keep].clone())
    fewer.probs[0, place], fewer.loc[0, place], fewer.cov[0, place] = weight, mean, moment
    return fewer


def split(state: State, k: int) -> State:
    """Put two halves in the place of k and at the end, apart along its longest axis; together they keep its moments."""
    more = state.each(lambda part: torch.cat([part, part[:, k : k + 1]], 1))
    value, vector = torch.linalg.eigh(more.cov[0, k])
    step = _SPLIT_DISTANCE * value[-1].sqrt() * vector[:, -1]
    # The halves lie apart by ± step: with this covariance both together keep the moments of the whole.
    for half, sign in ((k, 1), (-1, -1)):
        more.cov[0, half] -= torch.outer(step, step)
        more.loc[0, half] += sign * step
        more.probs[0, half] /= 2
    return more
