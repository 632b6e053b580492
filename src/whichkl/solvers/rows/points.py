"""Points of p: its samples, draws, or a quadrature rule, over which forward KL takes its expectation under p."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import check_scales
from whichkl.access import Access
from whichkl.divergences.exact.quadrature import expectation_rule
from whichkl.targets import Target

FRESH = 65_536
"""Number of draws that replace the samples of a target that has a sampler alone."""


def points_of(target: Target, seed: int, share: float = 1.0) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Return points and weights (Σ w = 1) in float64: p's samples, else quadrature on the line, else fresh draws.

    Quadrature needs a sampler, to find the mass, and a log density of one variable; it makes the fit exact. `share` is the share
    of a budget that fresh draws may use.
    """
    if target.samples is not None:
        x = target.samples.to(torch.float64)
        w = torch.ones(len(x), dtype=torch.float64, device=x.device) if target.weights is None else target.weights
        w = w.to(torch.float64)
        return x, w / w.sum()
    if is_exact(target):
        x, w = expectation_rule(target)
        check_scales(x, target.names, "points of p")
        return x, w
    x = target.draws(fresh_count(target, share), seed).to(torch.float64)
    check_scales(x, target.names, "draws")
    return x, torch.full((len(x),), 1 / len(x), dtype=torch.float64, device=x.device)


def fresh_count(target: Target, share: float = 1.0) -> int:
    """Return the number of fresh draws of p: `FRESH`, or fewer under a budget of which they take this share, but at least 100."""
    counts = target.evaluations
    return int(min(FRESH, max(100, share * (counts.most - counts.total))))


def is_exact(target: Target) -> bool:
    """Return whether the expectation under p is by quadrature: one variable, a sampler, a log density, and no fixed samples."""
    return target.dim == 1 and target.samples is None and (Access.SAMPLER | Access.LOG_PROB) in target.access
