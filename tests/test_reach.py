"""What of a KL lies beyond the rows of q: it follows the bias of the estimate, and is little where the tails are alike."""

import math

import numpy as np
import pytest
from scipy import stats

import whichkl as wk
from whichkl.divergences.samples.entangled import total_correlation
from whichkl.divergences.samples.neighbors import point_estimate
from whichkl.divergences.samples.reach import beyond_reach, doubt_of_ends

ROWS, SEEDS = 500, 12
ALIKE = {
    "normal | normal": (stats.norm(0.3), stats.norm()),
    "normal | N(0, 2)": (stats.norm(), stats.norm(0, 2)),
    "laplace | laplace": (stats.laplace(0.5), stats.laplace()),
    "N(0, 1.5) | laplace": (stats.norm(0, 1.5), stats.laplace()),
    "gamma(3) | gamma(3)": (stats.gamma(3), stats.gamma(3, 0, 1.2)),
    "beta(2, 2) | uniform": (stats.beta(2, 2), stats.uniform()),
    "logistic | t6": (stats.logistic(), stats.t(6, 0, 1.5)),
}
BEYOND = {  # with the truth
    "t3 | N(0, 2)": (stats.t(3), stats.norm(0, 2), 0.2136),
    "t4 | N(0, 1.4)": (stats.t(4), stats.norm(0, 1.4), 0.0838),
    "laplace | normal": (stats.laplace(), stats.norm(), 0.2258),
    "exponential | gamma(2)": (stats.expon(), stats.gamma(2), 0.5772),
    "uniform | triangle": (stats.uniform(0, 2), stats.triang(0.3, 0, 2), 0.3069),
    "skew normal, turned": (stats.norm(0.7, 0.8), stats.skewnorm(4), 0.4470),
    "N(0, 2) | normal": (stats.norm(0, 2), stats.norm(), 0.8069),
}
ENDING = {  # the density of the second ends where rows of the first go on: the divergence is infinite
    "normal | gamma(4)": (stats.norm(4, 2), stats.gamma(4)),
    "normal | lognormal": (stats.norm(1.13, 0.6), stats.lognorm(0.5)),
    "logistic | Weibull(2)": (stats.logistic(0.886, 0.255), stats.weibull_min(2)),
    "t5 | uniform": (stats.t(5), stats.uniform(-2.5, 5)),
    "normal | exponential": (stats.norm(1), stats.expon()),
}
NOT_ENDING = ALIKE | {"N(0, 2) | normal": (stats.norm(0, 2), stats.norm()), "t5 | laplace": (stats.t(5), stats.laplace())}


def samples(p, q, seed, rows=ROWS):
    rng = np.random.default_rng(seed)
    return p.rvs((rows, 1), random_state=rng), q.rvs((rows, 1), random_state=rng)


@pytest.mark.parametrize("name", ALIKE)
def test_little_lies_beyond_rows_of_like_tails(name):
    found = [beyond_reach(*samples(*ALIKE[name], seed)) for seed in range(SEEDS)]
    assert np.median(found) < 0.02
    assert np.quantile(found, 0.8) < 0.05


@pytest.mark.parametrize("name", BEYOND)
def test_what_lies_beyond_follows_the_bias(name):
    p, q, truth = BEYOND[name]
    pairs = [samples(p, q, seed) for seed in range(SEEDS)]
    bias = truth - np.mean([point_estimate(*pair) for pair in pairs])
    assert bias > 0.03
    assert bias / 3 < np.median([beyond_reach(*pair) for pair in pairs]) < 3 * bias


@pytest.mark.parametrize("power", [1.5, 2, 4])
def test_what_lies_beyond_an_end_of_a_support_is_covered_or_unreliable(power):
    truth = power - 1 - math.log(power)
    for seed in range(4):
        found = wk.estimate(p=samples(stats.uniform(), stats.uniform(), seed)[0], q=stats.beta(power, 1).rvs((ROWS, 1), seed))
        assert not found.reliable or found.interval[0] <= truth <= found.interval[1]


@pytest.mark.parametrize("name", ENDING)
def test_rows_beyond_an_end_of_the_other_sample_make_an_answer_doubtful(name):
    found = [bool(doubt_of_ends(*samples(*ENDING[name], seed))) for seed in range(40)]
    assert np.mean(found) >= 0.7


@pytest.mark.parametrize("name", NOT_ENDING)
def test_tails_without_an_end_are_seldom_doubtful(name):
    found = [bool(doubt_of_ends(*samples(*NOT_ENDING[name], seed))) for seed in range(40)]
    assert np.mean(found) <= 0.15


@pytest.mark.parametrize(
    "kind, way", [("forward_kl", "knn"), ("jeffreys", "knn"), ("forward_kl", "classifier"), ("chi_squared", None)]
)
def test_an_infinite_divergence_is_not_answered_with_confidence(kind, way):
    x, y = samples(*ENDING["t5 | uniform"], 1)
    found = wk.estimate(p=x, q=y, divergence=kind, method=way)
    assert not found.reliable and any("support seems to end" in note for note in found.notes)
    bounded = wk.estimate(p=x, q=y, divergence="jensen_shannon", method="classifier")
    assert not any("support seems to end" in note for note in bounded.notes)


@pytest.mark.slow
def test_reliable_answers_hold_the_truth():
    found = []
    for p, q, truth in BEYOND.values():
        estimates = [wk.estimate(p=x, q=y, method="knn") for x, y in (samples(p, q, 100 + seed) for seed in range(SEEDS))]
        found += [one.interval[0] <= truth <= one.interval[1] for one in estimates if one.reliable]
    assert len(found) >= SEEDS
    assert sum(found) >= 0.85 * len(found)


@pytest.mark.parametrize("rows", [40, 60, 100, 3000])
def test_any_number_of_rows_gives_a_number(rows):
    for x, y in (samples(stats.t(2), stats.norm(), 0, rows), samples(stats.norm(), stats.norm(5, 0.1), 0, rows)):
        for a in (x, np.column_stack([x, y]), 1e6 * x, x.round(1)):
            assert np.isfinite(beyond_reach(a, np.column_stack([y] * a.shape[1]) + np.random.default_rng(1).normal(size=a.shape)))


@pytest.mark.parametrize("rows", [500, 2_000])
def test_rows_near_a_curve_are_not_answered_with_confidence(rows):
    """KL is 0.667 nats by quadrature; the features of a classifier see 0.1 to 0.2 of it in 500 rows."""
    for seed in range(4):
        z = np.random.default_rng(seed).normal(size=(2, rows, 2))
        x, y = (np.column_stack([a[:, 0], 0.3 * a[:, 1] + b * a[:, 0] ** 2]) for a, b in zip(z, (1.0, 1.2), strict=True))
        found = wk.estimate(p=x, q=y, method="classifier", seed=seed)
        assert not found.reliable and any("near a curve" in note for note in found.notes)


def test_columns_that_a_gaussian_or_their_margins_explain_are_not_entangled():
    rng = np.random.default_rng(0)
    tied = rng.normal(size=(500, 3)) @ np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 4.0], [0.0, 0.0, 0.1]])
    for x in (tied, rng.exponential(size=(500, 2)), rng.standard_t(3, size=(500, 5)), rng.uniform(size=(3_000, 2))):
        assert total_correlation(x) < 0.25
    angle = rng.uniform(0, 2 * math.pi, 500)
    ring = np.column_stack([np.cos(angle), np.sin(angle)]) + 0.05 * rng.normal(size=(500, 2))
    assert total_correlation(ring) > 1


@pytest.mark.parametrize(("columns", "step"), [(2, 0.1), (2, 0.5), (4, 0.1)])
def test_rounded_columns_are_not_entangled(columns, step):
    x = np.random.default_rng(0).normal(size=(1_000, columns))
    assert total_correlation(np.round(x / step) * step) < 0.25
