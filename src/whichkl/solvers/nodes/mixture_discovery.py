"""Mixture discovery: the places where a mixture lacks mass, and the components to add there."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.nodes.ensemble import Ensemble, log_density
from whichkl.solvers.nodes.starts import climb_to_modes
from whichkl.targets import Target

_DRAWS = 1024
"""Number of draws among which places that lack mass are sought."""
_MAX_ASCENTS = 48
"""Largest number of places from which ascents to modes begin."""
_STRETCHES = (1.5, 3.0, 8.0)
"""Factors by which these draws are spread."""
_MIN_DISTANCE = 3.0
"""Standard deviations. Smallest distance of a new mode from every component."""
_MIN_LOG_SHARE = -12.0
"""Smallest logarithm of a new component's share; one of less isn't worth its nodes."""


def find_missing_mass(
    target: Target, model: Ensemble, points: Float[Tensor, "c d"], most: int, seed: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"], Float[Tensor, "n d d"]]:
    """Return log weights, means and factors of at most `most` components for the places where log p − log q is largest.

    The candidates are draws of the mixture, spread 1.5 to 8 times as wide, and the given points. They are ranked by
    log p − max(log q, max log q − Δ), Δ = 20 + 2d, so that far tails don't outrank modes, and the best of them climb log p. A
    mode that is near no component gives its Laplace approximation, weighted by its evidence. If there is none, the target is
    curved rather than incomplete: the best candidate gets half the scale of its nearest component.

    Args:
        target: p in unconstrained coordinates.
        model: one mixture.
        points: further candidates.
        most: largest number of new components.
        seed: fixes the draws.

    Source: Arenz, Zhong & Neumann (2020), VIPS, for where components are added.
    """
    logits, loc, tril = (part[0].cpu() for part in (model.logits, model.loc, model.tril))
    pool = torch.cat([points, _spread(logits, loc, tril, seed)])
    log_p = target.tried(pool.to(target.device)).cpu()
    log_q = log_density(pool[None], logits[None], loc[None], tril[None])[0]
    dim = loc.shape[1]
    lacking = log_p - torch.maximum(log_q, log_q.max() - 20 - 2 * dim)
    lacking = torch.where(lacking.isfinite(), lacking, -math.inf)
    order = lacking.argsort(descending=True)[:_MAX_ASCENTS]
    best = order[lacking[order] > -math.inf]
    if not len(best):
        return logits[:0], loc[:0], tril[:0]
    modes = climb_to_modes(target, pool[best], most + len(loc), max_calls=60)
    white = torch.linalg.solve_triangular(tril[None], (modes.locs[:, None] - loc)[..., None], upper=False)[..., 0]
    mass = modes.evidence + dim / 2 * math.log(2 * math.pi) + float(model.loss[0])
    is_new = (torch.linalg.vector_norm(white, dim=-1) > _MIN_DISTANCE).all(-1) & (mass > _MIN_LOG_SHARE)
    if bool(is_new.any()):
        chosen = is_new.nonzero()[:, 0]
        chosen = chosen[mass[chosen].argsort(descending=True)][:most]
        return mass[chosen], modes.locs[chosen], modes.trils[chosen]
    place = pool[best[0]]
    near = torch.linalg.vector_norm(torch.linalg.solve_triangular(tril, (place - loc)[..., None], upper=False)[..., 0], dim=-1)
    nearest = int(near.argmin())
    return logits[nearest : nearest + 1] - 2, place[None], tril[nearest : nearest + 1] / 2


def add_components(
    model: Ensemble, log_mass: Float[Tensor, " n"], loc: Float[Tensor, "n d"], tril: Float[Tensor, "n d d"]
) -> Ensemble:
    """Return one mixture with further components; masses are relative to its own, and at least a hundredth of an equal share."""
    count = model.loc.shape[1] + len(loc)
    mass = log_mass.clamp(min=math.log(0.01 / count), max=math.log(10.0)).to(model.logits)
    logits = torch.cat([model.logits[0], mass]).log_softmax(0)
    parts = (torch.cat([own[0], new.to(own)]) for own, new in ((model.loc, loc), (model.tril, tril)))
    loc, tril = (part[None] for part in parts)
    return model.on(model.nodes, (logits[None], loc, tril))


def _spread(logits: Float[Tensor, " k"], loc: Float[Tensor, "k d"], tril: Float[Tensor, "k d d"], seed: int) -> Tensor:
    """Return draws of the mixture, each spread about its component's mean."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(torch.full_like(logits, 1.0).exp(), _DRAWS, replacement=True, generator=generator)
    z = torch.randn(_DRAWS, loc.shape[1], generator=generator, dtype=loc.dtype, device="cpu")
    stretch = torch.tensor(_STRETCHES, dtype=loc.dtype, device="cpu").repeat(_DRAWS)[:_DRAWS]
    return loc[which] + stretch[:, None] * torch.einsum("nij,nj->ni", tril[which], z)
