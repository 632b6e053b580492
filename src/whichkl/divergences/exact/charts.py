"""Charts: the map that lays the unit cube over a domain of one to three variables, and the first boxes, which follow draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MIN_WIDTH = 2.0**-46
"""Boxes narrower than this, in the unit cube, aren't cut."""


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
        sets = [np.sort(u, 0) for u in sets] if dim == 1 else sets
        most = max(1, len(draws[0]) // (10 if dim == 3 else 24))
        finished: list[tuple[list[float], list[float]]] = []
        todo = []
        for a, b in zip(low.tolist(), high.tolist(), strict=True):
            held = sets
            for j in range(dim):
                held = [_halves(_halves(u, j, b[j])[0], j, a[j])[1] for u in held]
            todo.append((a, b, [u for u in held if len(u)]))
        while todo:
            a, b, inside = todo.pop()
            where = _cut(a, b, inside, most, share)
            if where is None:
                finished.append((a, b))
                continue
            j, cut = where
            sides = [_halves(u, j, cut) for u in inside]
            # Of many sets few are in a box: empty ones aren't carried along.
            todo.append((a, [*b[:j], cut, *b[j + 1 :]], [left for left, _ in sides if len(left)]))
            todo.append(([*a[:j], cut, *a[j + 1 :]], b, [right for _, right in sides if len(right)]))
        low, high = (torch.tensor(column, dtype=torch.float64, device="cpu") for column in zip(*finished, strict=True))
        return low, high


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


def _halves(u: np.ndarray, j: int, cut: float) -> tuple[np.ndarray, np.ndarray]:
    """The draws below the cut across axis j, and the others. Draws on a line are sorted, so that both are slices."""
    if u.shape[1] == 1:
        i = int(u[:, 0].searchsorted(cut))
        return u[:i], u[i:]
    below = u[:, j] < cut
    return u[below], u[~below]


def _quantile(ordered: np.ndarray, share: float) -> float:
    """The quantile of sorted numbers, by linear interpolation."""
    at = share * (len(ordered) - 1)
    i = max(0, min(int(at), len(ordered) - 2))
    low, high = float(ordered[i]), float(ordered[min(i + 1, len(ordered) - 1)])
    return low + (high - low) * (at - i)


def _cut(
    a: Sequence[float], b: Sequence[float], inside: Sequence[np.ndarray], most: int, share: float
) -> tuple[int, float] | None:
    """Where to cut a box that holds these draws: the axis and the place, or None."""
    for u in inside:
        if len(u) < 32:
            continue
        ordered = u if len(a) == 1 else np.sort(u, 0)
        for j in range(len(a)):
            low, high = _quantile(ordered[:, j], 0.1), _quantile(ordered[:, j], 0.9)
            bulk = high - low
            if not MIN_WIDTH < bulk < (b[j] - a[j]) / 12:
                continue
            near = (1.6 + share) * bulk
            before, after = low - a[j], b[j] - high
            if max(before, after) > near + bulk:  # graded: far from the bulk first, then ever nearer
                reach = near * 6.0 ** max(0, math.floor(math.log(max(before, after) / near / 1.5) / math.log(6)))
                return j, low - reach if before > after else high + reach
    crowd = max(inside, key=len, default=None)
    if crowd is None or len(crowd) <= most:
        return None
    j = 0 if len(a) == 1 else int((crowd.max(0) - crowd.min(0)).argmax())
    cut = _quantile(crowd[:, j] if len(a) == 1 else np.sort(crowd[:, j]), share)
    return (j, cut) if a[j] < cut < b[j] and b[j] - a[j] > MIN_WIDTH else None
