"""Located densities: densities with draws that show where their mass is, and two of them on one chart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.exact.boxes import Integral, integrate
from whichkl.divergences.exact.charts import Chart
from whichkl.divergences.exact.mass_search import search_mass
from whichkl.targets import Target

TOLERANCE = {1: 1e-11, 2: 1e-9, 3: 1e-7}
BUDGET = {1: 1_000_000, 2: 3_000_000, 3: 8_000_000}
"""Allowed relative error and number of points of one integration, by dimension."""


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
        """Use p's samples, draw from it, or search for its mass, starting from the points `near`.

        Raises:
            TargetError: the search finds nothing.
        """
        sought = None
        if p.samples is not None:
            draws = p.samples[:: max(1, len(p.samples) // 4096)][:4096]
        elif Access.SAMPLER in p.access:
            draws = p.draws(4096, seed=0)
        else:
            draws, sought = search_mass(p, near)
        draws = draws.to(torch.float64)
        bounds = p.bijection.bounds
        return cls(p, draws, bounds, float(p.log_prob(draws).detach().max()), Chart.fitting([draws], bounds), sought)

    def log_mass(self, whole: Integral | None = None) -> float:
        """Log of the integral of the density, checked: finite, and 1 where the density is given as normalised."""
        p, dim = self.target, self.target.dim
        if whole is None:

            def density(x: Tensor) -> Tensor:
                return torch.exp(p.log_prob(x).detach() - self.shift)[None]

            whole = integrate(density, self.chart, [self.draws], [[]] * dim, 0.0, TOLERANCE[dim], BUDGET[dim])
        mass = float(whole.value[0])
        error = float(whole.error[0]) / mass if mass > 0 else math.inf
        settled = error <= (1e-3 if p.normalized else 1e-6)
        if not (math.isfinite(mass) and mass > 0 and settled):
            raise TargetError(cannot("integrate this density", "its integral isn't finite", "Check the log density's tails"))
        log_mass = math.log(mass) + self.shift
        if self.sought is not None and abs(log_mass - self.sought) > 1:
            because = f"a search for its mass finds e^{self.sought:.2f}, and its integral there is e^{log_mass:.2f}"
            raise TargetError(cannot("integrate this density", because, "Pass `sampler=` or samples, which show where it is"))
        if p.normalized and abs(math.exp(log_mass) - 1) > max(1e-5, 2 * error):
            where = f"integrates to {math.exp(log_mass):.6g} where its mass is"
            because = f"it is given as normalised (`normalized=True`), and the density {where}"
            instead = "Normalise it, or pass `normalized=False`; or a narrow mode far from the rest was missed"
            raise TargetError(cannot("use this target", because, instead))
        return 0.0 if p.normalized and error > 1e-9 else log_mass


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

    @classmethod
    def of(cls, p: Target, q: Target) -> Ground:
        """Locate and integrate both.

        Raises:
            TargetError: the mass of one isn't found, or its integral isn't finite, or isn't 1 for a density given as normalised.
        """
        drawn = [p.access.can_sample, q.access.can_sample]
        if drawn[0] or not drawn[1]:
            one = Located.of(p)
            other = Located.of(q, one.draws)
        else:
            other = Located.of(q)
            one = Located.of(p, other.draws)
        bounds = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one.bounds, other.bounds, strict=True)]
        ends = [sorted({end for side in (one, other) for end in side.bounds[j] if math.isfinite(end)}) for j in range(p.dim)]
        draws = [one.draws, other.draws]
        notes = tuple(
            f"{name} can't be sampled: its mass was searched for, and a narrow mode far from the rest would be missed"
            for name, side in (("p", one), ("q", other))
            if side.sought is not None and not side.target.normalized
        )
        log_z = (one.log_mass(), other.log_mass())
        return cls(p, q, log_z, bounds, ends, draws, Chart.fitting(draws, bounds, ends), notes)

    def densities(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Both log densities, normalised."""
        return self.p.log_prob(x).detach() - self.log_z[0], self.q.log_prob(x).detach() - self.log_z[1]

    def swapped(self) -> Ground:
        """The same with p and q in each other's place."""
        return replace(self, p=self.q, q=self.p, log_z=self.log_z[::-1], draws=self.draws[::-1])
