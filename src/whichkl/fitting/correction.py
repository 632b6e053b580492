"""Correction: draws and expectations of p itself, from a fit to it, by importance weights or else by particles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, TargetError, cannot
from whichkl.arrays import tensor_of
from whichkl.diagnostics import model_target
from whichkl.importance import effective_sample_size, khat_limit, pareto_smooth
from whichkl.particles import Particles, Reference, temper
from whichkl.process.seeds import seeded
from whichkl.targets import Target

_PARTICLES, _ISLANDS, _LEAPFROGS, _KEEP, _LAST_MOVES = 4096, 32, 8, 0.8, 8
_ENOUGH, _MOST = 10_000, 16_384
"""For up to 10,000 draws 4,096 particles will do; there are never more than 16,384."""
_MOST_CALLS = 1_000
_WIDER = 1.5
"""The particles start from a Gaussian so many times as wide as q, which reverse KL tends to leave too narrow."""
_SEARCHING = 20.0
"""The same where q is known to miss modes."""
_FINITE_VARIANCE = 0.5
"""k̂ up to which weights have a variance, so that their error bars mean something (Vehtari et al., 2024)."""
_ACCEPTED, _APART, _OFF = 0.3, 0.5, 0.1


@dataclass(frozen=True)
class Expectation:
    """E f(x) with its standard error, a component each where f returns several."""

    value: Tensor
    """Of shape () or (k,), in the units of f."""
    stderr: Tensor
    """Of the same shape."""
    method: str
    """``"draws of q"``, ``"importance weights"`` or ``"particles"``."""
    n: int
    """Draws or particles."""
    ess: float
    """How many of them count, by their weights."""
    khat: float | None = None
    """PSIS k̂ of the importance weights, where they were tried."""

    def __str__(self) -> str:
        """One line: values with their errors, and how they were found."""
        pairs = zip(self.value.reshape(-1).tolist(), self.stderr.reshape(-1).tolist(), strict=True)
        return ", ".join(f"{v:.4g} ± {s:.2g}" for v, s in pairs) + f" ({self.method}, {self.ess:,.0f} of {self.n:,})"


@dataclass(frozen=True)
class Weighted:
    """Points in the user's coordinates with normalised log weights that stand for p, and how they were found."""

    x: Float[Tensor, "n d"]
    log_weights: Float[Tensor, " n"]
    method: str
    khat: float | None
    particles: Particles | None = None
    before: Float[Tensor, "n d"] | None = None
    """The particles before their last moves were doubled."""


def corrected(target: Target | None, model: Any, n: int, seed: int, *, misses_modes: bool = False) -> Weighted:
    """Return weighted points that stand for p: Pareto-smoothed importance weights on n draws of q, else particles.

    The weights serve where k̂ ≤ 0.5, so that they have a variance, and q isn't known to miss modes. Elsewhere sequential Monte
    Carlo goes from a Gaussian about q to p; its answer is used if it finished, moves were accepted, twice as many moves change
    no mean by more than chance would, its islands agree on Z to half a nat, and Stein's identity holds on its particles,
    E_p[∇ log p] = 0 and E_p[(x − c) ∇ log p] = −1. Where it is not, weights serve up to k̂ = min(1 − 1/log₁₀ n, 0.7).

    Args:
        target: p, with a log density.
        model: q, in the user's coordinates.
        n: draws of q, and particles where n is above 10,000; else there are 4,096.
        seed: fixes every random choice.
        misses_modes: whether q is known to miss modes, which weights can't repair and don't see.

    Raises:
        TargetError: there is no log density, or neither weights nor particles can be trusted.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024); Dai, Heng, Jacob & Whiteley (2022); Stein (1972).
    """
    if target is None:
        because = "a loaded fit doesn't hold its target"
        raise TargetError(cannot("correct this fit's draws", because, "Pass `target=`, what was fitted"))
    if target.density is None:
        because = f"the target has only {target.access.label}, and weights compare log p with log q"
        raise TargetError(cannot("correct this fit's draws", because, "Pass `target=` with a `log_prob`, or `corrected=False`"))
    q = model_target(model, target)
    x = q.draws(n, seed)
    log_weight = (target.log_prob(x).to(torch.float64) - q.log_prob(x).to(torch.float64)).detach().cpu()
    khat = pareto_smooth(log_weight)[1] if bool((log_weight > -math.inf).any()) else math.inf
    by_weights = Weighted(x, pareto_smooth(log_weight)[0], "importance weights", khat) if khat < math.inf else None
    if by_weights is not None and khat <= _FINITE_VARIANCE and not misses_modes:
        return by_weights
    particles = _particles(target, x, n, seed, wider=_SEARCHING if misses_modes else _WIDER)
    wrong = _distrust(target, particles)
    if wrong is not None and by_weights is not None and khat <= khat_limit(n) and not misses_modes:
        return by_weights
    if wrong is not None:
        doubt = "it misses modes" if misses_modes else f"PSIS k̂ is {khat:.2f}, above {khat_limit(n):.2f}"
        because = f"{doubt}, and the particles that go from it to the target can't be trusted either ({wrong})"
        raise TargetError(cannot("correct this fit's draws", because, "Fit a richer family, or run a long Markov chain"))
    now = target.bijection.forward(particles.x.to(target.device, target.dtype))
    before = None if particles.before is None else target.bijection.forward(particles.before.to(target.device, target.dtype))
    return Weighted(now, particles.log_weights, "particles", khat, particles, before)


def draw(model: Any, weighted: Weighted | None, n: int, seed: int) -> Float[Tensor, "n d"]:
    """Draw n points: of q, or, given weighted points, of those by their weights (systematic resampling, in random order).

    Args:
        model: q, in the user's coordinates.
        weighted: what `corrected` returned, or None for q itself.
        n: how many.
        seed: fixes the draws.
    """
    if weighted is None:
        with seeded(seed):
            x: Tensor = model.sample((n,))
        return x.reshape(n, -1)
    generator = torch.Generator().manual_seed(seed)
    at = (
        torch.arange(n, dtype=torch.float64, device="cpu") + torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
    ) / n
    cumulative = weighted.log_weights.exp().cumsum(0)
    chosen = torch.searchsorted(cumulative / cumulative[-1], at).clamp(max=len(cumulative) - 1)
    return weighted.x[chosen[torch.randperm(n, generator=generator, device="cpu")]]


def expectation(f: Callable[[Tensor], Any], x: Float[Tensor, "n d"], weighted: Weighted | None) -> Expectation:
    """Return Σ W f(x) with its standard error.

    Of weights, and of draws of q, which weigh 1/n, it is √Σ W² (f − mean)²; of particles, it comes from the islands' differences
    and from how far the mean moved when the moves were doubled.

    Args:
        f: (n, d) → (n,) or (n, k).
        x: draws of q, in the user's coordinates, where nothing is corrected.
        weighted: what `corrected` returned, or None.

    Raises:
        InputError: f returns another shape, or a value at a point of positive weight that isn't finite.
    """
    points = x if weighted is None else weighted.x
    value = _values(f, points)
    table = value.reshape(len(points), -1)
    if weighted is not None and weighted.particles is not None:
        mean, stderr = weighted.particles.mean(table)
        if weighted.before is not None:
            earlier = weighted.particles.mean(_values(f, weighted.before).reshape(len(points), -1))[0]
            stderr = (stderr.square() + (mean - earlier).square()).sqrt()
    else:
        count = len(points)
        w = torch.full((count,), 1 / count, dtype=torch.float64, device="cpu") if weighted is None else weighted.log_weights.exp()
        mean = w @ table
        stderr = (w.square() @ (table - mean).square()).sqrt()
    shape = value.shape[1:]
    ess = float(len(points)) if weighted is None else effective_sample_size(weighted.log_weights)
    method = "draws of q" if weighted is None else weighted.method
    return Expectation(
        mean.reshape(shape), stderr.reshape(shape), method, len(points), ess, None if weighted is None else weighted.khat
    )


def _values(f: Callable[[Tensor], Any], points: Float[Tensor, "n d"]) -> Tensor:
    returned = f(points)
    if returned is None:
        raise InputError(cannot("take the expectation of this function", "it returned None", "Return (n,) or (n, k)"))
    value = tensor_of(returned).detach().to("cpu", torch.float64)
    if value.ndim not in (1, 2) or len(value) != len(points):
        because = f"it returned shape {tuple(value.shape)} for {len(points)} points"
        raise InputError(cannot("take the expectation of this function", because, "Return (n,) or (n, k), a row each point"))
    if not bool(value.isfinite().all()):
        because = f"it isn't finite at {int((~value.isfinite()).sum())} of {value.numel()} places"
        raise InputError(cannot("take the expectation of this function", because, "Return finite numbers"))
    return value


def check_draws(model: Any, names: tuple[str, ...], n: Any) -> None:
    """Refuse a conditional model, whose draws need an x, and a number of draws that isn't a whole one of at least 1.

    Raises:
        InputError: as said.
    """
    if not isinstance(model, Distribution):
        because = f"it is a conditional model of {', '.join(names[:4])}, with a law for each x"
        raise InputError(cannot("draw from this fit alone", because, "Use `fit.model(x).sample((n,))`"))
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(cannot(f"draw n={n!r} points", "it isn't a whole number of at least 1", "Give, say, n=1000"))


def _particles(target: Target, x: Float[Tensor, "n d"], n: int, seed: int, *, wider: float) -> Particles:
    free = target.unconstrained()
    u = target.bijection.inverse(x).to("cpu", torch.float64)
    centred = u - u.mean(0)
    covariance = centred.T @ centred / len(u)
    tril = torch.linalg.cholesky(covariance + 1e-12 * torch.diag(covariance.diagonal()))
    count = _PARTICLES if n <= _ENOUGH else _ISLANDS * math.ceil(min(n, _MOST) / _ISLANDS)
    return temper(
        free,
        Reference(u.mean(0), wider * tril),
        particles=count,
        islands=_ISLANDS,
        keep=_KEEP,
        leapfrogs=_LEAPFROGS,
        last_moves=_LAST_MOVES,
        settle=True,
        max_calls=_MOST_CALLS,
        seed=seed,
    )


def _distrust(target: Target, particles: Particles) -> str | None:
    """What speaks against particles, or None."""
    if not particles.finished:
        return f"they didn't get to it in {particles.calls} calls"
    if particles.acceptance < _ACCEPTED:
        return f"only {particles.acceptance:.0%} of their moves were accepted"
    if particles.drift is None or particles.drift > 1:
        return f"their averages still moved after {particles.calls} calls"
    if particles.log_z_stderr > _APART:
        return f"independent groups of them disagree on log Z by {particles.log_z_stderr:.1f}"
    free = target.unconstrained()
    _, score = free.trial(particles.x.to(free.device))
    score = score.to("cpu", torch.float64)
    centred = particles.x - particles.x.median(0).values
    scale = centred.square().mean(0).sqrt()
    mean, stderr = particles.mean(torch.cat([score * scale, centred * score + 1], dim=1))
    if bool(((mean.abs() > 5 * stderr) & (mean.abs() > _OFF)).any()):
        return "Stein's identity fails on them"
    return None
