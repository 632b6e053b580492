"""Mode search: does p have modes where q never goes? Importance weights can't tell, particles that look elsewhere can."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.access import Access
from whichkl.diagnostics.basins import joined, labels, log_masses, spread_out
from whichkl.diagnostics.missing_modes import MissingModes, is_missed
from whichkl.particles import Reference, temper
from whichkl.process.seeds import seeded
from whichkl.solvers import Solution
from whichkl.solvers.nodes.batched_lbfgs import Peaks, ascend
from whichkl.targets import Target

_QUANTILE = 1e-4
_OF_Q = 10_000
_FROM_Q, _OWN = 64, 4
"""Draws of q that climb, and how many of them make a mode q's own: fewer may have come over a saddle from a tail."""
_WEIGHED = 1_000
_REACH = 20.0
"""Standard deviations of q, from which the particles start."""
_WIDEST = 200
_LEAST = 1e-4
"""Modes with a smaller share aren't named."""
_SHOWN = 20
_SEVERAL = 4
_FAR = 3.0
"""Standard deviations of q, in one coordinate, from which a mode is elsewhere."""
_LEAPFROGS, _KEEP = 2, 0.3
_CALLS, _DONE = 60, 1e-8
"""Calls in which ascents are to arrive, and the rise in nats that a quasi-Newton step then still promises."""


def missing_modes(target: Target, solution: Solution, seed: int = 0, draws: Float[Tensor, "n d"] | None = None) -> MissingModes:
    """Look for modes of p that the best model of a solution doesn't reach.

    Draws of p, where there are any, else particles (`whichkl.particles.temper`, from a Gaussian 20 times as wide as q and twice
    as wide as the optima are spread), show where p's mass may be. Those with log q below its 10⁻⁴ quantile under q climb log p,
    and so do draws of q. A missing mode is where ascents end that hardly any draw of q comes to, and from where every straight
    line to an end of q's draws dips by a nat or more. About each, p's mass m is measured by importance sampling where log q is
    below that quantile; a region with mass m under p and ε under q costs KL(q‖p) ≥ −(1 − ε) log(1 − m) + ε log ε (the
    data-processing inequality), here with ε ≤ 10⁻⁴. So a family too small for skewness, heavy tails or a funnel isn't taken for
    a missing mode.

    Args:
        target: p, in the coordinates of the user, with a log density.
        solution: what a solver found, in free coordinates.
        seed: fixes every random choice.
        draws: of the best model, in free coordinates; 10,000 fresh ones unless given.

    Source: Del Moral, Doucet & Jasra (2006) for the particles; Dai, Heng, Jacob & Whiteley (2022).
    """
    if target.bijection.is_discrete:
        counted = "every state of the target is counted, so that the value is exact"
        return _nothing(target, counted if Access.ENUMERABLE in target.access else "the target is discrete")
    free = target.unconstrained()
    skip = _reason(free)
    if skip is not None:
        return _nothing(target, skip)
    spent, refused = free.evaluations["score"], free.evaluations["rejected"]
    found = _Search(target, free, solution, seed, draws).run(spent)
    free.evaluations["rejected"] = refused  # a search goes where nobody else does, and no number there is no finding
    return found


def _reason(free: Target) -> str | None:
    if free.density is None:
        return "the target has no log density"
    if free.dim > _WIDEST:
        return f"in {free.dim} dimensions (more than {_WIDEST}) the search would cost more than the fit"
    return None


def _nothing(target: Target, reason: str) -> MissingModes:
    return MissingModes(0.0, 0.0, None, 0.0, 0, (), (), target.names, 0.0, "none", "nowhere", 0, 0, reason)


class _Search:
    """One search: coordinates in which q has mean 0 and covariance I, and what is known there."""

    def __init__(self, target: Target, free: Target, solution: Solution, seed: int, draws: Float[Tensor, "n d"] | None) -> None:
        self.target, self.free, self.seed, self.calls = target, free, seed, 0
        self.model: Distribution = solution.best.model
        if draws is None:
            with seeded(seed + 11):
                draws = self.model.sample((_OF_Q,)).reshape(_OF_Q, -1)
        x = draws.to("cpu", torch.float64)
        centred = x - x.mean(0)
        covariance = centred.T @ centred / len(x)
        self.frame = Reference(x.mean(0), torch.linalg.cholesky(covariance + 1e-12 * torch.diag(covariance.diagonal())))
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
        """Return log p (up to its constant) and its gradient in the standardised coordinates, with the volume of the change."""
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

    def run(self, before: int) -> MissingModes:
        """Particles, ascents, modes, masses."""
        y, weight, weighs, method, searched = self._points()
        unreached = ~self.reached(y) & (weight > 0)
        missing, unresolved = torch.zeros(len(y), dtype=torch.bool, device="cpu"), 0.0
        modes, shares = y[:0], torch.zeros(0, dtype=torch.float64, device="cpu")
        mass, stderr, least = 0.0, 0.0, 0.0
        optima = self.known[~self.reached(self.known)]
        if bool(unreached.any()) or len(optima):
            modes, which = self._missing(y[unreached], optima)
            shares, mass, stderr, least = self._shares(modes)
            is_mode = shares > _LEAST
            missing[unreached] = torch.where(which >= 0, is_mode[which.clamp(min=0)] if len(modes) else False, False)
            unresolved = float(weight[unreached & ~missing].sum())
            if len(modes) > _SEVERAL or (len(modes) and not is_missed(mass, stderr)):
                # Of very many modes particles may have come to the lightest.
                nearer, _ = self._missing(torch.cat([modes, self._crossed(modes, shares)]), optima[:0])
                again = self._shares(nearer)
                if again[1] > mass:
                    modes, (shares, mass, stderr, least) = nearer, again
                    is_mode = shares > _LEAST
            modes, shares = modes[is_mode], shares[is_mode]
        order = shares.argsort(descending=True)[:_SHOWN]
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
        )

    def _points(self) -> tuple[Tensor, Tensor, bool, str, str]:
        """Points with weights that stand for p, in standardised coordinates; whether they do; how, and where was looked."""
        p = self.free.thinned()[0]
        if p.access.can_sample:
            x = p.samples if p.samples is not None else p.draws(2_000, self.seed + 12)
            x = x.to("cpu", torch.float64)
            w = torch.ones(len(x), dtype=torch.float64, device="cpu") if p.weights is None else p.weights.to("cpu", torch.float64)
            return self.whiten(x), w / w.sum(), True, "draws of p", f"where its {len(x):,} draws are"
        dim = self.free.dim
        apart = self.spread - self.spread.mean(0)
        base = torch.eye(dim, dtype=torch.float64, device="cpu") * _REACH**2 + 4 * apart.T @ apart / len(apart)
        tril = torch.linalg.cholesky(base)
        start = Reference(self.frame.place(self.spread.mean(0)[None])[0], self.frame.tril @ tril)
        cost = 1 if self.free.density is not None and self.free.density.differentiable or self.free.score else 2 * dim + 1
        count = 512 if dim <= 30 and cost < 10 else 256
        count = count if self.free.density is None or self.free.density.batched else 128
        cloud = temper(
            self.free,
            start,
            particles=count,
            islands=8,
            keep=_KEEP,
            leapfrogs=_LEAPFROGS,
            last_moves=1,
            max_calls=64 if dim <= 30 else 120,
            seed=self.seed + 12,
        )
        self.calls += cloud.calls
        width = float(torch.linalg.vector_norm(tril, dim=1).max())
        searched = f"from a Gaussian {width:.0f} times as wide as the fit" + ("" if cloud.finished else ", and not to its end")
        return self.whiten(cloud.x), cloud.log_weights.exp(), cloud.finished, "particles", searched

    def _missing(self, y: Float[Tensor, "n d"], optima: Float[Tensor, "o d"]) -> tuple[Tensor, Tensor]:
        """Return modes that q doesn't reach, and for every point of `y` which of them it belongs to, −1 for none.

        Other optima of the fit climb too, and modes that were known before.
        """
        chosen, nearest = spread_out(y, 0, min(128, max(24, 2400 // y.shape[1])))
        start = torch.cat([self.y[:_FROM_Q], optima, y[chosen]])
        ends = ascend(lambda at, _: self.density(at), start, tolerance=_DONE, max_calls=_CALLS)
        arrived = ends.value.isfinite() & (ends.decrement <= _DONE)
        label = labels(self.density, ends.x, ends.value)
        held = torch.bincount(label[:_FROM_Q], minlength=int(label.max()) + 1) >= _OWN
        seen = held[label] if bool(held.any()) else torch.arange(len(label), device="cpu") < _FROM_Q
        modes: list[Tensor] = []
        number = torch.full_like(held, -1, dtype=torch.long)
        for one in (~held).nonzero()[:, 0].tolist():
            rows = ((label == one) & arrived).nonzero()[:, 0]
            if len(rows):
                top = ends.x[rows[ends.value[rows].argmax()]]
                number[one] = len(modes)
                modes.append(top)
        candidates = torch.stack(modes) if modes else y[:0]
        alone = self._alone(candidates, ends, seen)
        keep = torch.cumsum(alone, 0) - 1
        place = torch.where(alone, keep, -1)
        which = number[label[_FROM_Q + len(optima) :]][nearest]
        which = torch.where(which >= 0, place[which.clamp(min=0)] if len(modes) else -1, -1)
        return candidates[alone], which

    def _crossed(self, modes: Float[Tensor, "k d"], shares: Float[Tensor, " k"]) -> Float[Tensor, "c d"]:
        """Points that differ from q's middle in one coordinate, where they are as the heaviest mode that is far there.

        Modes that come of many coordinates, each with its own, are next to each other in this way; those in between are heavier.
        """
        modes = modes[shares.argsort(descending=True)]
        far = modes.abs() > _FAR
        columns = far.any(0).nonzero()[:, 0]
        points = modes.new_zeros(len(columns), modes.shape[1])
        points[torch.arange(len(columns), device="cpu"), columns] = modes[far[:, columns].int().argmax(0), columns]
        return points

    def _alone(self, modes: Float[Tensor, "k d"], ends: Peaks, seen: Bool[Tensor, " e"]) -> Bool[Tensor, " k"]:
        """Whether no straight line without a dip joins a mode to an end that q reaches."""
        if len(modes) == 0:
            return torch.zeros(0, dtype=torch.bool, device="cpu")
        value = self.density(modes)[0]
        order = ends.value[seen].argsort(descending=True)
        pick, _ = spread_out(ends.x[seen][order], 0, 4)
        goals, heights = ends.x[seen][order][pick], ends.value[seen][order][pick]
        k, g = len(modes), len(goals)
        a, b = modes.repeat_interleave(g, 0), goals.repeat(k, 1)
        lower = torch.minimum(value.repeat_interleave(g), heights.repeat(k))
        return ~joined(self.density, a, b, lower).view(k, g).any(1)

    def _shares(self, modes: Float[Tensor, "k d"]) -> tuple[Float[Tensor, " k"], float, float, float]:
        """The share of p's mass at each mode, beside all of them and what q reaches; their sum, its error, and −log(1 − sum).

        The last is from the logarithms of the masses, since a sum may differ from 1 by less than float64 tells.
        """
        if len(modes) == 0:
            return torch.zeros(0, dtype=torch.float64, device="cpu"), 0.0, 0.0, 0.0
        generator = torch.Generator().manual_seed(self.seed + 13)
        mass, error = log_masses(self.density, modes, self.reached, generator)
        height = self.height[:_WEIGHED]
        weight = self.density(self.y[:_WEIGHED])[0] - height
        weight = torch.where(height > self.least, weight, -math.inf)  # the others lie where the modes' masses are counted
        near = torch.logsumexp(weight, 0) - math.log(_WEIGHED)
        whole = torch.logsumexp(torch.cat([mass, near[None]]), 0)
        if float(whole) == -math.inf:
            return torch.zeros(len(modes), dtype=torch.float64, device="cpu"), 0.0, 0.0, 0.0
        share, rest = (mass - whole).exp(), float((near - whole).exp())
        missed = float(share.sum())
        from_q = rest * float((weight - near).exp().std()) / math.sqrt(_WEIGHED) if rest > 0 else 0.0
        stderr = math.hypot(rest * float(torch.linalg.vector_norm(share * error)), missed * from_q)
        return share, missed, stderr, max(0.0, float(whole - near))


def _mean(model: Distribution, otherwise: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The mean of an optimum in free coordinates; that of the draws of the best where it isn't known, or is infinite."""
    try:
        mean = model.mean.detach().reshape(-1).to("cpu", torch.float64)
    except NotImplementedError:
        return otherwise
    return mean if bool(mean.isfinite().all()) else otherwise
