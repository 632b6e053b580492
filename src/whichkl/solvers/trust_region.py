"""Trust region: Newton's method by conjugate gradients, for several starts at once, from gradients alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""θ (b, p) -> values (b,) and gradients (b, p); +inf where a value isn't a number."""
Metric = Callable[[Tensor], Tensor]
"""θ (b, p) -> the change of each coordinate in a step of length 1, (b, p)."""

_DIFFERENCE = 1e-5
"""Length per coordinate, in units of the metric, of the differences of gradients that give second derivatives."""
_ROUNDING = 1e-11
"""Relative fall of a value that rounding hides, so that the gradient decides whether a step is taken."""
_MIN_RADIUS = 1e-9
"""Radius per coordinate at which a start counts as stalled."""
_MAX_STEPS = 100
"""Largest number of Newton steps."""
_MAX_CHEAP_STEPS = 12
"""Largest number of steps with cheap second derivatives; a start that needs more finds them too rough."""
_MIN_RESIDUE = 1e-4
"""Smallest relative residue of the conjugate gradients."""
_MAX_CONJUGATE_STEPS = 250
"""Largest number of conjugate gradients per Newton step."""


@dataclass(frozen=True)
class End:
    """The end of each start."""

    theta: Float[Tensor, "b p"]
    value: Float[Tensor, " b"]
    residual: Float[Tensor, " b"]
    """Length of the gradient in the coordinates of the metric."""
    stalled: Bool[Tensor, " b"]
    """Whether no step of any length improves it, as at a kink."""
    fall: Float[Tensor, " b"]
    """The fall of each value from its start."""
    history: tuple[float, ...] = ()
    """The least value after each Newton step, in which all active starts take part."""


def minimize(
    function: Function,
    metric: Metric,
    theta: Float[Tensor, "b p"],
    tolerance: float,
    bend: Function | None = None,
    spent: Callable[[], bool] | None = None,
) -> End:
    """Minimise from every start: min over ‖δ‖ ≤ Δ of gᵀδ + ½ δᵀHδ, by conjugate gradients; Δ follows the accuracy of that model.

    Lengths and conjugate gradients are in coordinates divided by the metric at the present point. Hv is a difference of two
    gradients, so that a step of k conjugate gradients costs k + 1 evaluations. ‖g‖ alone decides when to stop.

    `bend` is a cheaper function of nearly the same second derivatives, which gives them in the first 12 steps. `spent` returns
    whether to end now.

    Source: Steihaug (1983); Nocedal & Wright (2006), algorithms 4.1 and 7.2; for `bend`, Byrd, Chin, Neveitt & Nocedal (2011).
    """
    value, gradient = function(theta)
    begun, scale = value, metric(theta)
    radius = torch.full_like(value, math.sqrt(theta.shape[1]))
    stalled, history = torch.zeros_like(value, dtype=torch.bool), list[float]()
    while len(history) < _MAX_STEPS:
        residual = torch.linalg.vector_norm(scale * gradient, dim=-1)
        active = (value.isfinite() & (residual > tolerance) & ~stalled).nonzero()[:, 0]
        if len(active) == 0 or (spent is not None and spent()):
            break
        here, slope, unit, reach = theta[active], (scale * gradient)[active], scale[active], radius[active]
        bent = function if bend is None or len(history) >= _MAX_CHEAP_STEPS else bend
        step, predicted = _steihaug(bent, here, slope, unit, reach, residual[active], bent is function)
        there = here + unit * step
        new, new_gradient = function(there)
        fell = value[active] - new
        ratio = torch.where(new.isfinite(), fell, -math.inf) / predicted.clamp(min=1e-300)
        new_scale = metric(there)
        shorter = torch.linalg.vector_norm(new_scale * new_gradient, dim=-1) <= 0.9 * residual[active]
        blurred = predicted <= _ROUNDING * (1 + value[active].abs())
        # 1e-4, 0.25 and 0.75 are the usual constants (Nocedal & Wright, 2006, algorithm 4.1).
        taken = torch.where(blurred, shorter & new.isfinite(), ratio > 1e-4)
        length = torch.linalg.vector_norm(step, dim=-1)
        wide = torch.where((ratio > 0.75) & (length > 0.99 * reach), 2 * reach, reach)
        # A shorter radius is a fourth of the step and not of the radius: the step may have ended far inside.
        radius[active] = torch.where(torch.where(blurred, taken, ratio >= 0.25), wide, length / 4)
        stalled[active] = radius[active] < _MIN_RADIUS * math.sqrt(theta.shape[1])
        moved = active[taken]
        theta, gradient = theta.index_copy(0, moved, there[taken]), gradient.index_copy(0, moved, new_gradient[taken])
        value, scale = value.index_copy(0, moved, new[taken]), scale.index_copy(0, moved, new_scale[taken])
        history.append(float(value.min()))
    residual = torch.linalg.vector_norm(scale * gradient, dim=-1)
    return End(theta, value, residual.masked_fill(~value.isfinite(), math.inf), stalled, begun - value, tuple(history))


def hessian_product(
    function: Function, theta: Float[Tensor, "b p"], gradient: Tensor, along: Float[Tensor, "b p"], unit: Float[Tensor, "b p"]
) -> Float[Tensor, "b p"]:
    """Return U H U v: a forward difference of gradients along U v, where U = diag(unit)."""
    size = _DIFFERENCE * math.sqrt(theta.shape[1]) / torch.linalg.vector_norm(along, dim=-1, keepdim=True).clamp(min=1e-300)
    _, ahead = function(theta + size * unit * along)
    bent: Tensor = (unit * ahead - gradient) / size
    return bent


def _steihaug(
    function: Function, theta: Tensor, slope: Tensor, unit: Tensor, radius: Tensor, residual: Tensor, is_same: bool
) -> tuple[Float[Tensor, "b p"], Float[Tensor, " b"]]:
    """Return the step, in units of the metric, and the fall of the quadratic model."""
    step, bent, left, along = torch.zeros_like(slope), torch.zeros_like(slope), slope.clone(), -slope
    base = slope if is_same else unit * function(theta)[1]
    squared = left.square().sum(-1)
    size = residual / math.sqrt(slope.shape[1])
    # A relative residue of √‖g‖ gives superlinear convergence, and few conjugate gradients far from the end.
    goal = (residual * size.sqrt().clamp(_MIN_RESIDUE, 0.1)).square()
    running = torch.ones_like(radius, dtype=torch.bool)
    for _ in range(min(2 * slope.shape[1], _MAX_CONJUGATE_STEPS)):
        on = running.nonzero()[:, 0]
        if len(on) == 0:
            break
        d, s, r = along[on], step[on], left[on]
        curved = hessian_product(function, theta[on], base[on], d, unit[on])
        bend = (d * curved).sum(-1)
        rate = squared[on] / bend
        outside = (bend <= 0) | ~bend.isfinite() | (torch.linalg.vector_norm(s + rate[:, None] * d, dim=-1) >= radius[on])
        # Where the step leaves the region, it ends at τ ≥ 0 with ‖s + τ d‖ = Δ.
        a, b, c = d.square().sum(-1), (s * d).sum(-1), radius[on].square() - s.square().sum(-1)
        rate = torch.where(outside, (-b + (b.square() + a * c).clamp(min=0).sqrt()) / a, rate)[:, None]
        # A difference of gradients that leaves the support isn't finite; the step to there counts, its curvature doesn't.
        known = curved.isfinite().all(-1, keepdim=True)
        step[on], bent[on] = s + rate * d, bent[on] + torch.where(known, rate * curved, 0.0)
        r = r + torch.where(known, rate * curved, 0.0)
        after = r.square().sum(-1)
        left[on], along[on] = r, -r + (after / squared[on])[:, None] * d
        squared[on] = after
        running[on] = ~outside & (after > goal[on])
    return step, -(step * slope).sum(-1) - (step * bent).sum(-1) / 2
