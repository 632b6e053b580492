"""Line distances: energy and Wasserstein distances of two densities of one variable, from their distribution functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.exact.boxes import KRONROD, NODE, SHARES, adapt
from whichkl.divergences.exact.located import BUDGET, TOLERANCE, Ground
from whichkl.divergences.exact.tails import diverges
from whichkl.targets import Target


def energy_distance(p: Target, q: Target) -> Estimate:
    """Energy distance 2 E|X − Y| − E|X − X′| − E|Y − Y′| = 2 ∫ (F − G)² of two densities on the line, in the unit of x.

    Source: Székely & Rizzo (2013).

    >>> from torch.distributions import Normal
    >>> print(energy_distance(Target.of(Normal(0.0, 1.0)), Target.of(Normal(1.0, 1.0))))
    energy = 0.541807 (quadrature)
    """
    ground = _ground(p, q)
    for name, which in (("p", 0), ("q", 1)):
        if _no_moment(ground, which, 1):
            because = f"{name} has no mean, which the energy distance needs"
            raise InputError(cannot("compute it", because, "Use a divergence such as jensen_shannon"))

    def once(laws: _Laws) -> float:
        return 2 * float(laws.weight @ laws.gap().square())

    return _estimate("energy", ground, once, "in the unit of the columns, not in nats")


def wasserstein(p: Target, q: Target, power: float = 2) -> Estimate:
    """Wasserstein distance to the power a, ∫₀¹ |F⁻¹ − G⁻¹|ᵃ dt = E_p|X − G⁻¹(F(X))|ᵃ, of two densities on the line.

    It's in the unit of x to the power a; ∞ where the a-th moment of one is finite and that of the other isn't.

    Source: Villani (2003), theorem 2.18.

    >>> from torch.distributions import Normal
    >>> print(wasserstein(Target.of(Normal(0.0, 1.0)), Target.of(Normal(1.0, 2.0))))
    sliced_wasserstein = 2.000000 (quadrature)
    """
    ground = _ground(p, q)
    without = [_no_moment(ground, which, power) for which in (0, 1)]
    if all(without):
        because = f"neither has a finite moment of order {power:g}, on which it rests"
        raise InputError(cannot("compute this Wasserstein distance", because, "Use a divergence such as jensen_shannon"))
    if any(without):
        note = f"{'p' if without[0] else 'q'} has no finite moment of order {power:g}, and the other has"
        return replace(Estimate.settled("sliced_wasserstein", math.inf, "quadrature", note), unit="none")

    def once(laws: _Laws) -> float:
        moved = (laws.x - laws.transported()).abs() ** power
        mass = laws.weight * laws.p
        return float(mass @ torch.where(mass > 0, moved, 0.0))

    unit = f"in the unit of the columns to the power {power:g}, not in nats"
    there = _estimate("sliced_wasserstein", ground, once, unit)
    if there.exact:
        return there
    back = _estimate("sliced_wasserstein", ground.swapped(), once, unit)  # a gap in q makes G⁻¹ jump, and not F⁻¹
    return back if back.stderr < there.stderr else there


def _ground(p: Target, q: Target) -> Ground:
    if max(p.dim, q.dim) > 1:
        raise InputError(cannot("integrate on the line", f"p and q have {max(p.dim, q.dim)} variables", "Give draws of both"))
    return Ground.of(p, q)


def _no_moment(ground: Ground, which: int, power: float) -> bool:
    def log_size(x: Tensor) -> Tensor:
        return ground.densities(x)[which] + power * x[:, 0].abs().log()

    return diverges(log_size, ground.bounds, ground.draws, ["x"]) is not None


def _estimate(name: str, ground: Ground, once: Callable[[_Laws], float], unit: str) -> Estimate:
    value, again = (once(_Laws.of(ground, share)) for share in SHARES[:2])
    error = abs(value - again)
    if not (math.isfinite(value) and error <= max(0.05 * value, 1e-3)):
        because = f"two partitions give {value:.6g} and {again:.6g}"
        raise TargetError(cannot("compute this distance by quadrature", because, "Use draws of both"))
    notes = [unit, f"quadrature error about {max(error, 1e-12):.1g}"]
    exact = error <= 5e-7 * max(1.0, value)
    if not exact:
        notes.append("six digits aren't reached: tails that fall slowly hold more than is seen, and the error is too small")
    found = replace(Estimate.settled(name, value, "quadrature", *notes, *ground.doubts, *ground.notes), unit="none")
    if ground.notes or ground.doubts or not exact:
        found = replace(found, finite="not certified")
    return found if exact and not ground.doubts else replace(found, stderr=error, exact=False, reliable=False)


_NODES_PER_BLOCK = 2_048
"""Nodes that are inverted at once: 17 numbers each, which should stay in the processor's cache."""


@dataclass(frozen=True)
class _Laws:
    """Nodes x with weights, both densities there, and both distribution functions, from the left and from the right."""

    ground: Ground
    middle: Float[Tensor, "b 1"]
    half: Float[Tensor, "b 1"]
    x: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    p: Float[Tensor, " n"]
    inner: Float[Tensor, "2 b 15"]
    """Mass of p and of q between a panel's left edge and each node."""
    panels: Float[Tensor, "2 b"]

    @classmethod
    def of(cls, ground: Ground, share: float) -> _Laws:
        def both(x: Tensor) -> Tensor:
            return torch.stack(ground.densities(x)).exp()

        boxes = ground.chart.boxes(ground.sets, ground.ends, share)
        found = adapt(both, ground.chart, boxes, 0.0, TOLERANCE[1], BUDGET[1])
        order = found.low[:, 0].argsort()
        low, high = found.low[order], found.high[order]
        x, volume = ground.chart.grid(low, high, NODE)
        value = both(x.reshape(-1, 1)).reshape(2, *volume.shape)
        scaled = torch.where(value == 0, 0.0, value * volume)
        panels = scaled @ KRONROD
        total = panels.sum(1)
        inner, panels = scaled @ _TO_NODES.T / total[:, None, None], panels / total[:, None]
        x, weight, p = (one.reshape(-1) for one in (x, volume * KRONROD, value[0]))
        return cls(ground, (low + high) / 2, (high - low) / 2, x, weight, p, inner, panels)

    def left(self) -> Float[Tensor, "2 b"]:
        """Mass to the left of each panel."""
        return self.panels.cumsum(1) - self.panels

    def right(self) -> Float[Tensor, "2 b"]:
        """Mass to the right of each panel's left edge."""
        return self.panels.flip(1).cumsum(1).flip(1)

    def gap(self) -> Float[Tensor, " n"]:
        """F − G at the nodes, from the side on which less mass lies."""
        below = self.left()[..., None] + self.inner
        above = self.right()[..., None] - self.inner
        return torch.where(below[0] < 0.5, below[0] - below[1], above[1] - above[0]).reshape(-1)

    def transported(self) -> Float[Tensor, " n"]:
        """G⁻¹(F(x)) at the nodes: the panel by search, the place in it by bisection of the integrated interpolant."""
        left, right = self.left(), self.right()
        below, above = (left[0, :, None] + self.inner[0]).reshape(-1), (right[0, :, None] - self.inner[0]).reshape(-1)
        from_left = below < 0.5
        panel = torch.where(
            from_left,
            torch.searchsorted(left[1].contiguous(), below, right=True) - 1,
            len(right[1]) - 1 - torch.searchsorted(right[1].flip(0).contiguous(), above),
        )
        seen = ((left[1] + self.panels[1] > 1e-17) & (right[1] > 1e-17)).nonzero()  # beyond, nothing but rounding
        panel = panel.clamp(int(seen[0]), int(seen[-1]))
        wanted = torch.where(from_left, below - left[1, panel], right[1, panel] - above)
        mass = self.panels[1, panel]  # the interpolant is exact to about 1e-14 of its panel's mass: no further into the corner
        wanted = torch.minimum(torch.maximum(wanted, 1e-13 * mass), (1 - 1e-13) * mass)
        knots = torch.cat([torch.zeros_like(self.panels[1, :, None]), self.inner[1], self.panels[1, :, None]], 1)
        blocks = zip(panel.split(_NODES_PER_BLOCK), wanted.split(_NODES_PER_BLOCK), strict=True)
        t = torch.cat([_inverted(knots[i], mass) for i, mass in blocks])
        u = self.middle[panel, 0] + self.half[panel, 0] * t
        axis = self.ground.chart.axes[0]
        return axis.from_unit(u.clamp(1e-300, 1 - 2.0**-53))[0]


def _inverted(knots: Float[Tensor, "n 17"], wanted: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Where the polynomial through the knots has these values: between two of them, by the Illinois method.

    Source: Dowell & Jarratt (1971).
    """
    last = (knots < wanted[:, None]).sum(1, keepdim=True).clamp(1, len(_KNOTS) - 1)
    low, high = _KNOTS[last - 1][:, 0], _KNOTS[last][:, 0]
    under, over = knots.gather(1, last - 1)[:, 0] - wanted, knots.gather(1, last)[:, 0] - wanted
    t, before = (low + high) / 2, torch.zeros_like(wanted, dtype=torch.long)
    for _ in range(60):
        slope = over - under
        t = torch.where(slope > 0, (low * over - high * under) / slope, (low + high) / 2)
        t = torch.minimum(torch.maximum(t, low), high)
        off = _interpolated(knots, t) - wanted
        side = torch.where(off < 0, -1, 1)
        again = 1 - (side == before).to(under.dtype) / 2  # the end that stays twice counts half
        under, over = torch.where(side < 0, off, under * again), torch.where(side > 0, off, over * again)
        low, high, before = torch.where(side < 0, t, low), torch.where(side > 0, t, high), side
        if bool(((off.abs() <= 4e-16 * knots[:, -1]) | (high - low <= 4e-16)).all()):
            break
    return t


def _interpolated(knots: Float[Tensor, "n 17"], t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The polynomial through (−1, nodes, 1), evaluated barycentrically."""
    away = t[:, None] - _KNOTS
    near = away.abs() < 1e-15
    term = _BARYCENTRIC / torch.where(near, 1.0, away)
    value = (term * knots).sum(1) / term.sum(1)
    return torch.where(near.any(1), (knots * near).sum(1), value)


def _to_nodes() -> Float[Tensor, "15 15"]:
    """Matrix S with Σⱼ Sᵢⱼ f(tⱼ) = ∫ f from −1 to tᵢ, exact for polynomials of degree 14 (by Legendre polynomials)."""
    degree = torch.arange(16, dtype=torch.float64, device="cpu")
    legendre = [torch.ones_like(NODE), NODE]
    for k in range(1, 15):
        legendre.append(((2 * k + 1) * NODE * legendre[k] - k * legendre[k - 1]) / (k + 1))
    table = torch.stack(legendre, 1)
    integrals = torch.cat([(NODE + 1)[:, None], (table[:, 2:] - table[:, :-2]) / (2 * degree[1:-1] + 1)], 1)
    matrix: Tensor = torch.linalg.solve(table[:, :15].T, integrals.T).T
    return matrix


_TO_NODES = _to_nodes()
_KNOTS = torch.nn.functional.pad(torch.nn.functional.pad(NODE, (1, 0), value=-1.0), (0, 1), value=1.0)
_BARYCENTRIC = 1 / ((_KNOTS[:, None] - _KNOTS) * 2 + torch.eye(17, dtype=torch.float64, device="cpu")).prod(1)
