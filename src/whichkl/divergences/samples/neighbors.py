"""Neighbours: exact distances to the k-th nearest row and counts within a radius, and what each row contributes to a KL."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int

from whichkl.process.threads import threads_for

Rows = Float[np.ndarray, "n d"]
Radii = Float[np.ndarray, " n"]
Variant = Literal["bias_reduced", "plain"]

MAX_ROWS_OF_FULL_CORRECTION = 20_000
"""Rows from which the bias reduction is measured on a random part of them: it counts once per row, which costs most."""

_MAX_TREE_DIMENSIONS = 15
"""Beyond, a tree visits nearly every leaf, and a matrix product is several times faster."""
_MIN_DIMENSIONS_OF_LARGE_LEAVES = 6
"""From this dimension, queries scan many leaves: larger ones, laid one after another in memory, save a fifth of the time."""
_NUMBERS_PER_BLOCK, _MIN_ROWS_PER_BLOCK = 1 << 20, 256
"""Distances that are computed at once, which the processor's cache holds, and rows that a product needs to be fast."""
_COLUMNS_OF_GROUP = 8
"""Distances of which the least is taken before the least of all are sought: half of the time."""
_NUMBERS_OF_SELECTION = 4
"""Numbers of another operation that take as long as one among which the least are sought."""
_MAX_ROWS_WITHOUT_TREE = 1_000
"""Among so few, all distances take little longer than a tree, whose module takes a tenth of a second to load in a first fit."""


class Neighbors:
    """The rows among which neighbours are searched.

    A tree up to 15 columns, all cores; above, distances in blocks, the k-th recomputed from its two rows.

    Args:
        rows: (n, d), float64.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @cached_property
    def _forest(self) -> tuple[Any, Int[np.ndarray, " n"], Int[np.ndarray, " n"]] | None:
        """The tree, the row at each place of it, and the rows leaf by leaf; None above 15 columns."""
        if self.rows.shape[1] > _MAX_TREE_DIMENSIONS:
            return None
        if self.rows.shape[1] < _MIN_DIMENSIONS_OF_LARGE_LEAVES:
            tree = scipy.spatial.cKDTree(self.rows, leafsize=32)
            return tree, np.arange(len(self.rows)), tree.indices
        placed = scipy.spatial.cKDTree(self.rows, leafsize=64).indices
        tree = scipy.spatial.cKDTree(self.rows[placed], leafsize=64)
        return tree, placed, placed[tree.indices]

    @property
    def order(self) -> Int[np.ndarray, " n"]:
        """The order in which to query the rows themselves: that of the tree's leaves halves the misses of the cache.

        Every core gets a contiguous part of the queries: the leaves are dealt out among the parts, which makes them alike.
        """
        if self._forest is None:
            return np.arange(len(self.rows))
        cores, leaves = os.cpu_count() or 1, self._forest[2]
        return np.concatenate([leaves[core::cores] for core in range(cores)])

    def distance(self, x: Rows, k: int) -> Float[np.ndarray, " m"]:
        """Distance from each row of x to its k-th nearest of these (a row of these is its own first)."""
        if len(x) == 0:
            return np.zeros(0)
        if self._forest is not None:
            found: Float[np.ndarray, " m"] = self._forest[0].query(x, [k], workers=_workers(x))[0][:, 0]
            return found
        mine, parts = torch.from_numpy(self.rows), []
        for block, squares in self._blocks(x):
            nearest = _columns_of_least(squares, k)
            exact = (block[:, None] - mine[nearest]).norm(dim=2)  # all k: rounding may have exchanged two of them
            parts.append(exact.amax(1))
        return torch.cat(parts).numpy()

    def nearest(self, x: Rows, k: int) -> Int[np.ndarray, "m k"]:
        """Numbers of the k nearest of these to each row of x, in no order (a row of these is among its own)."""
        if len(self.rows) <= _MAX_ROWS_WITHOUT_TREE:
            return np.concatenate([np.argpartition(squares.numpy(), k - 1, 1)[:, :k] for _, squares in self._blocks(x)])
        if self._forest is not None:
            tree, placed, _ = self._forest
            found: Int[np.ndarray, "m k"] = placed[tree.query(x, k, workers=_workers(x))[1]].reshape(len(x), k)
            return found
        return torch.cat([_columns_of_least(squares, k) for _, squares in self._blocks(x)]).numpy()

    def count(self, x: Rows, radius: Float[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """How many of these lie within its radius of each row of x, the boundary included."""
        if len(x) == 0:
            return np.zeros(0, dtype=np.int64)
        if self._forest is not None:
            inside: Int[np.ndarray, " m"] = self._forest[0].query_ball_point(x, radius, return_length=True, workers=_workers(x))
            return inside
        parts, start = [], 0
        for block, squares in self._blocks(x):
            reach = torch.from_numpy(radius[start : start + len(block)])
            limit = reach.square() * (1 + 1e-12) - block.square().sum(1)
            parts.append((squares <= limit[:, None]).sum(1))
            start += len(block)
        return torch.cat(parts).numpy()

    def _blocks(self, x: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Blocks of x with their squared distances to all rows, less their own squared norms."""
        mine, wanted = torch.from_numpy(self.rows), torch.from_numpy(np.ascontiguousarray(x))
        norms, step = mine.square().sum(1), max(_MIN_ROWS_PER_BLOCK, _NUMBERS_PER_BLOCK // len(mine))
        for block in wanted.split(step):
            yield block, torch.addmm(norms.expand(len(block), -1), block, mine.T, alpha=-2)


def _columns_of_least(squares: Float[torch.Tensor, "m n"], k: int) -> Int[torch.Tensor, "m k"]:
    """Numbers of the k least of each row, in no order: they lie in the k groups of columns whose least ones are least."""
    groups = squares.shape[1] // _COLUMNS_OF_GROUP
    with threads_for(_NUMBERS_OF_SELECTION * squares.numel()):
        if groups < 2 * k:
            return squares.topk(k, 1, largest=False, sorted=False).indices
        grouped = squares[:, : groups * _COLUMNS_OF_GROUP].unflatten(1, (_COLUMNS_OF_GROUP, groups))
        first = grouped.amin(1).topk(k, 1, largest=False, sorted=False).indices
        further = groups * torch.arange(_COLUMNS_OF_GROUP, device="cpu")[:, None]
        rest = torch.arange(groups * _COLUMNS_OF_GROUP, squares.shape[1], device="cpu").expand(len(squares), -1)
        among = torch.cat([(first[:, None] + further).flatten(1), rest], 1)
        return among.gather(1, squares.gather(1, among).topk(k, 1, largest=False, sorted=False).indices)


def _workers(x: Rows) -> int:
    return -1 if len(x) > 3000 else 1


def point_estimate(x: Rows, y: Rows, k: int = 5, variant: Variant = "bias_reduced") -> float:
    """The value of `two_sample_kl` alone: no checks, no spreading, no error.

    ``"plain"``: mean d log(ν_k/ρ_k) + ψ(m + 1) − ψ(n), with ρ_k, ν_k the distances to the k-th other x and the k-th y.
    ``"bias_reduced"``: both counts in the ball of radius max(ρ_k, ν_k), mean ψ(l + 1) − ψ(k) + ψ(m + 1) − ψ(n), l the rows
    of x inside where ν_k is the larger, and ψ(k) − ψ(l + 1), l those of y, where ρ_k is. That's eq. 29 of the paper with
    its last distances averaged out, E[d log(ε/ρ_l)] = 1/l: the row on the boundary counts in its own sample only. It's
    unbiased where both densities are constant in the ball (ψ(l) − ψ(k), both boundaries counted, is off by up to 0.07),
    and had the smaller bias in 29 of 46 Gaussian cells of 1–10 dimensions (at k = 5), by no more than noise in some of them.

    Source: Wang, Kulkarni & Verdú (2009), eq. 5 and 29.

    >>> z = np.random.default_rng(0).normal(size=(2000, 1))
    >>> round(point_estimate(z[:1000] + 1, z[1000:]), 1)  # the truth is 0.5
    0.5
    """
    white = whiten(x, y)
    return compare(white[0], white[1], k, variant)


def compare(x: Rows, y: Rows, k: int, variant: Variant) -> float:
    """The KL that the terms average to."""
    return float(terms_of(x, y, k, variant).mean()) + finite(x, y)


def finite(x: Rows, y: Rows) -> float:
    """Return what the sizes of the samples add to the mean of the terms."""
    return float(scipy.special.digamma(len(y) + 1) - scipy.special.digamma(len(x)))


def terms_of(x: Rows, y: Rows, k: int, variant: Variant) -> Radii:
    """Return about log(l/k) per row, l the rows of x in the ball that holds k rows of y."""
    of_x, of_y = Neighbors(x), Neighbors(y)
    x = x[of_x.order]
    if variant == "plain":
        return _plain(of_x.distance(x, k + 1), of_y.distance(x, k), x.shape[1])
    return _bias_reduced(x, of_y.distance(x, k), of_x, of_y, k)


def many_terms(x: Rows, y: Rows, k: int, generator: np.random.Generator) -> tuple[Radii, Radii, float]:
    """For many rows: return plain terms of all, bias-reduced minus plain ones of some, and the error that this adds.

    That saves most of the counts, which cost more than both distances.
    """
    of_x, of_y = Neighbors(x), Neighbors(y)
    x = x[of_x.order]
    nu, rho = of_y.distance(x, k), of_x.distance(x, k + 1)
    plain = _plain(rho, nu, x.shape[1])
    some = np.sort(generator.choice(len(x), max(MAX_ROWS_OF_FULL_CORRECTION // 2, len(x) // 10), False))
    gap = _bias_reduced(x[some], nu[some], of_x, of_y, k, rho[some]) - plain[some]
    return plain, gap, float(gap.std(ddof=1)) * math.sqrt(1 / len(some) - 1 / len(x))


def _plain(rho: Radii, nu: Radii, dim: int) -> Radii:
    least = _least(np.concatenate([rho, nu]))
    terms: Radii = dim * np.log(np.maximum(nu, least) / np.maximum(rho, least))
    return terms


def _bias_reduced(x: Rows, nu: Radii, of_x: Neighbors, of_y: Neighbors, k: int, rho: Radii | None = None) -> Radii:
    """The bias-reduced terms, from the distances to the k-th row of y and, where they are known, to the k-th other row of x."""
    if rho is None:
        in_x = of_x.count(x, nu) - 1
        near = in_x < k  # here the k-th row of x lies beyond that of y; elsewhere its distance isn't needed
        reach = of_x.distance(x[near], k + 1)
    else:
        near = rho > nu
        in_x = np.zeros(len(x), dtype=np.int64)
        in_x[~near] = of_x.count(x[~near], nu[~near]) - 1
        reach = rho[near]
    terms: Radii = scipy.special.digamma(np.maximum(in_x, 0) + 1.0) - scipy.special.digamma(k)
    terms[near] = scipy.special.digamma(k) - scipy.special.digamma(of_y.count(x[near], reach) + 1.0)
    return terms


def entropy_term(x: Rows, k: int) -> float:
    """E_p[log p] by neighbours. Source: Kozachenko & Leonenko (1987)."""
    n, dim = x.shape
    all_x = Neighbors(x)
    rho = all_x.distance(x[all_x.order], k + 1) if dim > 1 else _radii_on_a_line(x[:, 0], k)
    ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    return float(scipy.special.digamma(k) - scipy.special.digamma(n) - ball - dim * np.log(np.maximum(rho, _least(rho))).mean())


def _radii_on_a_line(x: Float[np.ndarray, " n"], k: int) -> Radii:
    """Distance from each value to the k-th nearest other one, sorted by value; bisection takes log k steps, a tree k."""
    x, n = np.sort(x), len(x)
    here = np.arange(n)
    # The k nearest and the value itself are neighbours in the order, from `first` on: as this moves up, they reach less far down
    # and further up.
    lowest = np.maximum(here - k, 0)
    first, last = lowest, np.minimum(here, n - 1 - k)
    while (first < last).any():
        middle = (first + last) // 2
        up = (x - x[middle] > x[middle + k] - x) & (first < last)
        first, last = np.where(up, middle + 1, first), np.where(up, last, middle)
    below = np.maximum(first - 1, lowest)
    radii: Radii = np.minimum(*(np.maximum(x - x[at], x[at + k] - x) for at in (first, below)))
    return radii


def _least(radii: Radii) -> float:
    """The smallest positive radius, which replaces the 0 of a row with k equal rows."""
    return float(radii[radii > 0].min(initial=1.0))


def whiten(*parts: Rows) -> list[Rows]:
    """One affine map for all, which makes their mean covariance the identity; KL doesn't change."""
    covariance = sum(np.atleast_2d(np.cov(part.T)) for part in parts) / len(parts)
    scale = np.sqrt(np.diag(covariance))
    root = np.linalg.cholesky(covariance / np.outer(scale, scale))
    return [np.linalg.solve(root, ((part - parts[0].mean(0)) / scale).T).T.copy() for part in parts]
