"""Intervals from samples alone cover the truth in 90 to 99 of 100 repeats, wherever the answers call themselves reliable."""

import math

import numpy as np
import pytest

import whichkl as wk

pytestmark = pytest.mark.slow
CELLS = [("knn", 1_000, 1), ("knn", 1_000, 5), ("knn", 1_000, 10), ("classifier", 1_000, 1), ("classifier", 1_000, 5)]
CELLS += [("knn", 10_000, 1), ("classifier", 10_000, 1), (None, 1_000, 5), (None, 1_000, 20)]


@pytest.mark.parametrize(("method", "rows", "dim"), CELLS)
def test_intervals_cover_where_they_are_called_reliable(method, rows, dim):
    truth = 0.5 + dim * (0.81 / 2 - 0.5 - math.log(0.9))
    reliable = inside = 0
    for seed in range(200):
        rng = np.random.default_rng([dim, rows, seed])
        x, y = 0.9 * rng.normal(size=(rows, dim)) + 1 / math.sqrt(dim), rng.normal(size=(rows, dim))
        found = wk.estimate(p=x, q=y, method=method, seed=seed)
        low, high = found.interval
        reliable += found.reliable
        inside += found.reliable and low <= truth <= high
    if reliable < 100:  # the cell isn't called reliable
        assert dim >= 20
        return
    assert 0.9 <= inside / reliable <= 0.99
