"""Projection: the weighted points nearest to given ones in KL that have given moments, by damped Newton on the dual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.conversions.attainable import refusal

_MAX_STEPS = 200
"""Largest number of steps; moments that can be had take about ten."""
_NEGLIGIBLE_GAP = 1e-12
"""Largest gap of a moment, in standard deviations of the reference, that needs no further step."""
_MAX_GAP = 1e-9
"""Largest gap, in the same unit, at which the moments count as met."""
_MIN_CURVATURE = 1e-14
"""Relative curvature of the dual below which moments depend on each other linearly."""
_MAX_SHARE_LEFT = 0.1
"""Largest share of the gain that a step with an earlier curvature may leave."""
_MIN_GAIN = 1e-12
"""Gain of a step, in nats, below which rounding hides the change of the dual."""
_ROWS_PER_BLOCK = 2048
"""Number of rows whose products stay in the cache."""
_ROUNDING = 1e-7
"""Standard deviation of a moment, relative to its distance from m, up to which it is a constant: rounding of its variance."""
_MIN_SPREAD = 1e-9
"""Variance of the moments along λ, relative to the reference's, below which the points are at an end of their range."""


@dataclass(frozen=True)
class Projection:
    """q ∝ r exp(λ·f): the weights of q, and λ."""

    multipliers: Float[Tensor, " k"]
    log_weights: Float[Tensor, " n"]
    """Natural logs of q's weights; their sum is 1."""
    log_z: float
    """log E_r exp(λ·f), in nats."""
    kl: float
    """KL(q‖r), in nats."""
    gap: float
    """Largest |E_q f − m + s² λ|, in standard deviations of f under r: 0 at the optimum."""
    steps: int


@dataclass(frozen=True)
class Dual:
    """The dual problem: f at n points, (n, k), the values m of its moments, their errors s (0 is exact), and their names."""

    f: Float[Tensor, "n k"]
    values: Float[Tensor, " k"]
    stderr: Float[Tensor, " k"]
    names: Sequence[str]
    are_draws: bool = True
    """Whether the points are all that the reference has; otherwise they are nodes of integrals over its density."""
    is_unbounded: bool = False
    """Whether the support of that density is."""

    def project(self, log_r: Float[Tensor, " n"], start: Float[Tensor, " k"] | None = None) -> Projection:
        """Minimise KL(q‖r) + ½ Σ ((E_q f − m)/s)² over weights q of the points; where s is 0, E_q f = m.

        The dual D(λ) = log E_r exp(λ·(f − m)) + ½ Σ s² λ² is convex and smooth, its gradient is E_q f − m + s² λ, and its Hessian
        is the covariance of f under q plus s². Each step solves with that Hessian, and is halved until D falls.

        Args:
            log_r: natural logs of the reference's weights, up to one constant.
            start: λ to begin with.

        Raises:
            TargetError: no weights have these moments.

        Source: Csiszár (1975); Boyd & Vandenberghe (2004), sections 5.5 and 9.5, for the dual and damped Newton.
        """
        found = self.attempt(log_r, start)
        if isinstance(found, Projection):
            return found
        kind = {"are_draws": self.are_draws, "is_unbounded": self.is_unbounded}
        raise refusal(self.f, log_r, self.values, found, self.names, **kind)

    def attempt(self, log_r: Float[Tensor, " n"], start: Float[Tensor, " k"] | None = None) -> Projection | Float[Tensor, " k"]:
        """As `project`; return the direction of λ instead of an error."""
        kept = log_r > -math.inf
        f, log_r = (self.f, log_r) if bool(kept.all()) else (self.f[kept], log_r[kept])
        log_r = log_r - torch.logsumexp(log_r, 0)
        g, r, is_exact = f - self.values, log_r.exp(), self.stderr == 0
        mean, curvature = _moments(g, r)
        unit = curvature.diagonal().clamp(min=0).sqrt()
        is_constant = unit <= _ROUNDING * mean.abs()
        if bool((wrong := is_constant & is_exact & (mean.abs() > _MAX_GAP * (1 + self.values.abs()))).any()):
            return wrong.to(f.dtype)
        unit = torch.where(is_constant, self.stderr.clamp(min=1.0), unit)
        theta, logs, value, gap, steps = _newton(g, log_r, self.stderr.square(), unit, mean, curvature, start)
        along = logs - log_r  # λ·(f − m), up to a constant
        is_at_end = False
        if self.are_draws and bool(is_exact.all()) and gap <= _MAX_GAP:
            under_q, under_r = (float(w @ (along - w @ along).square()) for w in (logs.exp(), r))
            is_at_end = under_q < _MIN_SPREAD * under_r
        if gap > _MAX_GAP or not math.isfinite(value) or is_at_end:
            return theta * unit
        full = torch.full((len(kept),), -math.inf, dtype=torch.float64, device=f.device)
        full[kept] = logs
        log_z = value - 0.5 * float((self.stderr * theta).square().sum()) + float(theta @ self.values)
        kl = float(logs.exp() @ along)
        return Projection(theta, full, log_z, max(0.0, kl), gap, steps)

    def spread(self, log_r: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
        """Return the standard deviation of each moment under the reference's weights."""
        w = torch.softmax(log_r, 0)
        return (w @ (self.f - w @ self.f).square()).sqrt()


def _newton(
    g: Float[Tensor, "n k"],
    log_r: Float[Tensor, " n"],
    square: Float[Tensor, " k"],
    unit: Float[Tensor, " k"],
    mean: Float[Tensor, " k"],
    curvature: Float[Tensor, "k k"],
    start: Float[Tensor, " k"] | None,
) -> tuple[Tensor, Tensor, float, float, int]:
    """Minimise log Σ r exp(λ·g) + ½ Σ s² λ²; return λ, log q, the value, the gap and the number of steps.

    It begins at `start`, or at λ = 0, where the gradient is the mean of g.
    A gradient costs two products with a vector, a curvature the square of the columns. So the inverse of an earlier curvature,
    corrected by the gradients since then (BFGS), is used while each step leaves little of what there was to gain.
    """
    least = float(log_r.min()) - 1  # D ≥ −KL(q‖r) ≥ the log of the smallest weight, wherever the moments can be had

    def at(theta: Tensor) -> tuple[Tensor, float]:
        logs = log_r + g @ theta
        top = torch.logsumexp(logs, 0)
        return logs - top, float(top + 0.5 * square @ theta.square())

    if start is None:
        theta, logs, value, gradient = torch.zeros_like(square), log_r, 0.0, mean
    else:
        theta, (logs, value) = start, at(start)
        gradient = logs.exp() @ g + square * theta
    best, before, is_fresh, was_fresh = math.inf, math.inf if start is None else 0.0, start is None, False
    inverse, step, last = _inverse(curvature + torch.diag(square), unit), torch.zeros_like(theta), torch.zeros_like(theta)
    for count in range(_MAX_STEPS):  # noqa: B007
        gap = float((gradient / unit).abs().max())
        if gap <= _NEGLIGIBLE_GAP or value < least or not math.isfinite(value):
            break
        inverse = _corrected(inverse, moved=step, changed=gradient - last) if count else inverse
        step = inverse @ gradient
        gain, last = float(gradient @ step), gradient
        is_stuck = gain <= _MIN_GAIN and gap >= 0.5 * best
        if is_stuck and was_fresh:
            break
        if not is_fresh and (is_stuck or gain <= 0 or gain > _MAX_SHARE_LEFT * before):
            inverse, is_fresh = _inverse(_moments(g, logs.exp())[1] + torch.diag(square), unit), True
            step = inverse @ gradient
            gain = float(gradient @ step)
        if gain <= _MIN_GAIN:  # rounding hides the change of the value, and the gradient alone shows progress
            best, step = gap, -step
            logs, value = at(theta + step)
        else:
            for size in (0.5**i for i in range(40)):
                new_logs, lower = at(theta - size * step)
                if lower <= value - 1e-4 * size * gain:
                    break
            else:
                break
            step, logs, value = -size * step, new_logs, lower
        theta, before, was_fresh, is_fresh = theta + step, gain, is_fresh, False
        gradient = logs.exp() @ g + square * theta
    return theta, logs, -math.inf if value < least else value, gap, count


def _moments(g: Float[Tensor, "n k"], q: Float[Tensor, " n"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """Return the mean and the covariance of rows with weights q."""
    mean = q @ g
    square = -mean[:, None] * mean
    for rows, w in zip(g.split(_ROWS_PER_BLOCK), q.split(_ROWS_PER_BLOCK), strict=True):
        square.addmm_((rows * w[:, None]).T, rows)
    return mean, square


def _inverse(matrix: Float[Tensor, "k k"], unit: Float[Tensor, " k"]) -> Float[Tensor, "k k"]:
    """Invert a positive semi-definite matrix, in the directions in which it is positive, in coordinates divided by units."""
    outer = unit[:, None] * unit
    factor, failed = torch.linalg.cholesky_ex(matrix / outer)
    diagonal = factor.diagonal()
    if int(failed) == 0 and float(diagonal.min()) ** 2 > _MIN_CURVATURE * float(diagonal.max()) ** 2:
        return torch.cholesky_inverse(factor) / outer
    size, axes = torch.linalg.eigh(matrix / outer)
    known = size > _MIN_CURVATURE * size[-1]
    found: Tensor = (axes[:, known] / size[known]) @ axes[:, known].T / outer
    return found


def _corrected(
    inverse: Float[Tensor, "k k"], *, moved: Float[Tensor, " k"], changed: Float[Tensor, " k"]
) -> Float[Tensor, "k k"]:
    """Return the inverse curvature that maps the change of the gradient to the step (BFGS; Nocedal & Wright, 2006, 6.17)."""
    bend = float(moved @ changed)
    if not bend > 0:
        return inverse
    along = inverse @ changed
    cross = torch.outer(moved, along)
    corrected: Tensor = (
        inverse + (1 + float(changed @ along) / bend) / bend * torch.outer(moved, moved) - (cross + cross.T) / bend
    )
    return corrected
