"""Correction: draws and expectations of p from a fit to p, by importance weights, or by particles if weights fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, TargetError, as_int, cannot
from whichkl.diagnostics import model_target, reference_around, stein_terms
from whichkl.importance import MIN_SHARE_OF_DRAWS, effective_sample_size, khat_limit, pareto_smooth
from whichkl.particles import Particles, temper
from whichkl.printable import brief
from whichkl.process.memory import check_memory
from whichkl.process.seeds import seeded
from whichkl.targets import Target
from whichkl.targets.calling import values_of

_DO = "take the expectation of this function"
_PARTICLES = 4_096
"""Number of particles for up to `_MAX_DRAWS_OF_FEW_PARTICLES` draws."""
_MAX_DRAWS_OF_FEW_PARTICLES = 10_000
_MAX_PARTICLES = 16_384
_ISLANDS = 32
_temper = partial(temper, islands=_ISLANDS, keep=0.8, leapfrogs=8, last_moves=8, settle=True, max_calls=1_000)
_WIDTH_OF_START = 1.5
"""Width of the Gaussian from which particles start, relative to q: reverse KL tends to make q too narrow."""
_WIDTH_OF_SEARCH = 20.0
"""The same if q is known to miss modes."""
_MAX_KHAT_WITH_VARIANCE = 0.5
"""Largest k̂ at which weights have a finite variance, so that their error bars are valid (Vehtari et al., 2024)."""
_MIN_ACCEPTANCE = 0.3
_MAX_STDERR_OF_LOG_Z = 0.5
_MAX_STEIN_DEVIATION = 0.1


@dataclass(frozen=True)
class Expectation:
    """E f(x) with its standard error, per component of f."""

    __repr__ = brief

    value: Tensor
    """Of shape () or (k,), in the units of f."""
    stderr: Tensor
    """Of the same shape."""
    method: str
    """``"draws of q"``, ``"importance weights"`` or ``"particles"``."""
    n: int
    """Number of draws or particles."""
    ess: float
    """Effective sample size of their weights."""
    khat: float | None = None
    """PSIS k̂ of the importance weights, if they were computed."""

    def __str__(self) -> str:
        """One line: values with their errors, and the method."""
        pairs = zip(self.value.reshape(-1).tolist(), self.stderr.reshape(-1).tolist(), strict=True)
        return ", ".join(f"{v:.4g} ± {s:.2g}" for v, s in pairs) + f" ({self.method}, {self.ess:,.0f} of {self.n:,})"


@dataclass(frozen=True)
class Weighted:
    """Points in the user's coordinates with normalised log weights, distributed as p, and the method."""

    x: Float[Tensor, "n d"]
    log_weights: Float[Tensor, " n"]
    method: str
    khat: float | None
    particles: Particles | None = None
    before: Float[Tensor, "n d"] | None = None
    """The particles before their last moves were doubled."""


def corrected(target: Target | None, model: Any, n: int, seed: int, *, misses: str | None = None) -> Weighted:
    """Return weighted points distributed as p: n draws of q with Pareto-smoothed importance weights, or particles.

    The weights are used if k̂ ≤ 0.5, so that they have a finite variance, or if they are worth at least 0.9 n draws, so that no
    tail matters, and q isn't known to miss modes. Otherwise sequential
    Monte Carlo moves particles from a Gaussian around q to p. They are used if it finished, moves were accepted, twice as many
    moves change no mean significantly, its islands agree on log Z to half a nat, and Stein's identity holds on the particles,
    E_p[∇ log p] = 0 and E_p[(x − c) ∇ log p] = −1. If they aren't, weights are used up to k̂ = min(1 − 1/log₁₀ n, 0.7).

    There are 4,096 particles for up to 10,000 draws; for more, as many as draws, up to 16,384. `misses` is what q is known
    to miss, such as modes, which weights can't correct or detect.

    Raises:
        TargetError: there is no log density, or neither weights nor particles can be trusted.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024); Dai, Heng, Jacob & Whiteley (2022); Stein (1972).
    """
    do = "correct this fit's draws"
    if target is None:
        raise TargetError(cannot(do, "a loaded fit doesn't hold its target", "Pass `target=`, what was fitted"))
    if target.density is None:
        because = f"the target has only {target.access.label}, and weights compare log p with log q"
        raise TargetError(cannot(do, because, "Pass `target=` with a `log_prob`, or `corrected=False`"))
    q = model_target(model, target)
    x = q.draws(n, seed)
    log_weight = (target.log_prob(x).to(torch.float64) - q.log_prob(x).to(torch.float64)).detach().cpu()
    smoothed, khat = pareto_smooth(log_weight) if bool((log_weight > -math.inf).any()) else (log_weight, math.inf)
    by_weights = Weighted(x, smoothed, "importance weights", khat)
    is_even = effective_sample_size(smoothed) >= MIN_SHARE_OF_DRAWS * n  # then a heavy tail of the weights hardly counts
    if (khat <= _MAX_KHAT_WITH_VARIANCE or is_even) and misses is None:
        return by_weights
    particles = _particles(target, x, n, seed, wider=_WIDTH_OF_START if misses is None else _WIDTH_OF_SEARCH)
    wrong = _distrust(target, particles)
    if wrong is not None and khat <= khat_limit(n) and misses is None:
        return by_weights
    if wrong is not None:
        doubt = f"it misses {misses}" if misses else f"PSIS k̂ is {khat:.2f}, above {khat_limit(n):.2f}"
        because = f"{doubt}, and the particles that go from it to the target can't be trusted either ({wrong})"
        raise TargetError(cannot(do, because, "Fit a richer family, or run a long Markov chain"))
    now = target.bijection.forward(particles.x.to(target.device, target.dtype))
    before = None if particles.before is None else target.bijection.forward(particles.before.to(target.device, target.dtype))
    return Weighted(now, particles.log_weights, "particles", khat, particles, before)


def draw(model: Any, weighted: Weighted | None, n: int, seed: int) -> Float[Tensor, "n d"]:
    """Draw n points of q, or of the weighted points by systematic resampling, in random order."""
    if weighted is None:
        with seeded(seed):
            x: Tensor = model.sample((n,))
        return x.reshape(n, -1)
    generator = torch.Generator().manual_seed(seed)
    offset = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
    at = (torch.arange(n, dtype=torch.float64, device="cpu") + offset) / n
    cumulative = weighted.log_weights.exp().cumsum(0)
    chosen = torch.searchsorted(cumulative / cumulative[-1], at).clamp(max=len(cumulative) - 1)
    return weighted.x[chosen[torch.randperm(n, generator=generator, device="cpu")]]


def expectation(f: Callable[[Tensor], Any], x: Float[Tensor, "n d"], weighted: Weighted | None) -> Expectation:
    """Return Σ W f(x) with its standard error, over draws x of q (W = 1/n) or over weighted points.

    For weights, the error is √Σ W² (f − mean)². For particles, it combines the differences between islands and the change of
    the mean when the moves were doubled.
    """
    points = x if weighted is None else weighted.x
    value, n = values_of(f, points, _DO), len(points)
    table, shape = value.reshape(n, -1), value.shape[1:]
    if weighted is not None and weighted.particles is not None:
        mean, stderr = weighted.particles.mean(table)
        if weighted.before is not None:
            earlier = weighted.particles.mean(values_of(f, weighted.before, _DO).reshape(n, -1))[0]
            stderr = (stderr.square() + (mean - earlier).square()).sqrt()
    else:
        w = torch.full((n,), 1 / n, dtype=torch.float64, device="cpu") if weighted is None else weighted.log_weights.exp()
        mean = w @ table
        stderr = (w.square() @ (table - mean).square()).sqrt()
    if weighted is None:
        return Expectation(mean.reshape(shape), stderr.reshape(shape), "draws of q", n, float(n))
    ess = effective_sample_size(weighted.log_weights)
    return Expectation(mean.reshape(shape), stderr.reshape(shape), weighted.method, n, ess, weighted.khat)


def check_draws(model: Any, names: tuple[str, ...], n: Any) -> int:
    """Return n as an int; refuse a conditional model, whose draws need an x, and an n that isn't a whole number of at least 1."""
    if not isinstance(model, Distribution):
        because = f"it is a conditional model of {', '.join(names[:4])}, with a law for each x"
        raise InputError(cannot("draw from this fit alone", because, "Use `fit.model(x).sample((n,))`"))
    n = as_int(n)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(cannot(f"draw n={n!r} points", "it isn't a whole number of at least 1", "Give, say, n=1000"))
    check_memory(16 * n * len(names), f"draw {n:,} points", "Give, say, n=10000")
    return n


def _particles(target: Target, x: Float[Tensor, "n d"], n: int, seed: int, *, wider: float) -> Particles:
    start = reference_around(target.bijection.inverse(x).to("cpu", torch.float64), wider)
    count = _PARTICLES if n <= _MAX_DRAWS_OF_FEW_PARTICLES else _ISLANDS * math.ceil(min(n, _MAX_PARTICLES) / _ISLANDS)
    return _temper(target.unconstrained(), start, particles=count, seed=seed)


def _distrust(target: Target, particles: Particles) -> str | None:
    """Return why particles can't be trusted, or None."""
    if not particles.finished:
        return f"they didn't reach it in {particles.calls} calls"
    if particles.acceptance < _MIN_ACCEPTANCE:
        return f"only {particles.acceptance:.0%} of their moves were accepted"
    if particles.drift is None or particles.drift > 1:
        return f"their averages still moved after {particles.calls} calls"
    if particles.log_z_stderr > _MAX_STDERR_OF_LOG_Z:
        return f"independent groups of them disagree on log Z by {particles.log_z_stderr:.1f}"
    free = target.unconstrained()
    _, score = free.trial(particles.x.to(free.device))
    mean, stderr = particles.mean(stein_terms(particles.x, score.to("cpu", torch.float64)))
    if bool(((mean.abs() > 5 * stderr) & (mean.abs() > _MAX_STEIN_DEVIATION)).any()):
        return "Stein's identity fails on them"
    return None
