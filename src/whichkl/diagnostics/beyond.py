"""Beyond: mass of p where p/q is larger than at any draw of q. Importance weights of these draws, and their k̂, can't show it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.targets import Target

MAX_MASS = 0.01
"""Largest share of p's mass that weights may miss."""
_MARGIN = 1.0
"""Nats above the largest weight; less may be rounding, or the next draw."""
_DRAWS = 2_000


def mass_beyond(
    log_ratio: Float[Tensor, " n"], weight: Float[Tensor, " n"], largest: float, *, independent: float = 1.0
) -> float:
    """Return the share of p's mass, less two standard errors, at points of p whose log p − log q is a nat above `largest`.

    Args:
        log_ratio: log p − log q at points of p, up to the constant of `largest`.
        weight: the points' weights.
        largest: the largest log p − log q at draws of q.
        independent: the share of the points that count as independent ones.

    >>> mass_beyond(torch.tensor([0.0, 5.0]).repeat(500), torch.ones(1000), 1.0)
    0.468...
    """
    w = weight.double() / weight.double().sum()
    share = min(1.0, float(w[log_ratio > largest + _MARGIN].sum()))
    count = independent / float(w.square().sum())
    return max(0.0, share - 2 * math.sqrt(share * (1 - share) / count))


def mass_beyond_draws(target: Target, q: Target, largest: float, seed: int, most: int) -> float | None:
    """Return `mass_beyond` by 2,000 draws of p, or `most` if that is less; None where there are none."""
    count = min(_DRAWS, most)
    p = target.thinned()[0]
    if not p.access.can_sample or (p.sampler is None and p.samples is None):
        return None
    x = p.draws(count, seed) if p.samples is None else p.samples
    w = torch.ones_like(x[:, 0]) if p.weights is None else p.weights
    if len(x) > count:
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu")[:count].to(x.device)
        x, w = x[rows], w[rows]
    ratio = target.tried(x).detach().double() - q.log_prob(x).detach().double()
    return mass_beyond(ratio.cpu(), w.cpu(), largest)
