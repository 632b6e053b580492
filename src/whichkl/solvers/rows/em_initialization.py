"""Seeding: k-means++ starts of a mixture, several in one batch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.rows.em_expectation import State

_FIRST_FREEDOM = 10.0


def seed_states(
    y: Float[Tensor, "n d"], w: Float[Tensor, " n"], starts: int, count: int, seed: int, *, is_student: bool
) -> State:
    """Draw each next centre with probability proportional to w × its squared distance to the nearest one.

    Of 2 + log K draws the one is kept that leaves the least sum of these. Covariances begin as the identity over K^(2/d),
    weights even, degrees of freedom at ten.

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
