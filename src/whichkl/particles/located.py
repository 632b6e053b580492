"""Located: particles of a target whose place and scale aren't known, from a Gaussian that short runs have made wide enough."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.particles.tempering import Particles, Reference, standard_base, temper
from whichkl.targets import Target

_MAX_SCOUTS = 6
"""Largest number of short runs that look for the place and the scale of p."""
_SCOUTS, _SCOUT_ISLANDS = 1_024, 8
_MIN_WIDTH = 1.5
"""Least width of a base in every direction, in standard deviations of the particles that come from it; else it is widened."""
_WIDTH = 2.0
"""By how many standard deviations of the particles the next base is wider."""
ISLANDS = 32
"""Number of islands of the long run."""
_CALLS = 150
"""About the number of calls of a long run, by which a budget limits the number of particles."""
_MAX_CALLS = 1_000
_SHARE_OF_BUDGET = 0.6
"""Largest share of a budget of evaluations that the particles use."""


def located_particles(target: Target, particles: int = 4_096, seed: int = 0) -> Particles:
    """Carry particles to p from a Gaussian whose place and scale short runs have found.

    The first run starts from N(0, 10² I). A base is wide enough if it is 1.5 times as wide as the particles that came from it,
    in every direction and about its own mean. Until it is, the next one begins at the mean of the particles, with the covariance
    of the last base plus four times that of the particles about its mean, and four times their mean variance in every direction:
    modes far from the first base are reached from one that covers them.
    The long run begins from the last base; it has 32 islands, and each rise of the temperature leaves 0.8 of them effective.

    Args:
        target: p in unconstrained coordinates.
        particles: n of the long run, a multiple of 32; fewer under a budget of evaluations.
        seed: fixes every random choice.

    Raises:
        TargetError: log p is −∞ around 0, or the particles didn't arrive at p.

    >>> far = Target(log_prob=lambda x: -(x - 300).square().sum(-1) / 2, dim=2)
    >>> found = located_particles(far, particles=512)
    >>> bool(((found.x.mean(0) - 300).abs() < 0.5).all()), found.finished
    (True, True)
    """
    base, budget = standard_base(target.dim), target.evaluations.most - target.evaluations.total
    if math.isfinite(budget):
        particles = max(2 * ISLANDS, min(particles, int(_SHARE_OF_BUDGET * budget / _CALLS) // ISLANDS * ISLANDS))
    for i in range(_MAX_SCOUTS):
        count = min(_SCOUTS, particles)
        scouts = temper(target, base, particles=count, islands=_SCOUT_ISLANDS, keep=0.3, leapfrogs=3, seed=seed + i + 1)
        around, mean = _spread_about(base.loc, scouts)
        if scouts.finished and _is_within(base, around):
            break
        # Never narrower than before: particles of a short run can have lost modes, which only a wide base finds again.
        # And wider in directions where nothing was found too: other modes may lie as far away in these.
        even = around.trace() / target.dim * torch.eye(target.dim, dtype=torch.float64, device="cpu")
        wider = base.tril @ base.tril.T + _WIDTH**2 * (around + even)
        base = Reference(mean, torch.linalg.cholesky(wider))
    found = temper(
        target, base, particles=particles, islands=ISLANDS, keep=0.8, leapfrogs=5, last_moves=3, max_calls=_MAX_CALLS, seed=seed
    )
    if not found.finished:
        because = (
            f"after {found.calls:,} calls of its log density the particles hadn't arrived at p's inverse temperature, 1 (they "
            f"were at {found.temperatures[-1]:.2g}), as where the density doesn't fall off"
        )
        raise TargetError(cannot("carry particles to this target", because, "Give `samples=` of it, or minimise reverse KL"))
    return found


def _spread_about(center: Float[Tensor, " d"], found: Particles) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """Return E (x − c)(x − c)ᵀ over weighted particles, and their mean."""
    w, apart = found.log_weights.exp()[:, None], found.x - center
    return (w * apart).T @ apart, (w * found.x).sum(0)


def _is_within(base: Reference, around: Float[Tensor, "d d"]) -> bool:
    """Return whether a base is wide enough, in every direction, for the particles that came from it."""
    half = torch.linalg.solve_triangular(base.tril, around, upper=False)
    relative = torch.linalg.solve_triangular(base.tril, half.T, upper=False)
    return float(torch.linalg.matrix_norm(relative, ord=2)) * _MIN_WIDTH**2 <= 1
