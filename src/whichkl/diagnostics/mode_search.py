"""Mode search: whether p has modes that q doesn't reach. Importance weights can't show them; particles from elsewhere can."""

from __future__ import annotations

import math
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.access import Access
from whichkl.diagnostics.basins import joined, labels, log_masses, spread_out
from whichkl.diagnostics.beyond import mass_beyond
from whichkl.diagnostics.models import reference_around
from whichkl.diagnostics.result import MissingModes, is_missed
from whichkl.particles import Reference, temper
from whichkl.process.seeds import seeded
from whichkl.solvers import Solution
from whichkl.solvers.ascents import Peaks, ascend
from whichkl.targets import Target

_QUANTILE = 1e-4
"""q doesn't reach points where log q is below this quantile under q."""
_DRAWS_OF_Q = 10_000
_CLIMBING_DRAWS = 64
"""Number of draws of q that climb log p."""
_MIN_DRAWS_AT_OWN_MODE = 4
"""Smallest number of these that make a mode q's own; fewer may have crossed a saddle from a tail."""
_WEIGHTED_DRAWS = 1_000
"""Number of draws of q that measure the mass that q reaches."""
_START_WIDTH = 20.0
"""Standard deviation of the Gaussian that the particles start from, in those of q."""
_MAX_DIM = 200
_MANY_PARTICLES = 512
_MIN_SHARE = 1e-4
"""Smallest share of p's mass at a mode that is listed."""
_MAX_LISTED_MODES = 20
_MAX_MODES_WITHOUT_CROSSING = 4
"""Largest number of missing modes at which no others are sought next to q in one coordinate."""
_MIN_DISTANCE = 3.0
"""Least distance of a mode from q's mean in one coordinate, in standard deviations, at which it differs there."""
_temper = partial(temper, islands=8, keep=0.3, leapfrogs=2, last_moves=1)
_INDEPENDENT = 0.25
"""Share of the particles that count as independent, after few moves."""
_MAX_ASCENT_CALLS = 60
_MAX_DECREMENT = 1e-8
"""Largest rise, in nats, that a quasi-Newton step still promises at the end of an ascent."""


def missing_modes(
    target: Target,
    solution: Solution,
    seed: int = 0,
    draws: Float[Tensor, "n d"] | None = None,
    particles: int | None = None,
    largest: float | None = None,
) -> MissingModes:
    """Look for modes of p that the best model of a solution doesn't reach.

    Draws of p show where p's mass may be; without them, particles do (`whichkl.particles.temper`, from a Gaussian 20 times as
    wide as q and twice as wide as the spread of the optima). Those with log q below its 10⁻⁴ quantile under q climb log p, and
    so do draws of q. A missing mode is an end of ascents that hardly any draw of q reaches, if every straight line from it to
    an end of q's draws dips by a nat or more: so a family too small for skewness, heavy tails or a funnel isn't reported as a
    missing mode. Importance sampling about each mode measures p's mass m where log q is below that quantile. A region with
    mass m under p and ε under q costs KL(q‖p) ≥ −(1 − ε) log(1 − m) + ε log ε (the data-processing inequality); here ε ≤ 10⁻⁴.

    The solution and the draws of the best model, by default 10,000 fresh ones, are in free coordinates. There are 512 particles
    by default, or fewer in many dimensions and where a log density takes one point at a time. `largest` is the largest log p −
    log q at draws of q; with it, `beyond` is measured, too.

    Source: Del Moral, Doucet & Jasra (2006) for the particles; Dai, Heng, Jacob & Whiteley (2022).
    """
    free = target if target.bijection.is_discrete else target.unconstrained()
    reason = _why_not(free)
    if reason is not None:
        return MissingModes(0.0, 0.0, None, 0.0, 0, (), (), target.names, 0.0, "none", "nowhere", 0, 0, reason)
    spent, refused = free.evaluations["score"], free.evaluations["rejected"]
    found = _Search(target, free, solution, seed, draws, particles).run(spent, largest)
    free.evaluations["rejected"] = refused  # the search alone goes that far out, where a density that fails does no harm
    return found


def particles_for(target: Target) -> int | None:
    """Return the number of particles of a search; None if it uses draws of p instead."""
    if target.access.can_sample or target.density is None:
        return None
    cost = 1 if target.density.differentiable or target.score else 2 * target.dim + 1
    if not target.density.batched:
        return _MANY_PARTICLES // 4
    return _MANY_PARTICLES if target.dim <= 30 and cost < 10 else _MANY_PARTICLES // 2


def _why_not(free: Target) -> str | None:
    """Return why no search makes sense, or None."""
    if free.bijection.is_discrete:
        is_counted = Access.ENUMERABLE in free.access
        return "every state of the target is counted, so the value is exact" if is_counted else "the target is discrete"
    if free.density is None:
        return "the target has no log density"
    if free.dim > _MAX_DIM:
        return f"in {free.dim} dimensions (more than {_MAX_DIM}) the search would cost more than the fit"
    return None


class _Search:
    """One search, in coordinates in which q has mean 0 and covariance I."""

    def __init__(
        self,
        target: Target,
        free: Target,
        solution: Solution,
        seed: int,
        draws: Float[Tensor, "n d"] | None,
        particles: int | None = None,
    ) -> None:
        self.target, self.free, self.seed, self.calls = target, free, seed, 0
        self.model: Distribution = solution.best.model
        self.particles = particles
        if draws is None:
            with seeded(seed + 11):
                draws = self.model.sample((_DRAWS_OF_Q,)).reshape(_DRAWS_OF_Q, -1)
        x = draws.to("cpu", torch.float64)
        self.frame = reference_around(x)
        self.y = self.whiten(x)
        self.height = self.log_q(self.y)
        self.least = self.height.kthvalue(max(1, round(_QUANTILE * len(x)))).values
        self.spread = self.whiten(torch.stack([_mean(one.model, self.frame.loc) for one in solution.optima]))
        known = x[:0] if free.known_modes is None else free.known_modes.to("cpu", torch.float64)
        self.known = torch.cat([self.spread, self.whiten(known)])
        """Other optima of the fit, and modes that an earlier search found."""

    def whiten(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Carry free coordinates to those in which q is standardised."""
        y: Tensor = torch.linalg.solve_triangular(self.frame.tril, (x - self.frame.loc).T, upper=False).T
        return y

    def density(self, y: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Return log p (up to its constant) and its gradient in the standardised coordinates, with the volume of the map."""
        self.calls += 1
        value, score = self.free.trial(self.frame.place(y).to(self.free.device))
        volume = self.frame.tril.diagonal().log().sum()
        return value.to("cpu", torch.float64) + volume, score.to("cpu", torch.float64) @ self.frame.tril

    def log_q(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log density of q in the standardised coordinates."""
        x = self.frame.place(y).to(self.free.device)
        value = self.model.log_prob(x if len(self.model.event_shape) else x[:, 0]).detach().to("cpu", torch.float64)
        return value + self.frame.tril.diagonal().log().sum()

    def reached(self, y: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        """Whether log q is above its quantile under q."""
        return self.log_q(y) >= self.least

    def run(self, before: int, largest: float | None = None) -> MissingModes:
        """Find points of p, climb from those that q doesn't reach, and measure the mass at the ends."""
        y, weight, weighs, method, searched = self._points()
        beyond = None
        if largest is not None and weighs:
            ratio = self.density(y)[0] - self.log_q(y)
            beyond = mass_beyond(ratio, weight, largest, independent=1.0 if method == "draws of p" else _INDEPENDENT)
        unreached = ~self.reached(y) & (weight > 0)
        missing, unresolved = torch.zeros_like(unreached), 0.0
        modes, shares, mass, stderr, least = y[:0], y.new_zeros(0), 0.0, 0.0, 0.0
        optima = self.known[~self.reached(self.known)]
        if bool(unreached.any()) or len(optima):
            modes, which = self._missing(y[unreached], optima)
            shares, mass, stderr, least = self._shares(modes)
            is_mode = shares > _MIN_SHARE
            missing[unreached] = torch.where(which >= 0, is_mode[which.clamp(min=0)] if len(modes) else False, False)
            unresolved = float(weight[unreached & ~missing].sum())
            if len(modes) > _MAX_MODES_WITHOUT_CROSSING or (len(modes) and not is_missed(mass, stderr)):
                # Particles may have found only the lightest of very many modes.
                nearer, _ = self._missing(torch.cat([modes, self._crossed(modes, shares)]), optima[:0])
                again = self._shares(nearer)
                if again[1] > mass:
                    modes, (shares, mass, stderr, least) = nearer, again
                    is_mode = shares > _MIN_SHARE
            modes, shares = modes[is_mode], shares[is_mode]
        order = shares.argsort(descending=True)[:_MAX_LISTED_MODES]
        places = self.target.bijection.forward(self.frame.place(modes[order]).to(self.target.device, self.target.dtype))
        return MissingModes(
            mass=mass,
            stderr=stderr,
            by_particles=float(weight[missing].sum()) if weighs else None,
            least_kl=least,
            count=len(shares),
            modes=tuple(tuple(one) for one in places.tolist()),
            shares=tuple(shares[order].tolist()),
            names=self.target.names,
            unresolved=unresolved,
            method=method,
            searched=searched,
            gradients=self.free.evaluations["score"] - before,
            calls=self.calls,
            beyond=beyond,
        )

    def _points(self) -> tuple[Tensor, Tensor, bool, str, str]:
        """Points of p with weights, in standardised coordinates; whether the weights are right; the method, and its range."""
        p = self.free.thinned()[0]
        if p.access.can_sample:
            x = (p.draws(2_000, self.seed + 12) if p.samples is None else p.samples).to("cpu", torch.float64)
            w = torch.ones_like(x[:, 0]) if p.weights is None else p.weights.to("cpu", torch.float64)
            return self.whiten(x), w / w.sum(), True, "draws of p", f"where its {len(x):,} draws are"
        dim = self.free.dim
        apart = self.spread - self.spread.mean(0)
        base = torch.eye(dim, dtype=torch.float64, device="cpu") * _START_WIDTH**2 + 4 * apart.T @ apart / len(apart)
        tril = torch.linalg.cholesky(base)
        start = Reference(self.frame.place(self.spread.mean(0)[None])[0], self.frame.tril @ tril)
        count = self.particles or particles_for(self.free) or _MANY_PARTICLES
        cloud = _temper(self.free, start, particles=count, max_calls=64 if dim <= 30 else 120, seed=self.seed + 12)
        self.calls += cloud.calls
        width = float(torch.linalg.vector_norm(tril, dim=1).max())
        searched = f"from a Gaussian {width:.0f} times as wide as the fit" + ("" if cloud.finished else ", and not to its end")
        return self.whiten(cloud.x), cloud.log_weights.exp(), cloud.finished, "particles", searched

    def _missing(self, y: Float[Tensor, "n d"], optima: Float[Tensor, "o d"]) -> tuple[Tensor, Tensor]:
        """Return modes that q doesn't reach, and for every point of `y` the mode that it belongs to, −1 for none.

        Other optima of the fit and known modes climb too.
        """
        chosen, nearest = spread_out(y, min(128, max(24, 2400 // y.shape[1])))
        start = torch.cat([self.y[:_CLIMBING_DRAWS], optima, y[chosen]])
        ends = ascend(lambda at, _: self.density(at), start, tolerance=_MAX_DECREMENT, max_calls=_MAX_ASCENT_CALLS)
        arrived = ends.value.isfinite() & (ends.decrement <= _MAX_DECREMENT)
        label = labels(self.density, ends.x, ends.value)
        held = torch.bincount(label[:_CLIMBING_DRAWS], minlength=int(label.max()) + 1) >= _MIN_DRAWS_AT_OWN_MODE
        seen = held[label] if bool(held.any()) else torch.arange(len(label), device="cpu") < _CLIMBING_DRAWS
        tops: list[Tensor] = []
        number = torch.full_like(held, -1, dtype=torch.long)
        for one in (~held).nonzero()[:, 0].tolist():
            rows = ((label == one) & arrived).nonzero()[:, 0]
            if len(rows):
                number[one] = len(tops)
                tops.append(ends.x[rows[ends.value[rows].argmax()]])
        which = number[label[_CLIMBING_DRAWS + len(optima) :]][nearest]
        if not tops:
            return y[:0], which
        candidates = torch.stack(tops)
        alone = self._alone(candidates, ends, seen)
        place = torch.where(alone, torch.cumsum(alone, 0) - 1, -1)
        return candidates[alone], torch.where(which >= 0, place[which.clamp(min=0)], -1)

    def _crossed(self, modes: Float[Tensor, "k d"], shares: Float[Tensor, " k"]) -> Float[Tensor, "c d"]:
        """Return points at q's mean but for one coordinate, which is that of the heaviest mode that is far there.

        If many coordinates each have modes of their own, the heavy modes differ from q in one coordinate.
        """
        modes = modes[shares.argsort(descending=True)]
        far = modes.abs() > _MIN_DISTANCE
        columns = far.any(0).nonzero()[:, 0]
        points = modes.new_zeros(len(columns), modes.shape[1])
        points[torch.arange(len(columns), device="cpu"), columns] = modes[far[:, columns].int().argmax(0), columns]
        return points

    def _alone(self, modes: Float[Tensor, "k d"], ends: Peaks, seen: Bool[Tensor, " e"]) -> Bool[Tensor, " k"]:
        """Whether every straight line from a mode to an end that q reaches has a dip."""
        value = self.density(modes)[0]
        order = ends.value[seen].argsort(descending=True)
        x, height = ends.x[seen][order], ends.value[seen][order]
        pick, _ = spread_out(x, 4)
        goals, heights = x[pick], height[pick]
        k, g = len(modes), len(goals)
        a, b = modes.repeat_interleave(g, 0), goals.repeat(k, 1)
        lower = torch.minimum(value.repeat_interleave(g), heights.repeat(k))
        return ~joined(self.density, a, b, lower).view(k, g).any(1)

    def _shares(self, modes: Float[Tensor, "k d"]) -> tuple[Float[Tensor, " k"], float, float, float]:
        """Each mode's share of the mass at all modes and where q reaches; their sum, its error, and −log(1 − sum).

        The last uses the logarithms of the masses, since float64 may not distinguish the sum from 1.
        """
        if len(modes) == 0:
            return modes.new_zeros(0), 0.0, 0.0, 0.0
        generator = torch.Generator().manual_seed(self.seed + 13)
        mass, error = log_masses(self.density, modes, self.reached, generator)
        height = self.height[:_WEIGHTED_DRAWS]
        weight = self.density(self.y[:_WEIGHTED_DRAWS])[0] - height
        weight = torch.where(height > self.least, weight, -math.inf)  # the others lie where the modes' masses are counted
        near = torch.logsumexp(weight, 0) - math.log(_WEIGHTED_DRAWS)
        whole = torch.logsumexp(torch.cat([mass, near[None]]), 0)
        if float(whole) == -math.inf:
            return modes.new_zeros(len(modes)), 0.0, 0.0, 0.0
        share, rest = (mass - whole).exp(), float((near - whole).exp())
        missed = float(share.sum())
        from_q = rest * float((weight - near).exp().std()) / math.sqrt(_WEIGHTED_DRAWS) if rest > 0 else 0.0
        stderr = math.hypot(rest * float(torch.linalg.vector_norm(share * error)), missed * from_q)
        return share, missed, stderr, max(0.0, float(whole - near))


def _mean(model: Distribution, otherwise: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The mean of an optimum in free coordinates; the mean of the best optimum's draws if it is unknown or infinite."""
    try:
        mean = model.mean.detach().reshape(-1).to("cpu", torch.float64)
    except NotImplementedError:
        return otherwise
    return mean if bool(mean.isfinite().all()) else otherwise
