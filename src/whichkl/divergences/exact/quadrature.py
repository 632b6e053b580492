"""Quadrature: divergences of densities of one to three variables, exact to the digits shown, or with a stated error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.divergences import regions
from whichkl.divergences.estimate import Estimate, Finite
from whichkl.divergences.exact.boxes import Integral, integrate
from whichkl.divergences.exact.located import BUDGET, TOLERANCE, Ground, Located
from whichkl.divergences.exact.tails import REACHES, diverges
from whichkl.divergences.kinds import ForwardKLDivergence, IntegralDivergence, Renyi
from whichkl.targets import Target

_MAX_MASS_BY_ROUNDING = 1e-13
"""Mass outside of the other's support from which a divergence is infinite; less may be rounding in a user's density."""
MAX_DIMENSIONS = 3
"""Most variables that quadrature takes."""


def expectation_rule(p: Target) -> tuple[Float[Tensor, "n 1"], Float[Tensor, " n"]]:
    """Return points and weights, Σ w = 1, with Σ w f(x) = E_p[f] for smooth f, from p's log density on the line.

    Raises:
        InputError: p isn't one-dimensional.
        TargetError: p isn't integrable, or claims to be normalised and isn't.
    """
    if p.dim != 1:
        raise InputError(cannot("integrate on the line", f"the density has dimension {p.dim}", "Use Monte Carlo"))
    side = Located.of(p)
    centre, width = float(side.draws.median()), side.chart.axes[0].width

    def moments(x: Tensor) -> Tensor:
        density = torch.exp(p.log_prob(x).detach() - side.shift)
        grown = torch.where(density > 0, ((x[:, 0] - centre) / width).square(), 0.0)
        return torch.stack([density, density * grown])

    tail = diverges(lambda x: p.log_prob(x).detach() + 2 * x[:, 0].abs().log(), side.bounds, [side.draws], p.names)
    if tail:
        because = f"{tail} it is so heavy that it has no variance, and KL(p‖q) is infinite for every Gaussian"
        raise TargetError(cannot("minimise `forward_kl` here", because, "Use `reverse_kl`, or a transform such as support="))
    whole = integrate(moments, side.chart, [side.draws], [[]], tolerance=TOLERANCE[1])
    side.log_mass(whole)
    x, w = whole.rule(side.chart)
    w = w * torch.exp(p.log_prob(x).detach() - side.shift)
    keep = w > 1e-18 * w.sum()
    return x[keep], w[keep] / w[keep].sum()


def kl(p: Target, q: Target, quantity: str = "forward_kl") -> Estimate:
    """KL(p‖q) = ∫ p log(p/q) for two densities of one to three variables; see `divergence`."""
    return replace(divergence(p, q, ForwardKLDivergence()), quantity=quantity)


def divergence(p: Target, q: Target, kind: IntegralDivergence) -> Estimate:
    """A divergence of two densities of one to three variables, in nats (some have no unit); ∞ with its reason.

    Both are normalised by the same quadrature, so that unnormalised densities do. Infinity is found where one density has
    mass and the other none, and in the tails and at the ends of the supports, by whether the integrand falls there as fast
    as it has to. Two densities on one joint support, such as a simplex, are compared in its free coordinates. Where the
    budget of points ends before six digits are certain (kinks, as total variation has, cost most), the error is given.

    Raises:
        InputError: more than three variables.
        TargetError: p or q isn't integrable, the integral isn't finite for another reason, or fewer than two digits are certain.
    """
    given = p
    p, q = _free(p, q)
    dim = p.dim
    if dim > MAX_DIMENSIONS:
        because = f"they have {dim} free coordinates, and it takes at most {MAX_DIMENSIONS}"
        raise InputError(cannot("integrate these densities", because, "Use Monte Carlo"))
    ground = Ground.of(p, q)
    densities, chart, draws, ends = ground.densities, ground.chart, ground.draws, ground.ends

    missed = integrate(
        lambda x: kind.misses(*densities(x))[None],
        chart,
        draws,
        ends,
        1e-3,
        TOLERANCE[1] if dim == 1 else 1e-3,
        BUDGET[dim] // 4,
    )
    outside = float(missed.value[0])
    if outside > max(_MAX_MASS_BY_ROUNDING, 3 * float(missed.error[0])):
        digits = 4 if float(missed.error[0]) < 1e-4 * outside else 2
        where = _where(densities, kind, missed.rule(chart)[0] if dim == 1 else torch.cat(draws), ends, p.names)
        return _infinite(kind, f"{outside:.{digits}g} of the mass of {where}")
    near = REACHES if p is given else REACHES[-1:]  # near the corners of a simplex torch's densities are clamped
    place = diverges(lambda x: kind.log_tail(*densities(x)), ground.bounds, draws, p.names, near)
    if place:
        return _infinite(kind, f"the integrand of {kind.formula} isn't integrable {place}")
    if isinstance(kind, Renyi) and not bool((kind.log_tail(*densities(torch.cat(draws))) > -math.inf).any()):
        return _infinite(kind, "their supports don't overlap")
    whole = integrate(lambda x: kind.integrand(*densities(x))[None], chart, draws, ends, 0.1, TOLERANCE[dim], BUDGET[dim])
    return _estimate(kind, whole, dim, ground.notes)


def _estimate(kind: IntegralDivergence, whole: Integral, dim: int, notes: tuple[str, ...]) -> Estimate:
    integral, error = float(whole.value[0]), float(whole.error[0])
    if not math.isfinite(integral):
        because = f"the integral of {kind.formula} is beyond 1e308, the largest float64"
        instead = "Use a divergence that grows less, such as a KL"
        raise TargetError(cannot("compute this divergence by quadrature", because, instead))
    if isinstance(kind, Renyi) and integral < 1e-290:
        because = f"the integral of {kind.formula} is below 1e-290: the two hardly overlap"
        raise TargetError(cannot("compute this divergence by quadrature", because, "Use a divergence such as forward_kl"))
    value, error = kind.of_integral(integral), kind.error_of_integral(error, integral)
    if not error <= max(0.01 * abs(value), 1e-3):
        because = f"after {whole.points:,} points the integral of {kind.formula} is {integral:.3g} with an error of {error:.2g}"
        raise TargetError(cannot("compute this divergence by quadrature", because, "Take it as unknown, or use Monte Carlo"))
    exact = whole.converged or error <= 5e-7 * max(1.0, abs(value)) or not math.isfinite(value)
    note = f"quadrature error at most {max(error, 1e-12):.1g}, {whole.points:,} points"
    clean = max(value, 0.0) if value > -max(1e-9, error) else value
    finite: Finite = "infinite" if not math.isfinite(clean) else "certified" if exact and not notes else "not certified"
    stderr = 0.0 if exact else error
    slow = () if exact or dim > 1 else ("six digits aren't reached on the line: it may fall so slowly that it's infinite",)
    return Estimate(
        kind.name,
        clean,
        stderr,
        finite=finite,
        method="quadrature",
        exact=exact,
        reliable=not slow,
        notes=(note, *slow, *notes),
    )


def _where(
    densities: Callable[[Tensor], tuple[Tensor, Tensor]],
    kind: IntegralDivergence,
    x: Tensor,
    ends: list[list[float]],
    names: Sequence[str],
) -> str:
    """Describe whose mass is missed, and where, from points that have mass: the nodes on the line, draws elsewhere."""
    log_p, log_q = densities(x)
    seen = torch.logaddexp(log_p, log_q) > -700
    missed, x = kind.misses(log_p, log_q)[seen], x[seen]
    place = regions.intervals(x[:, 0], missed, ends[0]) if x.shape[1] == 1 else regions.ranges(x, missed, names, ends)
    outside = regions.outside(missed, log_p[seen], log_q[seen])
    return f"{outside}, at {place}" if place else outside


def _infinite(kind: IntegralDivergence, note: str) -> Estimate:
    return Estimate(kind.name, math.inf, finite="infinite", method="quadrature", exact=True, notes=(note,))


def _free(p: Target, q: Target) -> tuple[Target, Target]:
    """Return the pair on a cube, where both live on one simplex: divergences don't change."""
    joint = [one.bijection.constraints[0].event_dim > 0 and not one.bijection.is_real for one in (p, q)]
    if not any(joint):
        return p, q
    words = [one.bijection.constraints[0] for one in (p, q)]
    if not all(isinstance(word, type(constraints.simplex)) for word in words):
        because = "their supports are neither products of intervals nor one simplex"
        raise TargetError(cannot("integrate these densities", because, "Use Monte Carlo"))
    return _by_sticks(p), _by_sticks(q)


def _by_sticks(p: Target) -> Target:
    """Return a target on the simplex in the shares z ∈ (0, 1)ᵏ of the remaining stick: x₁ = z₁ and so on."""

    def log_prob(z: Tensor) -> Tensor:
        left = torch.cumprod(1 - z, 1)
        before = torch.cat([torch.ones_like(z[:, :1]), left[:, :-1]], 1)
        return p.log_prob(torch.cat([before * z, left[:, -1:]], 1)) + before.log().sum(1)

    def shares(x: Tensor) -> Tensor:
        left = x.flip(1).cumsum(1).flip(1)  # what is left before each piece, without cancellation
        z: Tensor = (x / left)[:, :-1]
        return z

    inner = constraints.interval(0.0, 1.0)
    k = p.dim - 1
    if p.samples is not None:
        return Target(samples=shares(p.samples), log_prob=log_prob, support=inner, normalized=p.normalized)
    if Access.SAMPLER not in p.access:
        return Target(log_prob=log_prob, dim=k, support=inner, normalized=p.normalized)

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        return shares(p.draws(n, generator.initial_seed()))

    return Target(sampler=sampler, log_prob=log_prob, dim=k, support=inner, normalized=p.normalized)
