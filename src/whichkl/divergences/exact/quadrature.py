"""Quadrature: divergences of densities of one to three variables, or of independent coordinates, with at most a stated error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, constraints

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.arrays import tensor_of
from whichkl.divergences import regions
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.exact.atoms import enumerate_atoms, is_discrete
from whichkl.divergences.exact.boxes import Integral, integrate
from whichkl.divergences.exact.closed_form import closed_form
from whichkl.divergences.exact.discrete import enumeration
from whichkl.divergences.exact.located import BUDGET, TOLERANCE, Ground, Located
from whichkl.divergences.exact.tails import REACHES, diverges
from whichkl.divergences.kinds import ForwardKLDivergence, IntegralDivergence, RenyiDivergence, WeightedKLs
from whichkl.families.columns import IndependentColumns
from whichkl.targets import Target
from whichkl.targets.coordinates import in_free_coordinates

_MAX_MASS_BY_ROUNDING = 1e-13
"""Mass outside of the other's support from which a divergence is infinite; less may be rounding in a user's density."""
_BELOW_ZERO = "it is below 0, and no divergence is: mass was missed, or a density isn't normalised as it is said to be"
MAX_DIMENSIONS = 3
"""Most variables that quadrature takes."""
_JOINED: dict[str, Callable[[list[float]], float]] = {
    **dict.fromkeys(("forward_kl", "reverse_kl", "jeffreys", "jeffreys_sum", "renyi"), math.fsum),
    "hellinger": lambda each: -math.expm1(math.fsum(math.log1p(-h) if h < 1 else -math.inf for h in each)),
    "chi_squared": lambda each: math.expm1(math.fsum(math.log1p(one) for one in each)),
}
"""How a divergence of two laws with independent coordinates is made of those of the coordinates."""


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

    # A Gaussian needs p's variance: with x² in the integrand the question is whether that exists.
    tail = diverges(lambda x: p.log_prob(x).detach() + 2 * x[:, 0].abs().log(), side.bounds, [side.draws], p.names)
    if tail:
        because = f"{tail} it is so heavy that it has no variance, and KL(p‖q) is infinite for every Gaussian"
        raise TargetError(cannot("minimise `forward_kl` here", because, "Use `reverse_kl`, or a transform such as support="))
    whole = integrate(moments, side.chart, side.sets, [[]], tolerance=TOLERANCE[1])
    side.mass(whole)
    x, w = whole.rule(side.chart)
    w = w * torch.exp(p.log_prob(x).detach() - side.shift)
    # Weights below float64's rounding of the sum change nothing, and their log density may be −∞.
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
    ground = (_ground_inside(p, q, kind) if p is given else None) or Ground.of(p, q)
    densities, chart, draws, ends = ground.densities, ground.chart, ground.draws, ground.ends

    tolerance = TOLERANCE[1] if dim == 1 else 1e-3
    # The order matters: where the mass of one lies outside the other's support the integrand is ∞, and no rule would settle.
    missed = integrate(lambda x: kind.misses(*densities(x))[None], chart, ground.sets, ends, 1e-3, tolerance, BUDGET[dim] // 4)
    outside = float(missed.value[0])
    if outside > max(_MAX_MASS_BY_ROUNDING, 3 * float(missed.error[0])):
        digits = 4 if float(missed.error[0]) < 1e-4 * outside else 2
        where = _where(densities, kind, missed.rule(chart)[0] if dim == 1 else torch.cat(draws), ends, p.names)
        return Estimate.settled(kind.name, math.inf, "quadrature", f"{outside:.{digits}g} of the mass of {where}")
    is_cube = p is not given and not p.bijection.is_real
    near = REACHES[-1:] if is_cube else REACHES  # near the corners of a simplex torch's densities are clamped
    within = ground.within or (None if p is given or is_cube else given)
    shown = _free_ends(within) if within else ground.bounds
    place = diverges(lambda x: kind.log_tail(*densities(x)), ground.bounds, draws, p.names, near, shown)
    if place:
        return Estimate.settled(kind.name, math.inf, "quadrature", f"the integrand of {kind.formula} isn't integrable {place}")
    if isinstance(kind, RenyiDivergence) and not bool((kind.log_tail(*densities(torch.cat(draws))) > -math.inf).any()):
        return Estimate.settled(kind.name, math.inf, "quadrature", "their supports don't overlap")
    whole = integrate(lambda x: kind.integrand(*densities(x))[None], chart, ground.sets, ends, 0.1, TOLERANCE[dim], BUDGET[dim])
    return _estimate(kind, whole, dim, ground)


def _ground_inside(p: Target, q: Target, kind: IntegralDivergence) -> Ground | None:
    """Return the ground of a KL in the free coordinates of the law of its expectation, which lives inside the other's support.

    The other is evaluated at x = T(u), and may have mass outside. None where the law isn't known in free coordinates.
    """
    if not isinstance(kind, WeightedKLs) or 0 not in kind.kl_weights:
        return None
    inner, outer = (p, q) if kind.kl_weights[0] else (q, p)
    covered = all(a[0] >= b[0] and a[1] <= b[1] for a, b in zip(inner.bijection.bounds, outer.bijection.bounds, strict=True))
    is_row = inner.bijection.constraints[0].event_dim == outer.bijection.constraints[0].event_dim == 0
    if inner.free_law is None or not (covered and is_row):
        return None
    free = inner.unconstrained()
    around = Located.of(outer, inner.draws(1000, 0).to(torch.float64))
    one, free_outer = Located.of(free), outer.unconstrained()

    def carried(u: Tensor) -> Tensor:
        x = inner.bijection.forward(u)
        log_volume = inner.bijection.log_jacobian(u, x)
        if outer.free_law is None:
            return outer.log_prob(x) + log_volume
        v = outer.bijection.inverse(x)  # has the digits of x near an end that both share
        return free_outer.log_prob(v) - outer.bijection.log_jacobian(v, x) + log_volume

    other = Target(log_prob=carried, dim=free.dim)
    name, whole, part = "p" if outer is p else "q", around.mass(), one.mass()
    pair, masses = (free, other), (part.log, whole.log)
    if inner is q:
        pair, masses = pair[::-1], masses[::-1]
    notes, doubts = around.notes(name), whole.doubts(name) + one.unresolved(one.chart, "q" if outer is p else "p")
    return Ground(*pair, masses, one.bounds, [[]] * free.dim, [one.draws], one.chart, notes, doubts, inner)


def _estimate(kind: IntegralDivergence, whole: Integral, dim: int, ground: Ground) -> Estimate:
    what, integral, error = "compute this divergence by quadrature", float(whole.value[0]), float(whole.error[0])
    if not math.isfinite(integral):
        because = f"the integral of {kind.formula} is beyond 1e308, the largest float64"
        raise TargetError(cannot(what, because, "Use a divergence that grows less, such as a KL"))
    if isinstance(kind, RenyiDivergence) and integral < 1e-290:
        because = f"the integral of {kind.formula} is below 1e-290: the two hardly overlap"
        raise TargetError(cannot(what, because, "Use a divergence such as forward_kl"))
    value, error = kind.of_integral(integral), kind.error_of_integral(error, integral)
    if not error <= max(0.01 * abs(value), 1e-3):
        because = f"after {whole.points:,} points the integral of {kind.formula} is {integral:.3g} with an error of {error:.2g}"
        raise TargetError(cannot(what, because, "Take it as unknown, or use Monte Carlo"))
    exact = whole.converged or error <= 5e-7 * max(1.0, abs(value)) or not math.isfinite(value)
    note = f"quadrature error at most {max(error, 1e-12):.1g}, {whole.points:,} points"
    # Rounding may push 0 slightly below itself; a value clearly below 0 stays, as a sign of a fault.
    clean = max(value, 0.0) if value > -max(1e-9, error) else value
    slow = () if exact or dim > 1 else ("six digits aren't reached on the line: it may fall so slowly that it's infinite",)
    doubts = ground.doubts if clean >= 0 else (*ground.doubts, _BELOW_ZERO)
    found = Estimate.settled(kind.name, clean, "quadrature", note, *slow, *doubts, *ground.notes)
    if math.isfinite(clean) and (ground.notes or doubts or not exact):
        found = replace(found, finite="not certified")
    if exact and not doubts:
        return found
    return replace(found, stderr=error, exact=False, reliable=not slow and not doubts)


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


def _free(p: Target, q: Target) -> tuple[Target, Target]:
    """Return the pair in free coordinates, where both laws are known in them, or on a cube: divergences don't change."""
    p, q = in_free_coordinates(p, q)
    words = [one.bijection.constraints[0] for one in (p, q)]
    if not any(word.event_dim > 0 and not one.bijection.is_real for word, one in zip(words, (p, q), strict=True)):
        return p, q
    if not all(isinstance(word, type(constraints.simplex)) for word in words):
        because = "their supports are neither products of intervals nor one simplex"
        raise TargetError(cannot("integrate these densities", because, "Use Monte Carlo"))
    return _by_sticks(p), _by_sticks(q)


def _free_ends(p: Target) -> list[tuple[float, float]]:
    """Where x, or a share of the stick of a simplex, goes as each free coordinate goes to −∞ and to ∞."""
    if p.bijection.constraints[0].event_dim > 0:
        return [(0.0, 1.0)] * p.bijection.free_dim
    return [(high, low) if low == -math.inf < high < math.inf else (low, high) for low, high in p.bijection.bounds]


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

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        return shares(p.draws(n, generator.initial_seed()))

    cube = partial(Target, log_prob=log_prob, support=constraints.interval(0.0, 1.0), normalized=p.normalized)
    if p.samples is not None:
        return cube(samples=shares(p.samples))
    return cube(sampler=sampler if Access.SAMPLER in p.access else None, dim=p.dim - 1)


def coordinates(p: Distribution | None) -> list[Distribution] | None:
    """The laws of independent coordinates, of `Independent(base, 1)` or of a fit of `Product`; None where p isn't of that form.

    >>> import torch
    >>> from torch.distributions import Normal
    >>> [float(one.mean) for one in coordinates(Independent(Normal(torch.tensor([1.0, 2.0]), 1.0), 1))]
    [1.0, 2.0]
    """
    if isinstance(p, IndependentColumns):
        return list(p.laws)
    if not isinstance(p, Independent) or p.reinterpreted_batch_ndims != 1 or p.batch_shape != () or p.base_dist.event_shape != ():
        return None
    try:
        return _rows_of(p.base_dist)
    except (TypeError, ValueError):  # its constructor takes other arguments than its constraints name
        return None


def _rows_of(base: Distribution) -> list[Distribution] | None:
    """The laws along the first axis of a batch, of one of torch's scalar laws or of mixtures of these."""
    if isinstance(base, MixtureSameFamily):
        parts, weights = _rows_of(base.component_distribution), base.mixture_distribution.probs
        each = [] if parts is None else zip(weights, parts, strict=True)
        return [MixtureSameFamily(Categorical(probs=one), part) for one, part in each] or None
    if type(base).__module__.partition(".")[0] not in ("torch", "whichkl"):
        return None
    if "logits" in base.arg_constraints and is_discrete(base):
        # A law of atoms stores one of its two parameters, and computes the other with fewer digits.
        stored = {name: value for name, value in vars(base).items() if isinstance(value, Tensor)}
        laws = [copy.copy(base) for _ in range(base.batch_shape[0])]
        for j, law in enumerate(laws):
            vars(law).update({name: value[j] for name, value in stored.items()}, _batch_shape=torch.Size())
        return laws
    values, kind = {name: getattr(base, name, None) for name in base.arg_constraints}, cast(Any, type(base))
    if not values or any(value is None for value in values.values()):
        return None
    wide = {name: tensor_of(value).expand(base.batch_shape) for name, value in values.items()}
    return [kind(**{name: value[j] for name, value in wide.items()}) for j in range(base.batch_shape[0])]


def coordinate_pairs(
    p: Distribution | None, q: Distribution | None, kind: IntegralDivergence
) -> list[tuple[Distribution, Distribution]]:
    """The laws of each coordinate, where both have independent ones and the divergence is made of theirs; empty elsewhere."""
    one, other = coordinates(p) or [], coordinates(q) or []
    return list(zip(one, other, strict=True)) if kind.name in _JOINED and len(one) == len(other) else []


def of_products(p: Distribution | None, q: Distribution | None, kind: IntegralDivergence) -> Estimate | None:
    """KLs, Jeffreys and Rényi add up over independent coordinates; 1 − Hellinger and 1 + χ² multiply; None elsewhere.

    Source: van Erven & Harremoës (2014), section II.C, for Rényi.
    """
    pairs = coordinate_pairs(p, q, kind)
    if len(pairs) < 2:
        return None
    each = []
    method = "enumeration" if all(is_discrete(one) for pair in pairs for one in pair) else "quadrature"
    for a, b in pairs:
        known = closed_form(a, b, kind)
        if known is None or not math.isfinite(known.value):
            known = _of_coordinate(a, b, kind)
        if known is None:
            return None
        each.append(known)
    infinite = next((j for j, one in enumerate(each) if math.isinf(one.value)), None)
    if infinite is not None:
        note = f"in coordinate {infinite + 1}: {'; '.join(each[infinite].notes) or 'its divergence is infinite'}"
        return Estimate.settled(kind.name, math.inf, method, note)
    value = _JOINED[kind.name]([one.value for one in each])
    joined = Estimate.settled(kind.name, value, method, f"joined from {len(each)} independent coordinates, one at a time")
    doubts = tuple(dict.fromkeys(note for one in each if one.finite != "certified" for note in one.notes))
    if doubts:
        joined = replace(joined, finite="not certified", notes=(*joined.notes, *doubts))
    if all(one.exact for one in each):
        return joined
    # 1 + χ² is the product of the coordinates' 1 + χ²: an error of one factor is multiplied by the others.
    error = math.fsum(one.stderr for one in each) * (1 + value if kind.name == "chi_squared" else 1)
    return replace(joined, stderr=error, exact=False, reliable=all(one.reliable for one in each))


def _of_coordinate(p: Distribution, q: Distribution, kind: IntegralDivergence) -> Estimate | None:
    if not is_discrete(p) and not is_discrete(q):
        return divergence(Target.of(p), Target.of(q), kind)
    listed = enumerate_atoms(p, q, kind)
    return None if listed is None else enumeration(listed[0], listed[1], kind, listed[2])
