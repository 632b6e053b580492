"""Boxes: adaptive Gauss–Kronrod integration over one to three variables, on the unit cube that a chart lays over the domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.divergences.exact.charts import MIN_WIDTH, Chart

_MAX_POINTS_PER_CALL = 1 << 19
SHARES = (0.45, 0.36, 0.57, 0.41)
"""Quantiles at which the first boxes are cut; each gives another partition of the same cube."""

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
class Integral:
    """The integrals with their errors, how many points they took, and the boxes that they came to, in the unit cube."""

    value: Float[Tensor, " k"]
    error: Float[Tensor, " k"]
    converged: bool
    points: int
    low: Float[Tensor, "b d"]
    high: Float[Tensor, "b d"]

    def rule(self, chart: Chart) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Points x and weights w with Σ w f(x) = ∫ f(x) dx, for functions as smooth as those integrated."""
        x, volume = chart.grid(self.low, self.high, NODE)
        for j in range(self.low.shape[1]):
            volume = volume * KRONROD.reshape((15,) + (1,) * (self.low.shape[1] - 1 - j))
        return x.reshape(-1, x.shape[-1]), volume.reshape(-1)


def integrate(
    function: Callable[[Tensor], Tensor],
    chart: Chart,
    draws: Sequence[Float[Tensor, "n d"]],
    ends: Sequence[Sequence[float]],
    least: float = 0.0,
    tolerance: float = 1e-10,
    budget: int = 4_000_000,
) -> Integral:
    """Integrate a vector-valued function, (n, d) → (k, n), over the chart's domain; d is 1, 2 or 3.

    The first boxes follow the sets of `draws`, which show where the mass is, and the `ends`, where the integrand may jump. The
    boxes whose errors make up more than half of what is allowed are halved across the axis with the larger error, all in one
    call, until the errors' sum is below the tolerance. Then the integral is computed again from another partition, since a kink
    that hides between a box's edge and its first node escapes any rule: the error is never less than by how much the two
    differ, and where they differ by more than their errors, further partitions are tried until two agree.

    `tolerance` is relative to the integral of each component's absolute value, or to `least` where that is larger. Above
    `budget` points of one partition, it stops unconverged.

    Source: the error is QUADPACK's, (200 |K₁₅ − G₇| / ∫|f|)^1.5 ∫|f| (Piessens et al., 1983), summed over the axes.
    """
    found = adapt(function, chart, chart.boxes(draws, ends, SHARES[0]), least, tolerance, budget)
    points = found.points
    # An integral that agrees with itself only on one partition may have missed a kink or a spike between its nodes.
    for share in SHARES[1:]:
        if not bool(found.value.isfinite().all()):
            break
        again = adapt(function, chart, chart.boxes(draws, ends, share), least, tolerance, budget)
        points += again.points
        gap = (again.value - found.value).abs()
        agree = bool((gap <= 2 * (again.error + found.error)).all())
        better = again if not agree or bool(again.error.sum() <= found.error.sum()) else found
        error = torch.maximum(better.error, gap)
        found = replace(better, error=error, points=points, converged=agree and better.converged)
        if agree:
            break
    return found


def adapt(
    function: Callable[[Tensor], Tensor], chart: Chart, boxes: tuple[Tensor, Tensor], least: float, tolerance: float, budget: int
) -> Integral:
    """As `integrate`, from one partition, without the check by another."""
    batch = _Batch.of(function, chart, *boxes)
    each = 15 ** len(chart.axes)
    spent, converged = len(batch.low) * each, False
    while True:
        # Relative to ∫|f| and not to ∫f, which may be 0 by cancellation.
        goal = tolerance * batch.size.sum(0).clamp(min=max(least, 1e-300))
        blame = (batch.error / goal[:, None]).amax(1)
        score = blame.sum(1)
        if not bool(score.isfinite().all()) or float(score.sum()) <= 1:
            converged = bool(score.isfinite().all())
            break
        axis = blame.argmax(1, keepdim=True)
        wide = (batch.high - batch.low).gather(1, axis)[:, 0] > MIN_WIDTH
        order = torch.where(wide, score, 0.0).argsort(descending=True)
        # All boxes are cut but those with the least errors, which together take up half of what is allowed.
        enough = int((score[order].flip(0).cumsum(0).flip(0) > 0.5).sum())
        chosen = order[: min(enough, int(wide.sum()), _MAX_POINTS_PER_CALL // (2 * each))]
        if len(chosen) == 0 or spent + 2 * len(chosen) * each > budget:
            break
        low, high, across = batch.low[chosen], batch.high[chosen], axis[chosen]
        middle = ((low + high) / 2).gather(1, across)
        lower, upper = torch.cat([low, low.scatter(1, across, middle)]), torch.cat([high.scatter(1, across, middle), high])
        fresh = _Batch.of(function, chart, lower, upper)
        spent += len(fresh.low) * each
        kept = torch.ones(len(score), dtype=torch.bool, device="cpu")
        kept[chosen] = False
        batch = _Batch(*(torch.cat([old[kept], new]) for old, new in zip(batch, fresh, strict=True)))
    return Integral(batch.fine.sum(0), batch.error.sum((0, 2)), converged, spent, batch.low, batch.high)


class _Batch(NamedTuple):
    """Boxes with their integrals, sizes (integrals of absolute values) and errors per axis."""

    low: Float[Tensor, "b d"]
    high: Float[Tensor, "b d"]
    fine: Float[Tensor, "b k"]
    size: Float[Tensor, "b k"]
    error: Float[Tensor, "b k d"]

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], chart: Chart, low: Tensor, high: Tensor) -> _Batch:
        dim, parts = low.shape[1], []
        step = max(1, _MAX_POINTS_PER_CALL // 15**dim)
        for lower, upper in zip(low.split(step), high.split(step), strict=True):
            x, volume = chart.grid(lower, upper, NODE)
            value = function(x.reshape(-1, dim)).reshape(-1, *volume.shape)
            # At the ends the volume can be infinite, and 0 · ∞ would be NaN.
            value = torch.where(value == 0, 0.0, value * volume)
            fine, size = _contract(value, None), _contract(value.abs(), None)
            gap = torch.stack([_contract(value, j).abs() for j in range(dim)], -1)
            ratio = (200 * gap / size[..., None].clamp(min=1e-300)).clamp(max=1) ** 1.5
            error = size[..., None] * ratio.clamp(min=1e-14)  # no rule is more exact than rounding
            parts.append((fine.T, size.T, error.movedim(0, 1)))
        fine, size, error = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(low, high, fine, size, error)


def _contract(value: Tensor, axis: int | None) -> Tensor:
    """Sum (k, b, 15, …) over the nodes by Kronrod's weights; along one axis by their difference from Gauss's."""
    for j in reversed(range(value.ndim - 2)):
        value = value @ (KRONROD - _GAUSS if j == axis else KRONROD)
    return value


NODE = torch.tensor([*(-x for x in _X[:7]), *_X[::-1]], dtype=torch.float64, device="cpu")
KRONROD = torch.tensor(_K[:7] + _K[::-1], dtype=torch.float64, device="cpu")
_GAUSS = torch.zeros(15, dtype=torch.float64, device="cpu")
_GAUSS[1:14:2] = torch.tensor(_G + _G[2::-1], dtype=torch.float64, device="cpu")
