"""Mass search: draws of a density of a few variables that can only be evaluated, so that quadrature finds its mass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.targets import Target

_PARTICLES = 4096
_MAX_ROUNDS = 300
_MOVES_PER_ROUND = 6


def search_mass(p: Target, near: Float[Tensor, "n d"] | None = None, seed: int = 0) -> tuple[Float[Tensor, "n d"], float]:
    """Approximate draws of p and log ∫ p̃ from its log density alone, by a sequential Monte Carlo sampler.

    Particles start from a heavy-tailed law around `near` (the origin without it) in p's free coordinates, and go to p by
    tempering, each time resampled and moved by random walks of many lengths. A mode that's narrow, and far from where they
    start and from the other modes, can be missed.

    Args:
        p: a target with a log density, of a few variables.
        near: points that show the place and the scale on which to start.
        seed: of every random choice.

    Raises:
        TargetError: no point with mass is found, or the particles don't arrive.

    Source: Del Moral, Doucet & Jasra (2006).

    >>> from whichkl import Target
    >>> x, log_z = search_mass(Target(log_prob=lambda x: -(x[:, 0] - 50).square() / 2e-4, dim=1))
    >>> bool(abs(x.mean() - 50) < 0.001), bool(abs(log_z - math.log(0.01 * math.sqrt(2 * math.pi))) < 0.3)
    (True, True)
    """
    generator = torch.Generator().manual_seed(seed)
    free = p.unconstrained()
    start = _Start.around(p, near, free.dim)
    u = start.draw(generator)
    u = torch.where(p.bijection.contains(p.bijection.forward(u))[:, None], u, start.centre)
    log_p, log_w = _evaluated(free, u), start.log_prob(u)
    if not bool((log_p > -math.inf).any()):
        because = f"it is zero at {_PARTICLES:,} points around {start.centre.tolist()}"
        raise TargetError(cannot("find the mass of this density", because, "Pass `sampler=` or samples"))
    temper, log_z = 0.0, 0.0
    for _ in range(_MAX_ROUNDS):
        step = _step(log_p - log_w, 1 - temper)
        weight = step * (log_p - log_w)
        weight = torch.where(weight.isnan(), -math.inf, weight)
        log_z += float(torch.logsumexp(weight, 0)) - math.log(_PARTICLES)
        temper = min(1.0, temper + step)
        kept = torch.multinomial(torch.softmax(weight, 0), _PARTICLES, replacement=True, generator=generator)
        u, log_p, log_w = u[kept], log_p[kept], log_w[kept]
        for _ in range(_MOVES_PER_ROUND if temper < 1 else 4 * _MOVES_PER_ROUND):
            moved = _proposed(u, generator)
            new_p, new_w = _evaluated(free, moved), start.log_prob(moved)
            gain = temper * (new_p - log_p) + (1 - temper) * (new_w - log_w)
            yes = torch.rand(_PARTICLES, generator=generator, dtype=torch.float64, device="cpu").log() < gain
            u, log_p, log_w = torch.where(yes[:, None], moved, u), torch.where(yes, new_p, log_p), torch.where(yes, new_w, log_w)
        if temper == 1:
            return p.bijection.forward(u), log_z
    because = f"the search for it stopped at temperature {temper:.2g}"
    raise TargetError(cannot("find the mass of this density", because, "Pass `sampler=` or samples"))


@dataclass(frozen=True)
class _Start:
    """A multivariate Cauchy law, from which the particles start."""

    centre: Float[Tensor, " k"]
    scale: Float[Tensor, " k"]

    @classmethod
    def around(cls, p: Target, near: Float[Tensor, "n d"] | None, k: int) -> _Start:
        nothing = torch.zeros(k, dtype=torch.float64, device="cpu")
        points = nothing.expand(2, k) if near is None else p.bijection.inverse(near).to(torch.float64)
        points = points[points.isfinite().all(1)]
        centre = points.median(0).values if len(points) else nothing
        scale = (points - centre).abs().median(0).values if len(points) else nothing
        return cls(centre, 3 * torch.where(scale > 0, scale, torch.ones_like(scale)))

    def draw(self, generator: torch.Generator) -> Float[Tensor, "n k"]:
        normal = torch.randn(_PARTICLES, len(self.scale), generator=generator, dtype=torch.float64, device="cpu")
        shared = torch.randn(_PARTICLES, 1, generator=generator, dtype=torch.float64, device="cpu").abs().clamp(min=1e-6)
        return self.centre + self.scale * normal / shared

    def log_prob(self, u: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        k, y = len(self.scale), (u - self.centre) / self.scale
        constant = math.lgamma((k + 1) / 2) - (k + 1) / 2 * math.log(math.pi)
        return constant - self.scale.log().sum() - (k + 1) / 2 * torch.log1p(y.square().sum(1))


def _proposed(u: Float[Tensor, "n k"], generator: torch.Generator) -> Float[Tensor, "n k"]:
    """Symmetric random walks of many lengths, along differences of particles (differential evolution)."""
    away = u[torch.randint(_PARTICLES, (_PARTICLES,), generator=generator, device="cpu")]
    other = u[torch.randint(_PARTICLES, (_PARTICLES,), generator=generator, device="cpu")]
    length = 10 ** (2 * torch.rand(_PARTICLES, 1, generator=generator, dtype=torch.float64, device="cpu") - 1.7)
    jitter = torch.randn(u.shape, generator=generator, dtype=torch.float64, device="cpu") * u.std(0) * 1e-3
    return u + length * (away - other) + jitter


def _evaluated(free: Target, u: Tensor) -> Tensor:
    log_p = free.log_prob(u).detach().to(torch.float64)
    return torch.where(log_p.isnan(), -math.inf, log_p)


def _step(log_ratio: Float[Tensor, " n"], most: float) -> float:
    """The largest step in temperature that leaves half of the particles effective."""

    def effective(step: float) -> float:
        w = step * log_ratio
        return float(torch.exp(2 * torch.logsumexp(w, 0) - torch.logsumexp(2 * w, 0)))

    if effective(most) >= len(log_ratio) / 2:
        return most
    low, high = math.log(1e-300), math.log(most)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(math.exp(middle)) >= len(log_ratio) / 2 else (low, middle)
    return math.exp(low)
