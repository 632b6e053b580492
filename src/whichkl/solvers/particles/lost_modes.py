"""Lost modes: narrow modes that tempered particles never met; ascents from all over the place find them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.importance import effective_sample_size
from whichkl.particles.pool import Points
from whichkl.process.seeds import seeded
from whichkl.solvers.ascents import Peaks, ascend
from whichkl.solvers.particles.value import student_t_around
from whichkl.targets import Target

Density = Callable[[Tensor], tuple[Tensor, Tensor]]

_MAX_STARTS, _MAX_NUMBERS = 8_192, 1 << 16
"""Largest number of ascents, and of their coordinates: a basin that holds a thousandth of the volume is met by some of them."""
_STARTS_PER_PARTICLE = 2
_WIDTH = 1.75
"""Standard deviation of the starts, in those of the particles: a mode that these missed may lie outside of them."""
_MAX_CALLS, _PATIENCE = 40, 2.0
_MAX_DECREMENT = 0.01
"""Largest rise, in nats, that a quasi-Newton step still promises at the end of an ascent."""
_MAX_MODES = 64
_DRAWS_PER_MODE = 256
_MIN_SHARE = 1e-3
"""Least share of p's mass at a mode that is added."""
_MAX_MET = 0.1
"""Largest part of that share at the particles near the mode, at which they count as having lost it."""
_BEYOND = 0.001
"""Share of a Gaussian with the mode's curvature that lies outside of its ellipsoid."""
_MIN_CURVATURE = 1e-8
_STEP = 1e-4
"""Step of central differences of the gradient, in standard deviations of the particles."""


@dataclass(frozen=True)
class Mode:
    """Weighted points about a mode, and log p's integral over the ellipsoid that they fill."""

    top: Float[Tensor, " d"]
    x: Float[Tensor, "m d"]
    log_p: Float[Tensor, " m"]
    log_weights: Float[Tensor, " m"]
    """Natural logs; their sum of exponentials is the integral."""

    @property
    def log_mass(self) -> float:
        """Log ∫ p̃ over the ellipsoid, in nats."""
        return float(self.log_weights.logsumexp(0))

    @property
    def error(self) -> float:
        """The relative standard error of that integral."""
        return float(effective_sample_size(self.log_weights) ** -0.5)


def with_lost_modes(target: Target, points: Points, log_z: float, seed: int) -> tuple[Points, str]:
    """Add points at the modes that no particle has met, with their mass; return all points, and a note on what was added.

    While the temperature falls, a mode that is k times narrower than the others in d directions holds about k⁻ᵈ of its later
    mass, so that all particles may miss it. Ascents from a Gaussian wider than the particles end at such a mode if they start in
    its basin. Its mass is that of p̃ over a Gaussian with its curvature, by importance sampling.

    Args:
        target: p in unconstrained coordinates.
        points: the particles, as points of p.
        log_z: their log ∫ p̃, in nats.
        seed: fixes the starts and the draws.
    """
    wide = student_t_around(points.x, points.weights)
    dim = points.x.shape[1]
    count = min(_STARTS_PER_PARTICLE * len(points.x), _MAX_STARTS, _MAX_NUMBERS // dim)
    if target.evaluations.most - target.evaluations.total < _MAX_CALLS * count:
        return points, ""

    def density(y: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        value, score = target.trial((wide.loc + y @ wide.scale_tril.T).to(target.device))
        return value.to("cpu", torch.float64), score.to("cpu", torch.float64) @ wide.scale_tril

    rejected = target.evaluations["rejected"]
    with seeded(seed):
        starts = _WIDTH * torch.randn(count, dim, dtype=torch.float64, device="cpu")
        y = torch.linalg.solve_triangular(wide.scale_tril, (points.x - wide.loc).T, upper=False).T
        modes = _lost(density, starts, y, points.weights, log_z - float(wide.scale_tril.diagonal().log().sum()))
    target.evaluations["rejected"] = rejected  # the starts lie far from p, where a density that fails does no harm
    if not modes:
        return points, ""
    shift = float(wide.scale_tril.diagonal().log().sum())
    masses = torch.tensor([log_z - shift, *(one.log_mass for one in modes)], dtype=torch.float64, device="cpu")
    total = masses.logsumexp(0)
    x = torch.cat([points.x, *(wide.loc + one.x @ wide.scale_tril.T for one in modes)])
    log_p = torch.cat([points.log_p, *(one.log_p for one in modes)])
    weights = torch.cat([points.weights * (masses[0] - total).exp(), *((one.log_weights - total).exp() for one in modes)])
    groups = torch.cat([points.groups, int(points.groups.max()) + 1 + torch.arange(len(x) - len(points.x), device="cpu")])
    share = float(1 - (masses[0] - total).exp())
    found = f"{len(modes)} mode{'s' * (len(modes) > 1)} with {share:.1%} of the mass"
    return Points(x, log_p, weights, groups, points.effective), f"{found} escaped the particles, and ascents found them"


def _lost(
    density: Density, starts: Float[Tensor, "n d"], y: Float[Tensor, "m d"], weights: Float[Tensor, " m"], log_z: float
) -> list[Mode]:
    """Climb from every start, and return the modes at the ends that hold mass which the points y don't have."""
    ends = ascend(lambda at, _: density(at), starts, tolerance=_MAX_DECREMENT, max_calls=_MAX_CALLS, patience=_PATIENCE)
    found = list[Mode]()
    for mode, met in modes_at(density, ends, _MAX_DECREMENT, y, weights):
        share = 1 / (1 + math.exp(min(700.0, log_z - mode.log_mass)))
        if share > _MIN_SHARE and met < _MAX_MET * share:
            found.append(mode)
    return found


def modes_at(
    density: Density,
    ends: Peaks,
    tolerance: float,
    y: Float[Tensor, "m d"],
    weights: Float[Tensor, " m"],
    *,
    most: int = _MAX_MODES,
    draws: int = _DRAWS_PER_MODE,
) -> Iterator[tuple[Mode, float]]:
    """Yield the modes at the ends of ascents, highest first, each with the weight of the points y in its ellipsoid.

    Args:
        density: log p and its gradient at points.
        ends: the ends; those at which a step still promises more than `tolerance` nats are left out.
        tolerance: that largest rise.
        y: points of p.
        weights: their weights.
        most: largest number of ends that are looked at, none of them in the ellipsoid of an earlier one.
        draws: number of draws that measure a mode.
    """
    order = ends.value.argsort(descending=True)
    left = ends.x[order[(ends.value.isfinite() & (ends.decrement <= tolerance))[order]]]
    for _ in range(most):
        if not len(left):
            return
        top, root = left[0], _root(density, left[0])
        if root is None:
            left = left[1:]
            continue
        left = left[~_is_within((left - top) @ root)]
        met = float(weights[_is_within((y - top) @ root)].sum())
        yield _measured(density, top, root, draws), met


def _is_within(z: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Return which draws of N(0, I) lie in its ellipsoid."""
    square = z.square().sum(1)
    # The chance of a larger distance, not its quantile: SciPy's takes a tenth of a second to load in a first fit.
    beyond: Tensor = torch.special.gammaincc(torch.full_like(square, z.shape[1] / 2), square / 2)
    return beyond > _BEYOND


def _root(density: Density, top: Float[Tensor, " d"]) -> Float[Tensor, "d d"] | None:
    """Return L of −∇² log p = LLᵀ at a mode, with orthogonal columns; None if that isn't positive definite."""
    dim = len(top)
    steps = _STEP * torch.eye(dim, dtype=torch.float64, device="cpu")
    slope = density(torch.cat([top + steps, top - steps]))[1].view(2, dim, dim)
    hessian = (slope[1] - slope[0]) / (2 * _STEP)
    if not bool(hessian.isfinite().all()):
        return None
    size, axes = torch.linalg.eigh((hessian + hessian.T) / 2)
    return axes * size.sqrt() if float(size[0]) > _MIN_CURVATURE * float(size[-1]) else None


def _measured(density: Density, top: Float[Tensor, " d"], root: Float[Tensor, "d d"], draws: int) -> Mode:
    """Weight draws of the Gaussian with a mode's curvature, inside of its ellipsoid, to p̃."""
    dim = len(top)
    z = torch.randn(draws, dim, dtype=torch.float64, device="cpu")
    own = z.square().sum(1)
    scale = root.norm(dim=0)  # the columns are orthogonal
    x = top + z @ (root / scale.square()).T  # (x − top) root = z
    log_p = density(x)[0]
    log_q = -own / 2 - dim * math.log(2 * math.pi) / 2 + float(scale.log().sum())
    kept = _is_within(z) & log_p.isfinite()
    return Mode(top, x[kept], log_p[kept], (log_p - log_q)[kept] - math.log(draws))
