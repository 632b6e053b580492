"""Quadrature: adaptive Gauss–Kronrod panels on the line, for densities of one variable; exact to about 1e-9."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.estimate import Estimate, Finite
from whichkl.divergences.kinds import ForwardKLDivergence, Kind
from whichkl.targets import Target

_TOLERANCE = 1e-11
_LEVELS = 40
_PANELS = 1 << 15

# Kronrod's 15 nodes on [0, 1] half, their weights, and the 7 Gauss weights (QUADPACK, Piessens et al., 1983).
_X = [0.991455371120812639206854697526329, 0.949107912342758524526189684047851, 0.864864423359769072789712788640926]
_X += [0.741531185599394439863864773280788, 0.586087235467691130294144691693013, 0.405845151377397166906606412076961]
_X += [0.207784955007898467600689403773245, 0.0]
_K = [0.022935322010529224963732008058970, 0.063092092629978553290700663189204, 0.104790010322250183839876322541518]
_K += [0.140653259715525918745189590510238, 0.169004726639267902826583426598550, 0.190350578064785409913256402421014]
_K += [0.204432940075298892414161999234649, 0.209482141084727828012999174891714]
_G = [0.129484966168869693270611432679082, 0.279705391489276667901467771423780, 0.381830050505118944950369775488975]
_G += [0.417959183673469387755102040816327]


@dataclass(frozen=True)
class Panels:
    """An adapted rule: points x with weights for ∫ f(x) dx, and the integrals that it was adapted to."""

    x: Float[Tensor, " n"]
    w: Float[Tensor, " n"]
    value: Float[Tensor, " k"]
    error: Float[Tensor, " k"]
    converged: bool


def integrate(
    function: Callable[[Tensor], Tensor], breaks: Float[Tensor, " b"], low: float, high: float, least: float = 0.0
) -> Panels:
    """Integrate a vector-valued function of one variable, (n,) → (k, n), over (low, high), either end maybe infinite.

    Panels are halved, all unfinished ones in one call, until the 7- and 15-point rules agree to 1e-10 of the whole
    in every component.

    Args:
        function: the integrands; finite, 0 where the density is.
        breaks: points in the interval that show where and how wide the mass is.
        low: left end.
        high: right end.
        least: below this size of the whole, the error counts as if the whole had it.
    """
    change = _Change.fitting(breaks, low, high)
    edges = torch.cat([change.to_unit(breaks), torch.linspace(0, 1, 33, dtype=torch.float64)]).unique()
    left, right = edges[:-1], edges[1:]
    done: list[_Batch] = []
    for _ in range(_LEVELS):
        batch = _Batch.of(function, change, left, right)
        whole = batch.fine.abs().sum(0) + sum(part.fine.abs().sum(0) for part in done)
        bad = (batch.error > _TOLERANCE * whole.clamp(min=least)).any(-1)
        if not bool(bad.any()) or len(bad) > _PANELS:
            break
        done.append(batch.take(~bad))
        middle = (left[bad] + right[bad]) / 2
        left, right = torch.cat([left[bad], middle]), torch.cat([middle, right[bad]])
    done.append(batch)
    x, w = (torch.cat([getattr(part, name).reshape(-1) for part in done]) for name in ("x", "w"))
    value, error = (torch.cat([getattr(part, name) for part in done]).sum(0) for name in ("fine", "error"))
    return Panels(x, w, value, error, not bool(bad.any()))


def expectation_rule(p: Target) -> tuple[Float[Tensor, "n 1"], Float[Tensor, " n"]]:
    """Return points and weights, Σ w = 1, with Σ w f(x) = E_p[f] for smooth f, from p's log density on the line.

    Raises:
        InputError: p isn't one-dimensional.
        TargetError: p isn't integrable, or claims to be normalised and isn't.
    """
    breaks, shift = _landmarks(p)

    def moments(x: Tensor) -> Tensor:
        density = torch.exp(p.log_prob(x[:, None]) - shift)
        scaled = (x - breaks.median()) / (breaks.quantile(0.9) - breaks.quantile(0.1)).clamp(min=1e-12)
        grown = torch.where(density > 0, scaled.square(), torch.zeros_like(scaled))
        return torch.stack([density, density * grown])

    low, high = _bounds(p)
    change = _Change.fitting(breaks, low, high)
    for side, end in (("left", low), ("right", high)):
        if not math.isfinite(end) and _diverges(
            _SecondMoment(), lambda x: (p.log_prob(x[:, None]), x.abs().log()), change, end, side
        ):
            because = f"its {side} tail is so heavy that it has no variance, and KL(p‖q) is infinite for every Gaussian"
            raise TargetError(cannot("minimise `forward_kl` here", because, "Use `reverse_kl`, or a transform such as support="))
    panels = integrate(moments, breaks, low, high)
    _check_mass(p, panels, shift)
    w = panels.w * torch.exp(p.log_prob(panels.x[:, None]) - shift)
    keep = w > 1e-18 * w.sum()
    return panels.x[keep, None], w[keep] / w[keep].sum()


def kl(p: Target, q: Target, quantity: str = "forward_kl") -> Estimate:
    """KL(p‖q) = ∫ p log(p/q) for two densities on the line; see `divergence`."""
    return replace(divergence(p, q, ForwardKLDivergence()), quantity=quantity)


def divergence(p: Target, q: Target, kind: Kind) -> Estimate:
    """A divergence of two densities on the line, in nats (distances between 0 and 1 have no unit); ∞ with its reason.

    Both are normalised by the same quadrature, so that unnormalised densities do. Infinity is found where one density has
    mass and the other none, and in the tails and at the ends of the supports, by whether the integrand falls faster than
    1/|x| there, looked at out to 2¹⁰⁰ widths.

    Raises:
        InputError: a density isn't one-dimensional.
        TargetError: p or q isn't integrable, or the integral doesn't converge for another reason.
    """
    (p_breaks, p_shift), (q_breaks, q_shift) = _landmarks(p), _landmarks(q)
    bounds = [*_bounds(p), *_bounds(q)]
    low, high = min(bounds[::2]), max(bounds[1::2])
    ends = torch.tensor([end for end in bounds if math.isfinite(end)], dtype=torch.float64)
    breaks = torch.cat([p_breaks, q_breaks, ends]).unique()
    p_log_z = _log_mass(p, p_breaks, breaks, p_shift)
    q_log_z = _log_mass(q, q_breaks, breaks, q_shift)

    def densities(x: Tensor) -> tuple[Tensor, Tensor]:
        return p.log_prob(x[:, None]) - p_log_z, q.log_prob(x[:, None]) - q_log_z

    missed = integrate(lambda x: kind.misses(*densities(x))[None], breaks, low, high, least=1e-3)
    outside = float(missed.value[0])
    if outside > 1e-9:
        where = _regions(missed.x, torch.logaddexp(*densities(missed.x)).exp(), kind.misses(*densities(missed.x)), ends.tolist())
        note = f"{outside:.4g} of the mass of one lies outside the support of the other, at {where}"
        return _infinite(kind, note)
    change = _Change.fitting(breaks, low, high)
    for name, end in (("left", low), ("right", high)):
        if _diverges(kind, densities, change, end, name):
            place = f"as x → {end:g}" if math.isfinite(end) else f"in the {name} tail"
            return _infinite(kind, f"the integrand of {kind.formula} isn't integrable {place}")
    panels = integrate(lambda x: kind.integrand(*densities(x))[None], breaks, low, high, least=0.1)
    if not bool(panels.value.isfinite().all()):
        because = f"the integral of {kind.formula} is beyond 1e308, the largest float64"
        raise TargetError(
            cannot("compute this divergence by quadrature", because, "Use a divergence that grows less, such as a KL")
        )
    if not panels.converged:
        because = f"the integral of {kind.formula} doesn't converge"
        raise TargetError(cannot("compute this divergence by quadrature", because, "Take it as unknown, or use Monte Carlo"))
    value = kind.value(float(panels.value[0]))
    note = f"quadrature error at most {max(float(panels.error[0]), 1e-12):.1g}, {len(panels.x)} points"
    clean = max(value, 0.0) if value > -1e-9 else value
    finite: Finite = "certified" if math.isfinite(clean) else "infinite"
    return Estimate(kind.name, clean, finite=finite, method="quadrature", exact=True, notes=(note,))


def _infinite(kind: Kind, note: str) -> Estimate:
    return Estimate(kind.name, math.inf, finite="infinite", method="quadrature", exact=True, notes=(note,))


def _log_mass(p: Target, own: Tensor, breaks: Tensor, shift: float) -> float:
    """Log of the integral of p's density, checked."""
    inside = torch.cat([own, breaks]).unique()
    panels = integrate(lambda x: torch.exp(p.log_prob(x[:, None]) - shift)[None], inside, *_bounds(p))
    return math.log(_check_mass(p, panels, shift)) + shift


def _diverges(kind: Kind, densities: Callable[[Tensor], tuple[Tensor, Tensor]], change: _Change, end: float, side: str) -> bool:
    """Whether |h| doesn't fall faster than 1/distance towards an end: then each doubling adds as much as the last."""
    sign = -1.0 if side == "left" else 1.0
    for reach in (100, 40, 15):
        power = torch.arange(3, reach, 0.25, dtype=torch.float64)
        distance = change.width * (2.0**power if not math.isfinite(end) else 2.0**-power)
        x = change.centre + sign * distance if not math.isfinite(end) else end - sign * distance
        try:
            log_p, log_q = densities(x)
        except TargetError:  # overflow inside the user's function: look less far
            continue
        size = kind.log_tail(log_p, log_q) + distance.log()
        known = (x != end) & x.isfinite() & ~size.isnan()
        size = size[known]
        overflow = (~size.isfinite()).nonzero()
        last = size[: int(overflow[0]) if len(overflow) else len(size)][-9:]
        return len(last) == 9 and bool((last.diff() >= -1e-6).all())
    return False


class _SecondMoment(Kind):
    """∫ x² p, asked only for its tail; the second log density stands for log|x|."""

    def integrand(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.exp(self.log_tail(log_p, log_q))

    def log_tail(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p + 2 * log_q


@dataclass(frozen=True)
class _Batch:
    """The panels of one level: nodes, weights, and both rules' integrals, a row a panel."""

    x: Float[Tensor, "p 15"]
    w: Float[Tensor, "p 15"]
    fine: Float[Tensor, "p k"]
    error: Float[Tensor, "p k"]

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], change: _Change, left: Tensor, right: Tensor) -> _Batch:
        middle, half = (left + right) / 2, (right - left) / 2
        x, slope = change.from_unit(middle[:, None] + half[:, None] * _NODE)
        inside = (x > change.low) & (x < change.high)  # a node that rounds to an end weighs nothing
        x = torch.where(inside, x, change.centre)
        scale = torch.where(inside, half[:, None] * slope, 0.0)
        value = function(x.reshape(-1)).reshape(-1, *x.shape)
        value = torch.where(value == 0, 0.0, value * scale)
        fine, coarse = (value * _KRONROD).sum(-1).T, (value * _GAUSS).sum(-1).T
        return cls(x, scale * _KRONROD, fine, (fine - coarse).abs())

    def take(self, which: Tensor) -> _Batch:
        return _Batch(self.x[which], self.w[which], self.fine[which], self.error[which])


@dataclass(frozen=True)
class _Change:
    """The change of variable from u in (0, 1) to an interval; at a finite end x − end ~ u², which tames 1/√x there."""

    low: float
    high: float
    centre: float
    width: float

    @classmethod
    def fitting(cls, breaks: Tensor, low: float, high: float) -> _Change:
        spread = float(breaks.quantile(0.9) - breaks.quantile(0.1)) if len(breaks) > 1 else 1.0
        return cls(low, high, float(breaks.median()), spread if spread > 0 else 1.0)

    def from_unit(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and dx/du."""
        v = 1 - u
        if math.isfinite(self.low) and math.isfinite(self.high):
            length = self.high - self.low
            return self.low + length * u.square() * (1 + 2 * v), 6 * length * u * v
        if math.isfinite(self.low):
            return self.low + self.width * (u / v).square(), 2 * self.width * u / v**3
        if math.isfinite(self.high):
            return self.high - self.width * (v / u).square(), 2 * self.width * v / u**3
        rest = 4 * u * v
        return self.centre + self.width * (u - v) / rest, 2 * self.width * (1 + (u - v).square()) / rest.square()

    def to_unit(self, x: Tensor) -> Tensor:
        """Return u for the points that lie strictly inside the interval."""
        x = x[(x > self.low) & (x < self.high)]
        if math.isfinite(self.low) and math.isfinite(self.high):
            share = (x - self.low) / (self.high - self.low)
            return 0.5 - torch.sin(torch.asin(1 - 2 * share) / 3)
        if math.isfinite(self.low):
            root = ((x - self.low) / self.width).sqrt()
            return root / (1 + root)
        if math.isfinite(self.high):
            root = ((self.high - x) / self.width).sqrt()
            return 1 / (1 + root)
        y = (x - self.centre) / self.width
        return 0.5 + y / (1 + torch.sqrt(1 + 4 * y.square()))


def _landmarks(p: Target) -> tuple[Float[Tensor, " b"], float]:
    """Where the mass of p is (quantiles of its draws), and the largest log density there."""
    if p.dim != 1:
        raise InputError(cannot("integrate on the line", f"the density has dimension {p.dim}", "Use Monte Carlo"))
    if p.samples is not None:
        draws = p.samples[:4096, 0]
    elif Access.SAMPLER in p.access:
        draws = p.draws(4096, seed=0)[:, 0]
    else:
        because = "without a draw of it, its mass can't be found on the line"
        raise TargetError(cannot("integrate this density", because, "Pass `sampler=`"))
    breaks = draws.to(torch.float64).quantile(torch.linspace(0, 1, 33, dtype=torch.float64)).unique()
    return breaks, float(p.log_prob(breaks[:, None]).max())


def _bounds(p: Target) -> tuple[float, float]:
    """The ends of p's support."""
    support = p.bijection.constraints[0]
    return float(getattr(support, "lower_bound", -math.inf)), float(getattr(support, "upper_bound", math.inf))


def _check_mass(p: Target, panels: Panels, shift: float) -> float:
    """Return the integral of exp(log p − shift), refused if it isn't finite or p claims to be normalised and isn't."""
    mass = float(panels.value[0])
    settled = float(panels.error[0]) <= 1e-6 * mass
    if not (math.isfinite(mass) and mass > 0 and settled):
        raise TargetError(cannot("integrate this density", "its integral isn't finite", "Check the log density's tails"))
    whole = math.exp(math.log(mass) + shift)
    if p.normalized and abs(whole - 1) > 1e-5:
        because = f"`normalized=True` was said, and the density integrates to {whole:.6g}"
        raise TargetError(cannot("use this target", because, "Normalise it, or say `normalized=False`"))
    return mass


def _regions(x: Float[Tensor, " n"], density: Float[Tensor, " n"], missed: Float[Tensor, " n"], ends: list[float]) -> str:
    """Describe the runs of points where one has mass and the other none, as intervals that end at a support's end."""
    here = x[density > 0]
    order = torch.argsort(here)
    here, runs = here[order], (missed[density > 0][order] > 0).to(torch.int8)
    zero = torch.zeros(1, dtype=torch.int8)
    change = torch.diff(torch.cat([zero, runs, zero]))
    starts, stops = (change == 1).nonzero().flatten().tolist(), (change == -1).nonzero().flatten().tolist()
    digits = 3 - math.floor(math.log10(float(here.quantile(0.9) - here.quantile(0.1)) + 1e-300))
    parts = []

    def edge(below: int, above: int, near: int) -> str:
        """The support's end between two neighbouring nodes, or the node itself."""
        between = [e for e in ends if float(here[below]) <= e <= float(here[above])]
        return f"{round(between[0] if between else float(here[near]), digits) + 0.0:g}"

    for start, end in list(zip(starts, stops, strict=True))[:4]:
        low = f"{edge(start - 1, start, start)} < " if start > 0 else ""
        high = f" < {edge(end - 1, end, end - 1)}" if end < len(here) else ""
        parts.append(f"{low}x{high}" if low or high else "every x")
    return " and ".join(parts) + (" and elsewhere" if len(starts) > 4 else "")


def _whole_rule() -> tuple[Tensor, Tensor, Tensor]:
    half, kronrod = torch.tensor(_X, dtype=torch.float64), torch.tensor(_K, dtype=torch.float64)
    gauss = torch.zeros(15, dtype=torch.float64)
    gauss[1:14:2] = torch.tensor(_G + _G[2::-1], dtype=torch.float64)
    return torch.cat([-half[:7], half.flip(0)]), torch.cat([kronrod[:7], kronrod.flip(0)]), gauss


_NODE, _KRONROD, _GAUSS = _whole_rule()
