"""Stein's identity: whether draws of p follow its log density."""

from __future__ import annotations

import math

import torch

from whichkl.targets import Target

_MAX_DRAWS = 2_000
_MIN_DRAWS = 30
_MIN_STANDARD_ERRORS = 6
_MIN_DEVIATION = 0.25
"""Least deviation from the identity that counts; its terms are of size 1."""


def accesses_disagree(target: Target, seed: int) -> bool:
    """Return whether E_p[∇log p] = 0 or E_p[xᵢ ∂ᵢ log p] = −1 fails on p's own draws, by six standard errors and a quarter.

    Source: Stein (1972); as a check of samples, Gorham & Mackey (2015).
    """
    if target.bijection.is_discrete:
        return False
    free = target.unconstrained()
    if not (free.access.can_sample and free.access.can_evaluate):
        return False
    free = free.thinned()[0]
    x = free.samples if free.samples is not None else free.draws(_MAX_DRAWS, seed + 3)
    if len(x) < _MIN_DRAWS or target.weights is not None:
        return False
    x = x[torch.linspace(0, len(x) - 1, min(len(x), _MAX_DRAWS), dtype=torch.float64, device="cpu").long()].to(torch.float64)
    value, score = free.trial(x)
    known = value.isfinite()
    if float(known.double().mean()) < 0.99:
        return True
    x, score = x[known] - x[known].median(0).values, score[known]
    scale = x.square().mean(0).sqrt().clamp(min=1e-300)
    terms = torch.cat([score * scale, x * score + 1], dim=1)
    off, stderr = terms.mean(0).abs(), terms.std(0) / math.sqrt(len(x))
    return bool(((off > _MIN_STANDARD_ERRORS * stderr) & (off > _MIN_DEVIATION)).any())
