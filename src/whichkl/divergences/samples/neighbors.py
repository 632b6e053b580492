"""Neighbours: distances to the k-th nearest row and counts within a radius, exact, by a tree or by blocks of all distances."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int

Rows = Float[np.ndarray, "n d"]

_MAX_TREE_DIMENSIONS = 15
"""Beyond, a tree visits nearly every leaf, and a matrix product is several times faster."""
_MIN_DIMENSIONS_OF_LARGE_LEAVES = 6
"""From this dimension, queries scan many leaves: larger ones, laid one after another in memory, save a fifth of the time."""
_NUMBERS_PER_BLOCK = 1 << 24


class Neighbors:
    """The rows among which neighbours are searched.

    A tree up to 15 columns, all cores; above, distances in blocks of 128 MB, the k-th recomputed from its two rows.

    Args:
        rows: (n, d), float64.
    """

    def __init__(self, rows: Rows) -> None:
        """Build the tree, up to 15 columns."""
        self.rows, self.tree, self._placed = rows, None, np.arange(len(rows))
        if rows.shape[1] > _MAX_TREE_DIMENSIONS:
            return
        busy = rows.shape[1] >= _MIN_DIMENSIONS_OF_LARGE_LEAVES
        self.tree = scipy.spatial.cKDTree(rows, leafsize=64 if busy else 32)
        self._leaves = self.tree.indices
        if busy:
            self._placed = self._leaves
            self.tree = scipy.spatial.cKDTree(rows[self._placed], leafsize=64)
            self._leaves = self._placed[self.tree.indices]

    @property
    def order(self) -> Int[np.ndarray, " n"]:
        """The order in which to query the rows themselves: that of the tree's leaves halves the misses of the cache.

        Every core gets a contiguous part of the queries: the leaves are dealt out among the parts, which makes them alike.
        """
        if self.tree is None:
            return np.arange(len(self.rows))
        cores = os.cpu_count() or 1
        return np.concatenate([self._leaves[core::cores] for core in range(cores)])

    def distance(self, x: Rows, k: int) -> Float[np.ndarray, " m"]:
        """Distance from each row of x to its k-th nearest of these (a row of these is its own first)."""
        if len(x) == 0:
            return np.zeros(0)
        if self.tree is not None:
            found: Float[np.ndarray, " m"] = self.tree.query(x, [k], workers=_workers(x))[0][:, 0]
            return found
        mine, parts = torch.from_numpy(self.rows), []
        for block, squares in self._blocks(x):
            nearest = squares.topk(k, dim=1, largest=False).indices
            exact = (block[:, None] - mine[nearest]).norm(dim=2)  # all k: rounding may have exchanged two of them
            parts.append(exact.amax(1))
        return torch.cat(parts).numpy()

    def nearest(self, x: Rows, k: int) -> Int[np.ndarray, "m k"]:
        """Numbers of the k nearest of these to each row of x, in no order (a row of these is among its own)."""
        if self.tree is not None:
            found: Int[np.ndarray, "m k"] = self._placed[self.tree.query(x, k, workers=_workers(x))[1]].reshape(len(x), k)
            return found
        return torch.cat([squares.topk(k, dim=1, largest=False).indices for _, squares in self._blocks(x)]).numpy()

    def count(self, x: Rows, radius: Float[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """How many of these lie within its radius of each row of x, the boundary included."""
        if len(x) == 0:
            return np.zeros(0, dtype=np.int64)
        if self.tree is not None:
            inside: Int[np.ndarray, " m"] = self.tree.query_ball_point(x, radius, return_length=True, workers=_workers(x))
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
        norms, step = mine.square().sum(1), max(1, _NUMBERS_PER_BLOCK // len(mine))
        for block in wanted.split(step):
            yield block, torch.addmm(norms.expand(len(block), -1), block, mine.T, alpha=-2)


def _workers(x: Rows) -> int:
    return -1 if len(x) > 3000 else 1
