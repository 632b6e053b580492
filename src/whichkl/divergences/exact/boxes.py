"""Boxes: adaptive Gauss–Kronrod integration over one to three variables, on the unit cube that a chart lays over the domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MIN_WIDTH = 2.0**-46
"""Boxes narrower than this, in the unit cube, aren't cut."""
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
class Axis:
    """The change of variable from u in (0, 1) to an interval; at a finite end x − end ~ u², which tames 1/√x there."""

    low: float
    high: float
    centre: float
    width: float

    @classmethod
    def fitting(cls, draws: Float[Tensor, " n"], low: float, high: float) -> Axis:
        """The axis over (low, high) whose scale is that of the draws."""
        tenth, middle, ninetieth = draws.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=draws.dtype, device="cpu")).tolist()
        return cls(low, high, middle, ninetieth - tenth if ninetieth > tenth else 1.0)

    def from_unit(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and dx/du."""
        # Each case is a map with a square at its finite ends and a pole at its infinite ones, so that x stays exact near either.
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
        """Return u; 0 and 1 at and beyond the ends."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            share = ((x - self.low) / (self.high - self.low)).clamp(0, 1)
            # The root of the cubic 3 u² − 2 u³ = share by trigonometry (Viète).
            return 0.5 - torch.sin(torch.asin(1 - 2 * share) / 3)
        if math.isfinite(self.low):
            root = ((x - self.low).clamp(min=0) / self.width).sqrt()
            return root / (1 + root)
        if math.isfinite(self.high):
            root = ((self.high - x).clamp(min=0) / self.width).sqrt()
            return 1 / (1 + root)
        y = (x - self.centre) / self.width
        return 0.5 + y / (1 + torch.sqrt(1 + 4 * y.square()))


@dataclass(frozen=True)
class Chart:
    """The map from the unit cube onto the domain: one axis per coordinate; on all of ℝᵈ followed by a linear map."""

    axes: tuple[Axis, ...]
    linear: Float[Tensor, "d d"] | None = None
    centre: Float[Tensor, " d"] | None = None

    @classmethod
    def fitting(
        cls, draws: Sequence[Float[Tensor, "n d"]], bounds: Sequence[tuple[float, float]], ends: Sequence[Sequence[float]] = ()
    ) -> Chart:
        """The chart over a product of intervals with the draws' scales; in the axes of `contrast`, if nothing ends anywhere."""
        pooled = torch.cat(list(draws))
        dim = pooled.shape[1]
        if dim == 1 or any(ends) or any(math.isfinite(end) for pair in bounds for end in pair):
            return cls(tuple(Axis.fitting(pooled[:, j], *bounds[j]) for j in range(dim)))
        linear, centre = contrast(draws), pooled.median(0).values
        lines = torch.linalg.solve(linear, (pooled - centre).T)
        return cls(tuple(Axis.fitting(line, -math.inf, math.inf) for line in lines), linear, centre)

    def grid(self, low: Float[Tensor, "b d"], high: Float[Tensor, "b d"], nodes: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
        """The mᵈ nodes (of a rule on −1 … 1) in each box, (b, m, …, d), and the volume of each, (b, m, …)."""
        boxes, dim = low.shape
        columns, volume = [], torch.ones((boxes,) + (1,) * dim, dtype=torch.float64, device="cpu")
        for j, axis in enumerate(self.axes):
            half = ((high[:, j] - low[:, j]) / 2)[:, None]
            x, slope = axis.from_unit(low[:, j, None] + half * (1 + nodes))
            # Densities may raise or be infinite exactly at an end.
            inside = (x > axis.low) & (x < axis.high)  # a node that rounds to an end has weight 0
            shape = (boxes,) + (1,) * j + (len(nodes),) + (1,) * (dim - 1 - j)
            columns.append(torch.where(inside, x, axis.centre).reshape(shape))
            volume = volume * torch.where(inside, half * slope, 0.0).reshape(shape)
        points = torch.stack(torch.broadcast_tensors(*columns), -1)
        if self.linear is not None and self.centre is not None:
            points = self.centre + points @ self.linear.T
            volume = volume * self.linear.det().abs()
        return points, volume

    def to_unit(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Points of the domain in the cube."""
        if self.linear is not None and self.centre is not None:
            x = torch.linalg.solve(self.linear, (x - self.centre).T).T
        return torch.stack([axis.to_unit(x[:, j]) for j, axis in enumerate(self.axes)], 1)

    def boxes(self, draws: Sequence[Tensor], ends: Sequence[Sequence[float]], share: float) -> tuple[Tensor, Tensor]:
        """Cut the cube at the ends (a list per coordinate), evenly, and where the draws are (one set per density).

        A box that is much wider than the bulk of a set in it is cut next to that bulk; one that holds many draws of a set, at
        that set's quantile `share`: another share gives another partition of the same cube.
        """
        dim = len(self.axes)
        # Even cuts find what no draw shows; their number is limited by 15ᵈ nodes per box.
        even = {1: 32, 2: 4, 3: 2}[dim]
        cuts = []
        for j, axis in enumerate(self.axes):
            inner = [end for end in ends[j] if axis.low < end < axis.high] if self.linear is None else []
            unit = axis.to_unit(torch.tensor(inner, dtype=torch.float64, device="cpu"))
            grid = (torch.arange(even + 1, dtype=torch.float64, device="cpu") + share - 0.5).clamp(0, even) / even
            cuts.append(torch.cat([unit, grid, torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")]).unique())
        low = torch.cartesian_prod(*(cut[:-1] for cut in cuts)).reshape(-1, dim)
        high = torch.cartesian_prod(*(cut[1:] for cut in cuts)).reshape(-1, dim)
        sets = [self.to_unit(one).numpy() for one in draws]  # on some hundred numbers NumPy takes a quarter of torch's time
        most = max(1, len(draws[0]) // (10 if dim == 3 else 24))
        finished: list[tuple[np.ndarray, np.ndarray]] = []
        todo = []
        for a, b in zip(low.numpy(), high.numpy(), strict=True):
            held = [u[((u >= a) & (u < b)).all(1)] for u in sets]
            todo.append((a, b, [u for u in held if len(u)]))
        while todo:
            a, b, inside = todo.pop()
            where = _cut(a, b, inside, most, share)
            if where is None:
                finished.append((a, b))
                continue
            j, cut = where
            middle_b, middle_a = b.copy(), a.copy()
            middle_b[j] = middle_a[j] = cut
            sides = [(u, u[:, j] < cut) for u in inside]
            # Of many sets few are in a box: empty ones aren't carried along.
            todo.append((a, middle_b, [u[left] for u, left in sides if left.any()]))
            todo.append((middle_a, b, [u[~left] for u, left in sides if not left.all()]))
        return torch.from_numpy(np.stack([a for a, _ in finished])), torch.from_numpy(np.stack([b for _, b in finished]))


def contrast(draws: Sequence[Float[Tensor, "n d"]]) -> Float[Tensor, "d d"]:
    """A basis, its vectors in columns, in which the bulks of all the sets (one or two) have diagonal covariances.

    Where correlations are weak it's the coordinates' own, so that kinks along their planes, as products have, stay along them.
    """
    covariances = [_bulk(one) for one in draws]
    deviations = [covariance.diagonal().sqrt() for covariance in covariances]
    strengths = [(c / d / d[:, None]).fill_diagonal_(0).abs().max() for c, d in zip(covariances, deviations, strict=True)]
    # Weak correlations cost a few boxes; a rotated chart would cost many where the density has kinks along the coordinate planes.
    if max(map(float, strengths)) < 0.3:
        return torch.stack(deviations).mean(0).diag()
    first, last = (torch.linalg.cholesky(covariances[k]) for k in (0, -1))
    vectors: Tensor = torch.linalg.svd(torch.linalg.solve_triangular(first, last, upper=False)).U
    basis: Tensor = first @ vectors
    return basis


def _bulk(draws: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Covariance of the bulk: by medians and quartiles, clipped at four deviations."""
    quartiles = draws.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=draws.dtype, device="cpu"), 0)
    scale = (quartiles[2] - quartiles[0]) / 1.349
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Heavy tails would make the covariance that of a few far draws.
    core = ((draws - quartiles[1]) / scale).clamp(-4, 4)
    covariance = core.T @ core / len(core)
    covariance = covariance + 1e-9 * covariance.diagonal().mean() * torch.eye(draws.shape[1], dtype=draws.dtype, device="cpu")
    return scale[:, None] * covariance * scale


def _quantile(ordered: np.ndarray, share: float) -> Any:
    """The quantile of sorted rows, by linear interpolation."""
    at = share * (len(ordered) - 1)
    i = min(int(at), len(ordered) - 2) if len(ordered) > 1 else 0
    return ordered[i] + (ordered[min(i + 1, len(ordered) - 1)] - ordered[i]) * (at - i)


def _cut(a: np.ndarray, b: np.ndarray, inside: Sequence[np.ndarray], most: int, share: float) -> tuple[int, float] | None:
    """Where to cut a box that holds these draws: the axis and the place, or None."""
    for u in inside:
        if len(u) < 32:
            continue
        ordered = np.sort(u, 0)
        low, high = _quantile(ordered, 0.1), _quantile(ordered, 0.9)
        bulk = high - low
        for j in np.flatnonzero((bulk > MIN_WIDTH) & (bulk < (b - a) / 12)).tolist():
            near = (1.6 + share) * float(bulk[j])
            before, after = float(low[j] - a[j]), float(b[j] - high[j])
            if max(before, after) > near + float(bulk[j]):  # graded: far from the bulk first, then ever nearer
                reach = near * 6.0 ** max(0, math.floor(math.log(max(before, after) / near / 1.5) / math.log(6)))
                return j, float(low[j]) - reach if before > after else float(high[j]) + reach
    crowd = max(inside, key=len, default=None)
    if crowd is None or len(crowd) <= most:
        return None
    j = int((crowd.max(0) - crowd.min(0)).argmax())
    cut = float(_quantile(np.sort(crowd[:, j]), share))
    return (j, cut) if float(a[j]) < cut < float(b[j]) and float(b[j] - a[j]) > MIN_WIDTH else None


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
