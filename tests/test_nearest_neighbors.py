"""Neighbours: right on average, honest about error and bias, and no number from bad input."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import digamma, gammaln
from torch.distributions import Exponential, Laplace, Normal

import whichkl as wk
from whichkl import Target
from whichkl._checks import InputError, TargetError
from whichkl.divergences.samples.entropy import mean_log_density
from whichkl.divergences.samples.nearest_neighbors import one_sample_kl, two_sample_kl
from whichkl.divergences.samples.neighbors import Neighbors, entropy_term, point_estimate

GRAMMAR = re.compile(r"^Cannot [^:]+: .+\. [A-Z].+\.$", re.DOTALL)


def pair(n, dim, seed, shift=0.7, scale=0.8, m=None):
    """Samples of N(shift e₁, scale² I) and N(0, I)."""
    rng = np.random.default_rng(seed)
    x, y = scale * rng.normal(size=(n, dim)), rng.normal(size=(m or n, dim))
    x[:, 0] += shift
    return x, y


def truth(dim, shift=0.7, scale=0.8):
    return dim * (-math.log(scale) + scale**2 / 2 - 0.5) + shift**2 / 2


def log_normal(x):
    return -0.5 * (x**2).sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)


# ---- right


def test_counts_are_unbiased_where_both_densities_are_constant():
    """Two Poisson processes of rates r and 1: E[ψ(l + 1) − ψ(k)] over the exact law of the counts is log r."""
    k, rest = 5, np.arange(5, 100_000)
    for ratio in (1, 1.5, 5, 50):
        share = ratio / (1 + ratio)
        paths = gammaln(rest + k) - gammaln(k) - gammaln(rest + 1)
        ends_in_y = np.exp(paths + rest * math.log(share) + k * math.log1p(-share))
        ends_in_x = np.exp(paths + k * math.log(share) + rest * math.log1p(-share))
        mean = (ends_in_y - ends_in_x) @ (digamma(rest + 1) - digamma(k))
        assert mean == pytest.approx(math.log(ratio), abs=1e-9)


@pytest.mark.parametrize("variant", ["plain", "bias_reduced"])
def test_point_estimate_is_the_formula(variant):
    x, y = pair(40, 1, 0, m=60)
    k, terms = 3, []
    for i, at in enumerate(x):
        to_x, to_y = np.sort(np.abs(np.delete(x, i) - at)), np.sort(np.abs(y[:, 0] - at))
        rho, nu = to_x[k - 1], to_y[k - 1]
        if variant == "plain":
            terms.append(math.log(nu / rho))
        elif nu > rho:
            terms.append(digamma((to_x < nu).sum() + 1) - digamma(k))
        else:
            terms.append(digamma(k) - digamma((to_y < rho).sum() + 1))
    assert point_estimate(x, y, k, variant) == pytest.approx(np.mean(terms) + digamma(61) - digamma(40), abs=1e-12)


@pytest.mark.parametrize("variant", ["plain", "bias_reduced"])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("sizes", [(1000, 1000), (500, 2000)])
def test_point_estimate_is_right_on_average_in_few_dimensions(dim, variant, sizes):
    values = [point_estimate(*pair(sizes[0], dim, seed, m=sizes[1]), 5, variant) for seed in range(30)]
    slack = 0.015 * truth(dim) + 0.005 * dim
    assert abs(np.mean(values) - truth(dim)) < 3 * np.std(values) / math.sqrt(30) + slack


@pytest.mark.parametrize("dim", [1, 3])
def test_error_falls_with_the_rows(dim):
    def rms(n):
        return math.sqrt(np.mean([(point_estimate(*pair(n, dim, seed)) - truth(dim)) ** 2 for seed in range(12)]))

    assert rms(4000) < 0.6 * rms(250)


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_same_law_gives_zero(dim):
    estimate = two_sample_kl(*pair(1000, dim, 3, shift=0.0, scale=1.0))
    assert estimate.reliable
    assert abs(estimate.value) < 3 * estimate.stderr


@pytest.mark.parametrize("dim", [1, 2])
def test_one_sample_is_right_on_average(dim):
    estimates = [one_sample_kl(pair(500, dim, seed)[0], log_normal, seed=seed) for seed in range(12)]
    values = np.array([one.value for one in estimates])
    assert abs(values.mean() - truth(dim)) < 4 * values.std() / math.sqrt(12) + 0.01
    assert sum(one.interval[0] <= truth(dim) <= one.interval[1] for one in estimates) >= 10


def test_affine_maps_change_nothing():
    x, y = pair(400, 3, 1)
    root = np.array([[1e3, 0, 0], [5.0, 1e-4, 0], [1.0, 2.0, 7.0]])
    moved = [one @ root.T + [1e4, -3, 0] for one in (x, y)]
    for variant in ("plain", "bias_reduced"):
        assert point_estimate(*moved, 5, variant) == pytest.approx(point_estimate(x, y, 5, variant), abs=1e-5)


@pytest.mark.parametrize(("rows", "k"), [(7, 6), (50, 1), (400, 5), (400, 60)])
def test_entropy_on_a_line_is_that_of_a_tree(rows, k):
    x = np.random.default_rng(rows).standard_t(2, size=(rows, 1))
    rho = Neighbors(x).distance(x, k + 1)
    assert entropy_term(x, k) == pytest.approx(digamma(k) - digamma(rows) - math.log(2) - np.log(rho).mean(), rel=1e-12)


@pytest.mark.parametrize("law", ["exponential", "uniform", "laplace", "normal"])
def test_independent_columns_have_the_entropy_of_their_laws(law):
    """Neighbours of all five columns at once are off by 0.05 to 0.6."""
    exact = {"exponential": -1.0, "uniform": 0.0, "laplace": -1 - math.log(2), "normal": -(1 + math.log(2 * math.pi)) / 2}[law]
    rng = np.random.default_rng(0)
    normal = mean_log_density(rng.normal(size=(2_000, 5)), 5) + 5 * (1 + math.log(2 * math.pi)) / 2
    found = mean_log_density(getattr(rng, law)(size=(2_000, 5)), 5) - normal
    assert abs(found - 5 * exact) < 0.15


def test_one_sample_in_five_dimensions_is_answered():
    found = [one_sample_kl(pair(2_000, 5, seed)[0], log_normal, seed=seed) for seed in range(4)]
    assert all(one.reliable and abs(one.value - truth(5)) < min(0.1, 3 * one.stderr) for one in found)


# ---- honest


@pytest.mark.parametrize("dim", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_intervals_cover(dim):
    found = [two_sample_kl(*pair(300, dim, seed), seed=seed) for seed in range(100)]
    trusted = [one for one in found if one.reliable]
    assert len(trusted) >= 90
    inside = sum(one.interval[0] <= truth(dim) <= one.interval[1] for one in trusted)
    assert 0.90 <= inside / len(trusted) <= 0.99


def test_many_dimensions_are_flagged_with_the_measured_bias():
    estimate = two_sample_kl(*pair(500, 20, 0, shift=1.0, scale=1.4))
    assert not estimate.reliable
    said = re.search(r"Gaussians fitted to this data \(truth ([\d.]+)\) it gives ([-\d.]+)", " ".join(estimate.notes))
    assert abs(float(said[2]) - float(said[1])) > 0.1 * float(said[1])
    assert any("beyond two sampling errors" in note for note in estimate.notes)
    assert estimate.interval[0] <= truth(20, 1.0, 1.4) <= estimate.interval[1]
    assert not one_sample_kl(pair(500, 20, 0)[0], log_normal).reliable


def test_a_twin_fitted_on_few_rows_is_no_warrant():
    """Its covariances are noise here: it shows a bias of 6 %, and the bias is 30 %."""
    estimates = [two_sample_kl(*pair(500, 20, seed), seed=seed) for seed in range(5)]
    assert not any(one.reliable for one in estimates)
    assert any("fitting noise" in note for note in estimates[0].notes)


def test_far_apart_is_capped_and_says_so():
    estimate = two_sample_kl(*pair(500, 1, 0, shift=8.0, scale=1.0))
    assert estimate.value <= estimate.cap < math.log(501 / 4)
    assert not estimate.reliable
    assert any("the most that 500 rows" in note for note in estimate.notes)


def test_few_rows_are_flagged():
    assert "error bars need 50 rows, and there are 12" in two_sample_kl(*pair(12, 1, 0, m=80)).notes[0]
    assert math.isfinite(two_sample_kl(*pair(3, 1, 0), k=1).stderr)


def test_fields():
    estimate = two_sample_kl(*pair(200, 2, 0), variant="plain", k=3)
    assert (estimate.quantity, estimate.n, estimate.cap, estimate.up_to) == ("forward_kl", 200, None, None)
    assert (estimate.finite, estimate.exact) == ("not certified", False)
    assert estimate.method == "nearest neighbours, k = 3, two samples, plain"


# ---- ties


@pytest.mark.parametrize("variant", ["plain", "bias_reduced"])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_rounded_data_are_spread(shift, variant):
    x, y = (one.round(1) for one in pair(2000, 1, 5, shift=shift, scale=1.0))
    estimate = two_sample_kl(x, y, variant=variant)
    assert abs(estimate.value - shift**2 / 2) < 3 * estimate.stderr
    assert any("spread evenly within their steps, 0.1" in note for note in estimate.notes)
    assert estimate.reliable


def test_rounding_that_matters_is_flagged():
    x, y = (2.5 * np.round(one / 2.5) for one in pair(2000, 1, 5, shift=1.5, scale=0.5))
    estimate = two_sample_kl(x, y)
    assert not estimate.reliable
    assert any("the rounding matters" in note for note in estimate.notes)


def test_copies_are_flagged_and_finite():
    x, y = pair(300, 2, 0)
    for variant in ("plain", "bias_reduced"):
        estimate = two_sample_kl(np.repeat(x, 8, 0), y, variant=variant)
        assert math.isfinite(estimate.value)
        assert "copies aren't independent draws" in estimate.notes[0]
        assert not estimate.reliable


@pytest.mark.parametrize("variant", ["plain", "bias_reduced"])
def test_rows_shared_by_both_samples_give_a_finite_number(variant):
    x, y = pair(500, 2, 0)
    y[:4] = x[:4]
    assert math.isfinite(two_sample_kl(x, y, k=1, variant=variant).value)
    assert math.isfinite(two_sample_kl(x, x.copy(), k=1, variant=variant).value)


# ---- the same again


def test_same_seed_same_answer_and_global_generators_untouched():
    x, y = pair(200, 2, 0)
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (two_sample_kl(x, y, seed=seed) for seed in (1, 1, 2))
    single = [one_sample_kl(x, log_normal, seed=4) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert (state == np.random.get_state()[1]).all()
    assert first == again
    assert single[0] == single[1]
    assert (first.value, first.stderr) != (other.value, other.stderr)
    assert first.value == other.value


def test_inputs_of_every_kind_are_one():
    x, y = pair(200, 1, 0)
    first = two_sample_kl(x, y)
    assert first == two_sample_kl(x[:, 0], torch.from_numpy(y)) == two_sample_kl(pd.DataFrame(x), Target(samples=y))
    plain = one_sample_kl(x, lambda at: log_normal(at).numpy())
    assert plain == one_sample_kl(x, log_normal)


# ---- bad input

X, Y = pair(50, 2, 0)


def poked(value):
    x = X.copy()
    x[3, 1] = value
    return x


BAD = [
    ((poked(math.nan), Y), {}, r"1 cells? in 1 of 50 rows .*NaN or infinite: `x2` in row 3"),
    ((X, poked(math.inf)), {}, r"1 cells? in 1 of 50 rows .*NaN or infinite"),
    ((np.empty((0, 2)), Y), {}, r"empty, shape \(0, 2\)"),
    ((X, Y[:, :1]), {}, "`x` has 2 columns and `y` has 1"),
    ((X, Y[:, 0]), {}, "`x` has 2 columns and `y` has 1"),
    ((X[:6], Y), {}, "`x`: `k=5` in dimension 2 needs at least 7 rows, and there are 6"),
    ((X, Y), {"k": 50}, "needs at least 52 rows, and there are 50"),
    ((X, Y[:3]), {"k": 1}, "`y`: `k=1` in dimension 2 needs at least 4 rows, and there are 3"),
    ((X, Y), {"k": 0}, "`k=0`: it isn't a whole number"),
    ((X, Y), {"k": 2.5}, "`k=2.5`: it isn't a whole number"),
    ((X, Y), {"k": True}, "`k=True`: it isn't a whole number"),
    ((X, Y), {"variant": "best"}, "'best'"),
    ((np.column_stack([X[:, 0], np.ones(50)]), Y), {}, "`x`: column `x2` is constant"),
    ((X, np.column_stack([np.ones(50), Y[:, 0]])), {}, "`y`: column `x1` is constant"),
    ((X, np.column_stack([Y[:, 0], 2 * Y[:, 0]])), {}, "`y`: its columns are linearly dependent"),
    ((X.reshape(5, 10, 2), Y), {}, r"not \(n, d\)"),
    ((Target(samples=X, weights=np.arange(1.0, 51)), Y), {}, "it is weighted"),
    ((X, Target(log_prob=log_normal, dim=2)), {}, "it has only"),
]


@pytest.mark.parametrize(("samples", "options", "message"), BAD, ids=[row[2][:40] for row in BAD])
def test_bad_samples_are_refused(samples, options, message):
    with pytest.raises(InputError, match=message) as caught:
        two_sample_kl(*samples, **options)
    assert GRAMMAR.match(str(caught.value))


@pytest.mark.parametrize(
    ("log_q", "message"),
    [
        (lambda x: x, r"`log_q` returned shape \(50, 2\)"),
        (lambda x: torch.where(x[:, 0] > 0.5, torch.nan, log_normal(x)), "`log_q` is NaN"),
        (lambda x: torch.where(x[:, 0] > 0.5, math.inf, log_normal(x)), r"`log_q` is \+inf"),
    ],
)
def test_bad_densities_are_refused(log_q, message):
    with pytest.raises(TargetError, match=message) as caught:
        one_sample_kl(X, log_q)
    assert GRAMMAR.match(str(caught.value))


def test_rows_outside_the_support_of_q_make_it_infinite():
    estimate = one_sample_kl(X, lambda x: torch.where(x[:, 0] > 0.5, -math.inf, log_normal(x)))
    assert (estimate.value, estimate.finite) == (math.inf, "infinite")
    assert re.search(r"\d+ of 50 rows \(.* of the mass\) fell where the other density is zero: .* ≤ x1 ≤ ", estimate.notes[0])


@pytest.mark.parametrize("rows", [300, 2000, 25_000])
def test_rows_out_of_reach_of_the_other_sample_are_said_to_be(rows):
    """Half of a normal lies where an exponential has no mass: the truth is infinite, and any number finite."""
    generator = np.random.default_rng(rows)
    x, y = generator.normal(size=(rows, 1)), generator.exponential(size=(rows, 1))
    found = two_sample_kl(x, y)
    assert not found.reliable
    assert found.finite == "not certified"
    assert any("may be infinite" in note or "be infinite" in note for note in found.notes)
    assert two_sample_kl(np.abs(x), y).reliable


def test_rounded_rows_at_an_end_of_the_support_are_not_spread_beyond_it():
    q = torch.distributions.Exponential(torch.tensor(1.0, dtype=torch.float64))
    x = np.round(np.random.default_rng(0).exponential(size=(2000, 1)), 2)
    assert (x == 0).any()
    estimate = one_sample_kl(x, lambda rows: Target.of(q).log_prob(rows))
    assert math.isfinite(estimate.value) and abs(estimate.value) < 4 * estimate.stderr
    assert "values were spread evenly within their steps, 0.01" in " ".join(estimate.notes)


HEAVY = {
    "t₂": (lambda g: g.standard_t(2, 2_000), Normal(0.0, 1.0)),
    "Cauchy": (lambda g: g.standard_cauchy(2_000), Laplace(0.0, 1.0)),
}


@pytest.mark.parametrize("name", HEAVY)
def test_one_sample_with_a_heavy_tail_of_log_q_is_not_reliable(name):
    draw, law = HEAVY[name]
    answers = [wk.estimate(p=draw(np.random.default_rng(seed)), q=law, method="knn") for seed in range(6)]
    assert sum(one.reliable for one in answers) <= 1  # a tail can look light by chance
    assert all(one.reliable or "heavy tail" in one.notes[0] for one in answers)


def test_one_sample_with_a_light_tail_of_log_q_is_reliable():
    assert wk.estimate(p=np.random.default_rng(0).gamma(3, size=2_000), q=Exponential(0.3)).reliable
