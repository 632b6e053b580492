"""Neighbours by tree and by blocks are the same, and the bias reduction of a part stands for that of all."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from whichkl.divergences.samples import nearest_neighbors, neighbors
from whichkl.divergences.samples.neighbors import Neighbors


@pytest.mark.parametrize("dim", [2, 15, 16, 40])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_distances_and_counts_are_those_of_a_plain_tree(dim, shift):
    generator = np.random.default_rng(dim)
    rows, x = generator.normal(size=(700, dim)) + shift, generator.normal(size=(3500, dim)) + shift
    found, tree = Neighbors(rows), cKDTree(rows)
    truth = tree.query(x, [5])[0][:, 0]
    np.testing.assert_allclose(found.distance(x, 5), truth, rtol=1e-9)
    radius = np.quantile(truth, generator.uniform(size=len(x)))
    counts, exact = found.count(x, radius), tree.query_ball_point(x, radius, return_length=True)
    assert np.mean(counts != exact) < 1e-3  # a row on the rim may fall on either side of rounding
    assert sorted(found.order) == list(range(700))
    assert len(found.distance(x[:0], 1)) == len(found.count(x[:0], radius[:0])) == 0


def test_blocks_are_small(monkeypatch):
    monkeypatch.setattr(neighbors, "_NUMBERS_PER_BLOCK", 5000)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(300, 20))
    truth = cKDTree(rows).query(rows, [4])[0][:, 0]
    np.testing.assert_allclose(Neighbors(rows).distance(rows, 4), truth, rtol=1e-9)


def test_the_bias_reduction_of_a_part_stands_for_that_of_all():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(30_000, 3)) + 0.5, generator.normal(size=(25_000, 3))
    terms, gap, error = neighbors.many_terms(x, y, 5, generator)
    value = terms.mean() + gap.mean() + neighbors.finite(x, y)
    assert 0 < error < 0.01
    assert abs(value - neighbors.compare(x, y, 5, "bias_reduced")) < 4 * error
    whole = nearest_neighbors.two_sample_kl(x, y)
    assert whole.stderr > error
    assert abs(whole.value - 0.375) < 4 * whole.stderr
