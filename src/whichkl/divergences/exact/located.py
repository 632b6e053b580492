"""Located densities: densities with draws that show where their mass is, or a search for it, and two of them on one chart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.exact.boxes import Integral, integrate
from whichkl.divergences.exact.charts import MIN_WIDTH, Chart
from whichkl.targets import Target
from whichkl.targets.light_parts import mixture_weights

TOLERANCE = {1: 1e-11, 2: 1e-9, 3: 1e-7}
BUDGET = {1: 1_000_000, 2: 3_000_000, 3: 8_000_000}
"""Allowed relative error and number of points of one integration, by dimension."""
_MAX_MISSING_MASS = 1e-9
"""Mass that a normalised density in float64 may lack by rounding of its constant."""
_PARTICLES = 4096
_MAX_ROUNDS = 300
_MOVES_PER_ROUND = 6


class Mass(NamedTuple):
    """The log of the integral of a density where its mass is, and the mass that a normalised one lacks there."""

    log: float
    missing: float

    def doubts(self, name: str) -> tuple[str, ...]:
        """Why a divergence may be wrong."""
        if self.missing == 0:
            return ()
        where = f"{name} is given as normalised, and integrates to 1 − {self.missing:.1g} where its mass was looked for"
        return (f"{where}: a light part may lie far away, where the divergence can be large",)


@dataclass(frozen=True)
class Located:
    """A density with what shows where its mass is: draws, the ends of its support, its largest log density there.

    Where it can't be sampled, its mass is searched for, and `sought` holds the log mass that the search found.
    """

    target: Target
    draws: Float[Tensor, "n d"]
    bounds: list[tuple[float, float]]
    shift: float
    chart: Chart
    sought: float | None = None

    @classmethod
    def of(cls, p: Target, near: Float[Tensor, "n d"] | None = None) -> Located:
        """Use p's samples, draw from it, or search for its mass, starting from the points `near`."""
        sought = None
        if p.samples is not None:
            # Draws only place the first boxes of the integral, and 4,096 are enough for that.
            draws = p.samples[:: max(1, len(p.samples) // 4096)][:4096]
        elif Access.SAMPLER in p.access:
            draws = p.draws(4096, seed=0)
        else:
            draws, sought = search_mass(p, near)
        draws = draws.to(torch.float64)
        bounds = p.bijection.bounds
        return cls(p, draws, bounds, float(p.log_prob(draws).detach().max()), Chart.fitting([draws], bounds), sought)

    @property
    def sets(self) -> list[Tensor]:
        """The draws, and those of each part that is too light to be among them."""
        parts = [part.draws for part in self.target.light_parts]
        return [self.draws, *parts, *map(_spread, parts)]

    def notes(self, name: str) -> tuple[str, ...]:
        """What wasn't looked at."""
        if self.target.normalized:  # what is missed is missing from its mass
            return ()
        if self.sought is not None:
            return (f"{name} can't be sampled: its mass was searched for, and a narrow mode far from the rest would be missed",)
        seen = f"{len(self.draws):,} draws and even steps"
        return (
            f"{name} isn't normalised: its mass was looked for by {seen}, and a light part far from the rest would be missed",
        )

    def unresolved(self, chart: Chart, name: str) -> tuple[str, ...]:
        """Why a light part is out of reach: too narrow for its distance."""
        for part in self.target.light_parts:
            spread = (
                chart.to_unit(part.draws).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64, device="cpu"), 0).diff(dim=0)
            )
            if float(spread.min()) < 2 * MIN_WIDTH:
                where = ", ".join(f"{v:.4g}" for v in part.draws.median(0).values.tolist())
                return (f"a light part of {name} at ({where}) is too narrow for its distance, and was missed",)
        return ()

    def mass(self, whole: Integral | None = None) -> Mass:
        """The integral of the density, checked: finite, and 1 where the density is given as normalised."""
        p, dim = self.target, self.target.dim
        if whole is None:

            def density(x: Tensor) -> Tensor:
                return torch.exp(p.log_prob(x).detach() - self.shift)[None]

            whole = integrate(density, self.chart, self.sets, [[]] * dim, 0.0, TOLERANCE[dim], BUDGET[dim])
        mass = float(whole.value[0])
        error = float(whole.error[0]) / mass if mass > 0 else math.inf
        settled = error <= (1e-3 if p.normalized else 1e-6)
        if not (math.isfinite(mass) and mass > 0 and settled):
            raise TargetError(cannot("integrate this density", "its integral isn't finite", "Check the log density's tails"))
        log_mass = math.log(mass) + self.shift
        # Two independent routes to the mass: a nat between them means that one has found a mode that the other hasn't.
        if self.sought is not None and abs(log_mass - self.sought) > 1:
            because = f"a search for its mass finds e^{self.sought:.2f}, and its integral there is e^{log_mass:.2f}"
            raise TargetError(cannot("integrate this density", because, "Pass `sampler=` or samples, which show where it is"))
        if p.normalized and abs(math.exp(log_mass) - 1) > max(1e-5, 2 * error):
            where = f"integrates to {math.exp(log_mass):.6g} where its mass is"
            because = f"it is given as normalised (`normalized=True`), and the density {where}"
            instead = "Normalise it, or pass `normalized=False`; or a narrow mode far from the rest was missed"
            raise TargetError(cannot("use this target", because, instead))
        # The claim of a normalised density is more exact than a rough integral, and less exact than a good one.
        claimed = p.normalized and error > 1e-9
        missing = -math.expm1(log_mass) if p.normalized and not self._is_one_piece else 0.0
        rounding = _MAX_MISSING_MASS if p.density is not None and p.density.probe.dtype == torch.float64 else 1e-6
        return Mass(0.0 if claimed else log_mass, missing if missing > max(rounding, 10 * error) else 0.0)

    @property
    def _is_one_piece(self) -> bool:
        """Whether p is a law of torch's without components, on the whole line: its mass lacks no more than rounding."""
        law = self.target.law
        return law is not None and self.target.bijection.is_real and mixture_weights(law) is None


@dataclass(frozen=True)
class Ground:
    """Two densities on one chart: draws and ends of both, and the logs of their masses, by which they are normalised."""

    p: Target
    q: Target
    log_z: tuple[float, float]
    bounds: list[tuple[float, float]]
    ends: list[list[float]]
    draws: list[Tensor]
    chart: Chart
    notes: tuple[str, ...]
    doubts: tuple[str, ...]
    """Why what is computed here shouldn't be trusted."""
    within: Target | None = None
    """The target in whose free coordinates both are given; None where both are as they were."""

    @classmethod
    def of(cls, p: Target, q: Target) -> Ground:
        """Locate and integrate both."""
        # The one that can be sampled goes first: its draws show where to search for the other's mass.
        if p.access.can_sample or not q.access.can_sample:
            one = Located.of(p)
            other = Located.of(q, one.draws)
        else:  # draws of q show where to search for p
            other = Located.of(q)
            one = Located.of(p, other.draws)
        bounds = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one.bounds, other.bounds, strict=True)]
        ends = [sorted({end for side in (one, other) for end in side.bounds[j] if math.isfinite(end)}) for j in range(p.dim)]
        draws = [one.draws, other.draws]
        notes = one.notes("p") + other.notes("q")
        masses = one.mass(), other.mass()
        chart = Chart.fitting(draws, bounds, ends)
        doubts = masses[0].doubts("p") + masses[1].doubts("q") + one.unresolved(chart, "p") + other.unresolved(chart, "q")
        return cls(p, q, (masses[0].log, masses[1].log), bounds, ends, draws, chart, notes, doubts)

    @property
    def sets(self) -> list[Tensor]:
        """The draws of both, and those of each part that is too light to be among them."""
        parts = [part.draws for part in (*self.p.light_parts, *self.q.light_parts)]
        return [*self.draws, *parts, *map(_spread, parts)]

    def densities(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Both log densities, normalised."""
        return self.p.log_prob(x).detach() - self.log_z[0], self.q.log_prob(x).detach() - self.log_z[1]

    def swapped(self) -> Ground:
        """The same with p and q in each other's place."""
        return replace(self, p=self.q, q=self.p, log_z=self.log_z[::-1], draws=self.draws[::-1])


def _spread(part: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Draws of a part, three times as wide: they show its tails, which must be cut out of large boxes too."""
    middle = part.median(0).values
    return middle + 3 * (part - middle)


def search_mass(p: Target, near: Float[Tensor, "n d"] | None = None, seed: int = 0) -> tuple[Float[Tensor, "n d"], float]:
    """Approximate draws of p and log ∫ p̃ from its log density alone, by a sequential Monte Carlo sampler.

    Particles start from a heavy-tailed law around `near` (the origin without it) in p's free coordinates, and go to p by
    tempering, each time resampled and moved by random walks of many lengths. A mode that's narrow, and far from where they
    start and from the other modes, can be missed.

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
    # A heavy-tailed start can overflow on its way into the support.
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
        # The last temperature is p itself: more moves here let copies of one particle drift apart.
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
        # A draw at an end of the support has no finite free coordinate.
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
    # Lengths of 0.02 to 2: long walks exchange modes, short ones are accepted in narrow ones.
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
    # Bisection of the logarithm: a useful first step may be 1e-200 where log p is huge.
    low, high = math.log(1e-300), math.log(most)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(math.exp(middle)) >= len(log_ratio) / 2 else (low, middle)
    return math.exp(low)
