"""Trust region: Newton's method by conjugate gradients, for several starts at once, where only gradients can be had."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""θ (b, p) ↦ values (b,) and gradients (b, p); +inf where a value isn't a number."""
Metric = Callable[[Tensor], Tensor]
"""θ (b, p) ↦ (b, p), by how much each coordinate moves in a step of length 1."""

_STEP = 1e-5
"""Length, each coordinate in units of the metric, of the differences of gradients that stand for second derivatives."""
_BLUR = 1e-11
"""Below this part of a value, rounding hides whether a step lowered it, and the gradient decides."""
_SHORTEST = 1e-9
_ROUGHLY = 12
"""After so many steps cheap second derivatives have proved too rough."""
_LEAST_RESIDUE, _MOST = 1e-4, 250


@dataclass(frozen=True)
class End:
    """Where each start ended."""

    theta: Float[Tensor, "b p"]
    value: Float[Tensor, " b"]
    residual: Float[Tensor, " b"]
    """Length of the gradient in the coordinates of the metric."""
    stalled: Bool[Tensor, " b"]
    """Whether no step, however short, could improve it: at a kink."""
    steps: int
    """Newton steps, all starts together."""
    fall: Float[Tensor, " b"]
    """By how much each value fell from its start."""
    history: tuple[float, ...] = ()
    """The least value after each step."""


def minimize(
    function: Function,
    metric: Metric,
    theta: Float[Tensor, "b p"],
    tolerance: float,
    bend: Function | None = None,
    most: int = 100,
    spent: Callable[[], bool] | None = None,
) -> End:
    """Minimise from every start: min over ‖δ‖ ≤ Δ of gᵀδ + ½ δᵀHδ, by conjugate gradients, Δ by how well that foretold f.

    Lengths, and the conjugate gradients, are in coordinates divided by the metric at the present point. Hv is a difference
    of two gradients, so that a step of k conjugate gradients costs k + 1 evaluations. It stops on ‖g‖ alone.

    Args:
        function: what is minimised, with its gradient.
        metric: the scale of each coordinate.
        theta: the starts.
        tolerance: length of the gradient at the end.
        bend: a cheaper function of nearly the same second derivatives, from which they are taken in the first 12 steps.
        most: Newton steps at the most.
        spent: whether it has to end now, with what it has.

    Source: Steihaug (1983); Nocedal & Wright (2006), algorithms 4.1 and 7.2; for `bend`, Byrd, Chin, Neveitt & Nocedal (2011).
    """
    value, gradient = function(theta)
    begun, scale = value, metric(theta)
    radius = torch.full_like(value, math.sqrt(theta.shape[1]))
    stalled, steps = torch.zeros_like(value, dtype=torch.bool), 0
    history: list[float] = []
    while steps < most:
        residual = torch.linalg.vector_norm(scale * gradient, dim=-1)
        active = (value.isfinite() & (residual > tolerance) & ~stalled).nonzero()[:, 0]
        if len(active) == 0 or (spent is not None and spent()):
            break
        steps += 1
        here, slope, unit, reach = theta[active], (scale * gradient)[active], scale[active], radius[active]
        bent = function if bend is None or steps > _ROUGHLY else bend
        step, foretold = _steihaug(bent, here, slope, unit, reach, residual[active], bent is function)
        there = here + unit * step
        new, new_gradient = function(there)
        fell = value[active] - new
        ratio = torch.where(new.isfinite(), fell, -math.inf) / foretold.clamp(min=1e-300)
        new_scale = metric(there)
        shorter = torch.linalg.vector_norm(new_scale * new_gradient, dim=-1) <= 0.9 * residual[active]
        blurred = foretold <= _BLUR * (1 + value[active].abs())
        taken = torch.where(blurred, shorter & new.isfinite(), ratio > 1e-4)
        length = torch.linalg.vector_norm(step, dim=-1)
        wide = torch.where((ratio > 0.75) & (length > 0.99 * reach), 2 * reach, reach)
        radius[active] = torch.where(torch.where(blurred, taken, ratio >= 0.25), wide, length / 4)
        stalled[active] = radius[active] < _SHORTEST * math.sqrt(theta.shape[1])
        moved = active[taken]
        theta, gradient = theta.index_copy(0, moved, there[taken]), gradient.index_copy(0, moved, new_gradient[taken])
        value, scale = value.index_copy(0, moved, new[taken]), scale.index_copy(0, moved, new_scale[taken])
        history.append(float(value.min()))
    residual = torch.linalg.vector_norm(scale * gradient, dim=-1)
    return End(theta, value, residual.masked_fill(~value.isfinite(), math.inf), stalled, steps, begun - value, tuple(history))


def curvature(
    function: Function, theta: Float[Tensor, "b p"], gradient: Tensor, along: Float[Tensor, "b p"], unit: Float[Tensor, "b p"]
) -> Float[Tensor, "b p"]:
    """Return U H U v: a forward difference of gradients along U v, where U = diag(unit)."""
    size = _STEP * math.sqrt(theta.shape[1]) / torch.linalg.vector_norm(along, dim=-1, keepdim=True).clamp(min=1e-300)
    _, ahead = function(theta + size * unit * along)
    bent: Tensor = (unit * ahead - gradient) / size
    return bent


def _steihaug(
    function: Function, theta: Tensor, slope: Tensor, unit: Tensor, radius: Tensor, residual: Tensor, is_same: bool
) -> tuple[Float[Tensor, "b p"], Float[Tensor, " b"]]:
    """Return the step, in units of the metric, and by how much the quadratic model falls there."""
    step, bent, left, along = torch.zeros_like(slope), torch.zeros_like(slope), slope.clone(), -slope
    base = slope if is_same else unit * function(theta)[1]
    squared = left.square().sum(-1)
    size = residual / math.sqrt(slope.shape[1])
    goal = (residual * size.sqrt().clamp(_LEAST_RESIDUE, 0.1)).square()
    running = torch.ones_like(radius, dtype=torch.bool)
    for _ in range(min(2 * slope.shape[1], _MOST)):
        on = running.nonzero()[:, 0]
        if len(on) == 0:
            break
        d, s, r = along[on], step[on], left[on]
        curved = curvature(function, theta[on], base[on], d, unit[on])
        bend = (d * curved).sum(-1)
        rate = squared[on] / bend
        outside = (bend <= 0) | ~bend.isfinite() | (torch.linalg.vector_norm(s + rate[:, None] * d, dim=-1) >= radius[on])
        rate = torch.where(outside, _to_the_edge(s, d, radius[on]), rate)[:, None]
        known = curved.isfinite().all(-1, keepdim=True)
        step[on], bent[on] = s + rate * d, bent[on] + torch.where(known, rate * curved, 0.0)
        r = r + torch.where(known, rate * curved, 0.0)
        after = r.square().sum(-1)
        left[on], along[on] = r, -r + (after / squared[on])[:, None] * d
        squared[on] = after
        running[on] = ~outside & (after > goal[on])
    return step, -(step * slope).sum(-1) - (step * bent).sum(-1) / 2


def _to_the_edge(step: Tensor, along: Tensor, radius: Tensor) -> Float[Tensor, " b"]:
    """The τ ≥ 0 with ‖step + τ · along‖ = radius."""
    a, b = along.square().sum(-1), (step * along).sum(-1)
    c = radius.square() - step.square().sum(-1)
    root: Tensor = (-b + (b.square() + a * c).clamp(min=0).sqrt()) / a
    return root
