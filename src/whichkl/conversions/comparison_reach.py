"""Comparison reach: how much mass a density that was fitted to comparisons has where nobody compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MixtureSameFamily

from whichkl.conversions.comparison_process import Process
from whichkl.particles import Particles, Reference, temper
from whichkl.particles.pool import Points, Pool
from whichkl.process.seeds import seeded
from whichkl.solvers.particles.value import student_t_around
from whichkl.targets import Target

_DRAWS = 4_096
_PARTICLES = 1_024
_DRAWS_FOR_LOG_Z = 16_384
"""With them, a value of a fit has an error of about a hundredth of a nat from the integral."""
_BASE_WIDTH = 1.5
"""Width of the Gaussian where particles start, per spread of the points."""
_MAX_POINTS = 4_000
"""Largest number of compared points whose distances are measured."""
_QUANTILE = 0.99
"""A draw is where nobody compared if this share of the compared points is nearer to another one than the draw is to any."""
MAX_SHARE_ELSEWHERE = 0.1
"""Share of the mass where nobody compared, above which a density isn't reliable."""
_MAX_LOG_Z_ERROR = 0.3
"""Largest standard error of log Z, in nats, at which the particles have settled."""


@dataclass(frozen=True)
class Reach:
    """What draws of a fitted density show."""

    elsewhere: float
    """Share of the mass that lies where nobody compared."""
    log_z: float = 0.0
    """log ∫ exp f(z) dz, in nats."""
    log_z_stderr: float = 0.0
    doubt: str = ""
    """Why the mass couldn't be measured well, as a sentence; empty if it could."""

    @property
    def is_known(self) -> bool:
        """Whether nearly all of the mass is known to lie where points were compared."""
        return self.elsewhere <= MAX_SHARE_ELSEWHERE and not self.doubt


def reach_of(model: Process | MixtureSameFamily, places: Places, seed: int) -> Reach:
    """Measure where a fitted density has its mass: by draws of a mixture, or by particles."""
    if isinstance(model, MixtureSameFamily):
        with seeded(seed):
            return Reach(places.share_elsewhere(model.sample((_DRAWS,))))
    d, device = places.points.shape[1], places.points.device
    eye = torch.eye(d, dtype=torch.float64, device="cpu")
    base = Reference(torch.zeros_like(eye[0]), _BASE_WIDTH * eye)
    found = temper(Target(log_prob=model.log_prob, dim=d, device=device), base, particles=_PARTICLES, seed=seed)
    doubt = ""
    if not found.finished or found.log_z_stderr > _MAX_LOG_Z_ERROR:
        doubt = "Particles couldn't follow the density, so that its integral isn't known: it isn't reliable."
    elsewhere = places.share_elsewhere(found.draws(_PARTICLES, seed).to(device))
    log_z = (found.log_z, found.log_z_stderr) if doubt else _log_z(model, found, device, seed)
    return Reach(elsewhere, *log_z, doubt)


def _log_z(model: Process, found: Particles, device: torch.device, seed: int) -> tuple[float, float]:
    """Return log ∫ exp f and its standard error by bridge sampling between particles and a wider law."""
    points = Points.of_particles(found)
    wide = student_t_around(points.x, points.weights)
    with seeded(seed):
        x = wide.sample((_DRAWS_FOR_LOG_Z,))
    log_p = model.log_prob(x.to(device)).to("cpu", torch.float64)
    pool = Pool.of(points, log_p, wide.log_prob(torch.cat([points.x, x])))
    return pool.log_z, pool.log_z_stderr()


@dataclass(frozen=True)
class Places:
    """Where points were compared, and the distance from all of them beyond which nobody compared."""

    points: Float[Tensor, "m d"]
    far: Float[Tensor, ""]

    @classmethod
    def of(cls, points: Float[Tensor, "m d"]) -> Places:
        """Take the distance that most points are from the next one at most."""
        points = torch.unique(points, dim=0)
        points = points[:: -(-len(points) // _MAX_POINTS)]
        between = torch.cdist(points, points)
        between.fill_diagonal_(torch.inf)
        return cls(points, between.amin(1).quantile(_QUANTILE))

    def share_elsewhere(self, draws: Float[Tensor, "n d"]) -> float:
        """Return the share of draws that are farther from every point."""
        return float((torch.cdist(draws, self.points).amin(1) > self.far).double().mean())
