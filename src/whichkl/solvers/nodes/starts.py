"""Starts: the modes of a log density, a Laplace approximation at each, and the Gaussians that cover several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.solvers.ascents import Peaks, Trial, ascend, ascend_by_newton
from whichkl.solvers.nodes.gaussian_rule import sobol
from whichkl.targets import Target

_MIN_BUDGET = 10_000
"""Evaluations of a budget from which on a log density is looked at before it is used."""
_CANDIDATES = 256
"""Number of points at which log p is evaluated to find where the search for modes begins."""
_MAX_SEARCHES = 12
"""Largest number of candidates from which ascents begin."""
_MAX_MODES = 8
"""Largest number of modes."""
_PATIENCE = 1.5
"""Limit on the calls of an ascent once three quarters of its rows have ended; see `ascend`."""
_MAX_DIM_OF_NEWTON = 16
"""Largest number of dimensions in which d more points per row cost little; Newton's method needs a fifth of the calls."""
_DRAWS_ABOUT_MODES = 256
"""Number of draws of the modes' Laplace approximations at which log p must be a number, if it is NaN far away."""
_MAX_DEVIATION = 0.1
"""Largest relative difference of log p and its gradient from a mode's parabola at a point that leads to the mode."""


def find_starts(target: Target, seed: int) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d d"]]:
    """Return means and Cholesky factors of Gaussians to start from.

    Modes are sought by Newton's method, or by L-BFGS in many dimensions, from draws of p if there are any, else from normal
    draws of several scales. Each distinct mode gives its Laplace approximation. Each pair of modes, and all of them together,
    give the Gaussian with the moments of their mixture, weighted by Laplace evidence. The start after the modes is N(0, I) about
    the candidates.

    Raises:
        TargetError: the log density is −inf at every candidate, or looks like a density.
    """
    modes = find_modes(target, seed)
    locs = [*modes.locs, modes.points.mean(0)]
    factors = [*modes.trils, torch.eye(target.dim, dtype=torch.float64, device="cpu")]
    count = len(modes.locs)
    # At most five modes are paired: ten pairs, next to all modes together.
    groups: list[tuple[int, ...]] = [*itertools.combinations(range(min(count, 5)), 2)]
    for group in [*groups, tuple(range(count))] if count > 2 else groups:
        loc, tril = _merge(*(part[list(group)] for part in (modes.locs, modes.trils, modes.evidence)))
        locs.append(loc)
        factors.append(tril)
    return torch.stack(locs), torch.stack(factors)


@dataclass(frozen=True)
class Modes:
    """Distinct modes, the highest first, with their Laplace approximations, and the points from which the search began."""

    locs: Float[Tensor, "m d"]
    trils: Float[Tensor, "m d d"]
    heights: Float[Tensor, " m"]
    points: Float[Tensor, "c d"]

    @property
    def evidence(self) -> Float[Tensor, " m"]:
        """Laplace's approximation of the log mass of each mode, up to (d/2) log 2π."""
        return self.heights + self.trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def find_modes(target: Target, seed: int) -> Modes:
    """Climb to the modes from candidates of several scales, or from draws of p, and from the modes that the target knows.

    Candidates at which the log density is NaN are ignored if it is a number on the modes' Laplace approximations.

    Raises:
        NotANumberError: the log density is NaN at candidates, and no modes are found, or it is NaN near them, too.
        TargetError: the log density is −inf or NaN at every candidate, +inf at one, or looks like a density.
    """
    rejected = target.evaluations["rejected"]
    points, value = points_to_start(target, seed, _CANDIDATES, lambda: _candidates(target.dim, seed), "0.3 to 10")
    if bool(value.isfinite().all()) and float(value.max()) == float(value.min()):
        because = "`log_prob` is constant, so that the density doesn't fall off and can't be normalised"
        raise TargetError(cannot("fit this target", because, "Pass `support=`, or the log density that you mean"))
    _refuse_density(target, value)
    has_nan = target.evaluations["rejected"] > rejected
    began = points[value.isfinite()]
    # Compares the gradient with differences once, before hundreds of points rely on it.
    target.value_and_score(began[:8].to(target.device))
    known = began[:0] if target.known_modes is None else target.known_modes[:_MAX_MODES].to("cpu", torch.float64)
    modes = climb_to_modes(target, torch.cat([known, began[:_MAX_SEARCHES]]), _MAX_MODES + len(known))
    if has_nan:
        if len(modes.locs):
            generator = torch.Generator().manual_seed(seed)
            z = torch.randn(_DRAWS_ABOUT_MODES, target.dim, generator=generator, dtype=torch.float64, device="cpu")
            which = torch.arange(_DRAWS_ABOUT_MODES, device="cpu") % len(modes.locs)
            points = modes.locs[which] + torch.einsum("nij,nj->ni", modes.trils[which], z)
        target.log_prob(points.to(target.device))  # raises if it is NaN there; without modes it is
    return replace(modes, points=began)


def refuse_unusable(target: Target, seed: int) -> None:
    """Refuse a log density that is constant, or NaN near its modes or everywhere, for solvers that don't call `find_modes`.

    A budget of a few thousand evaluations has no room for it.

    Raises:
        TargetError: what `find_modes` raises there.
    """
    if target.evaluations.most - target.evaluations.total < _MIN_BUDGET:
        return
    rejected = target.evaluations["rejected"]
    value = target.tried(_candidates(target.dim, seed).to(target.device)).detach()
    if target.evaluations["rejected"] > rejected or float(value.max()) == float(value.min()) > -math.inf:
        find_modes(target, seed)
    target.evaluations["rejected"] = rejected  # the candidates lie far from p, where a density that fails does no harm


def points_to_start(
    target: Target, seed: int, count: int, normal: Callable[[], Tensor], scales: str
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Return `count` samples or draws of p, or else the given normal draws, with log p; −∞ where it is NaN, except at draws of p.

    A log density of −inf at all of them is refused.
    """
    if target.samples is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(target.samples), generator=generator, device="cpu")[:count]
        points = target.samples[chosen].to(torch.float64)
    else:
        points = normal() if target.sampler is None else target.draws(count, seed).to(torch.float64)
    points = points.cpu()
    at = points.to(target.device)
    # A NaN far away is a point without density, but at draws of p it is an error.
    value = (target.log_prob(at) if target.access.can_sample else target.tried(at)).detach().cpu()
    if not bool(value.isfinite().any()):
        target.log_prob(at)  # raises an error that names the point, if it is NaN
        because = f"`log_prob` is -inf at all {len(points)} start points, spread over scales {scales} about 0"
        instead = "Pass `support=`, or shift and scale x so that p has mass there"
        raise TargetError(cannot("start on this target", because, instead))
    return points, value


def _candidates(dim: int, seed: int) -> Float[Tensor, "c d"]:
    """Return points at four scales, since the unit of x is unknown: modes can be near and narrow, or far and wide."""
    scales = torch.tensor([0.3, 1.0, 3.0, 10.0], dtype=torch.float64, device="cpu").repeat(_CANDIDATES // 4)
    return _normal_points(dim, seed) * scales[:, None]


def _normal_points(dim: int, seed: int) -> Float[Tensor, "c d"]:
    """Return scrambled Sobol points mapped to N(0, I), or normal draws in more dimensions than torch has Sobol points for."""
    if dim > torch.quasirandom.SobolEngine.MAXDIM:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(_CANDIDATES, dim, generator=generator, dtype=torch.float64, device="cpu")
    return math.sqrt(2) * torch.erfinv((2 * sobol(dim, _CANDIDATES, seed) - 1).clamp(-1 + 1e-12, 1 - 1e-12))


def _refuse_density(target: Target, value: Tensor) -> None:
    """Refuse a density in the place of a *log* density: never negative, and 0 far away, where its log would be −∞."""
    # A density is never negative; most log densities are, somewhere among 256 points.
    if bool((value < 0).any()):
        return
    far = 1e6 * torch.eye(target.dim, dtype=torch.float64, device=target.device)
    try:
        tail = target.log_prob(torch.cat([far, -far])).detach()
    except TargetError:
        return
    if bool((tail.abs() < 1e-9).all()):
        because = (
            f"it lies between {float(value.min()):.3g} and {float(value.max()):.3g} and is 0 far away: a density, not its log"
        )
        raise TargetError(cannot("use this `log_prob`", because, "Return the natural logarithm of the density"))


def climb_to_modes(target: Target, points: Float[Tensor, "c d"], most: int, max_calls: int = 250) -> Modes:
    """Climb from every point; return at most `most` distinct modes, their Laplace factors and heights, best first.

    An end that another quasi-Newton step would still raise is no mode: the density rises without bound there. Two ends are one
    mode if they are within a twentieth of a standard deviation of the Laplace approximation. An ascent stops where log p is
    nearly the parabola of a mode that was found, to which it would lead.
    """
    found: list[tuple[int, Tensor]] = []

    def foreseen(peaks: Peaks, arrived: Tensor, going: Tensor) -> Tensor:
        for i in arrived.tolist():
            tril = _new_mode(target, peaks, i, found)
            if tril is not None:
                found.append((i, tril))
        known = torch.zeros(len(going), dtype=torch.bool, device="cpu")
        for i, tril in found:
            known |= _lies_under(peaks, going, i, tril)
        return known

    # A call of Newton's method evaluates d + 1 points per row, where L-BFGS takes one.
    climb, calls = (ascend_by_newton, max_calls // 6) if points.shape[1] <= _MAX_DIM_OF_NEWTON else (ascend, max_calls)
    peaks = climb(trial_on_cpu(target), points, max_calls=calls, foreseen=foreseen, patience=_PATIENCE)
    # `foreseen` is called for rows that have moved only.
    rested = (peaks.x == points).all(-1).nonzero()[:, 0]
    foreseen(peaks, rested, rested[:0])  # points that were modes at the start never arrived
    best = sorted(found, key=lambda one: -float(peaks.value[one[0]]))[:most]
    chosen, dim = [i for i, _ in best], points.shape[1]
    trils = torch.stack([tril for _, tril in best]) if best else points.new_empty(0, dim, dim)
    return Modes(peaks.x[chosen], trils, peaks.value[chosen], points)


def trial_on_cpu(target: Target) -> Trial:
    """Return the target's log density and score as a function of points on the CPU."""

    def trial(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        value, score = target.trial(x.to(target.device))
        return value.cpu(), score.cpu()

    return trial


def _new_mode(target: Target, peaks: Peaks, i: int, found: list[tuple[int, Tensor]]) -> Float[Tensor, "d d"] | None:
    """Return Laplace's factor at the end of an ascent; None if it is no mode, or one that was found before."""
    end = peaks.x[i]
    if not (bool(end.isfinite().all()) and bool(peaks.value[i].isfinite()) and float(peaks.decrement[i]) < 1e-3):
        return None
    for j, tril in found:
        apart = torch.linalg.solve_triangular(tril, (end - peaks.x[j])[:, None], upper=False)
        # Distance in standard deviations of the mode: the ends of ascents to one mode differ by far less.
        if float(torch.linalg.vector_norm(apart)) <= 0.05:
            return None
    return _laplace(target, end, peaks.curvature.scale(i))


def _lies_under(peaks: Peaks, rows: Tensor, i: int, tril: Float[Tensor, "d d"]) -> Bool[Tensor, " a"]:
    """Return whether value and gradient at each of these rows are those of a mode's parabola, so that the row leads there."""
    away = torch.linalg.solve_triangular(tril, (peaks.x[rows] - peaks.x[i]).T, upper=False).T
    half = away.square().sum(-1) / 2
    gradient = peaks.score[rows] @ tril
    is_value = (peaks.value[rows] - (peaks.value[i] - half)).abs() <= _MAX_DEVIATION * half
    under: Bool[Tensor, " a"] = is_value & ((gradient + away).square().sum(-1) <= 2 * _MAX_DEVIATION**2 * half)
    return under


def _laplace(target: Target, mode: Float[Tensor, " d"], scale: Float[Tensor, " d"]) -> Float[Tensor, "d d"] | None:
    """Return the Cholesky factor of (−∇² log p)⁻¹, from 2d scores a thousandth of `scale` away; None at a saddle."""
    dim = len(mode)
    step = torch.maximum((1e-3 * scale).clamp(max=0.1), 1e-7 * mode.abs().clamp(min=1.0))
    ends = torch.cat([mode + torch.diag(step), mode - torch.diag(step)])
    value, score = target.trial(ends.to(target.device))
    if not bool(value.isfinite().all()):
        return None
    hessian = (score[dim:] - score[:dim]).cpu() / (2 * step[:, None])
    unit = hessian.diagonal().clamp(min=1e-300).rsqrt()  # columns may have any units
    eigenvalue, vector = torch.linalg.eigh(unit[:, None] * (hessian + hessian.T) / 2 * unit)
    if float(eigenvalue[0]) <= 1e-12 * float(eigenvalue[-1]):
        return None
    factor, failed = torch.linalg.cholesky_ex((vector / eigenvalue) @ vector.T)
    return None if int(failed) else unit[:, None] * factor


def _merge(locs: Float[Tensor, "m d"], trils: Float[Tensor, "m d d"], evidence: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
    """Return mean and Cholesky factor of a mixture of Gaussians with weights softmax(evidence), each at least 5 %."""
    # At least 5 %: Laplace's evidence can be off by much, and a mode that it calls negligible would be lost to this start.
    w = torch.softmax(evidence, 0).clamp(min=0.05)
    w = w / w.sum()
    mean = w @ locs
    apart = locs - mean
    covariance = torch.einsum("m,mij,mkj->ik", w, trils, trils) + torch.einsum("m,mi,mj->ij", w, apart, apart)
    return mean, torch.linalg.cholesky(covariance)
