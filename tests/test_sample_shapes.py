"""Estimates from samples on shapes that aren't Gaussian: tails, skew, ends of supports, bumps; and what can't be seen."""

import math
import re

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

import whichkl as wk
from whichkl._checks import InputError
from whichkl.divergences.samples.nearest_neighbors import one_sample_kl, two_sample_kl
from whichkl.divergences.samples.neighbors import compare, whiten
from whichkl.divergences.samples.ratio import classifier_divergence
from whichkl.divergences.samples.reach import beyond_reach, raised_for_reach
from whichkl.divergences.samples.shape_twins import Pooled, lower_bound

N, M = mpmath.log, mpmath.mpf


def integral(f, *points):
    return float(mpmath.quad(f, points))


def log_normal(x, scale=1.0):
    return -(x**2) / (2 * scale**2) - N(scale * mpmath.sqrt(2 * mpmath.pi))


def t5(x):
    return mpmath.gamma(3) / (mpmath.sqrt(5 * mpmath.pi) * mpmath.gamma(M(5) / 2)) * (1 + x**2 / 5) ** -3


LAPLACE, NORMAL, T5, WIDER = stats.laplace(), stats.norm(), stats.t(5), stats.norm(0, 1.2)
LINE = {
    # KL(Laplace‖N(0, 1)) = E|x|²/2 + log √(2π) − log 2 − 1, by hand
    "laplace, normal": (LAPLACE, NORMAL, 0.5 * math.log(2 * math.pi) - math.log(2)),
    "t5, N(0, 1.2)": (T5, WIDER, integral(lambda x: t5(x) * (N(t5(x)) - log_normal(x, M("1.2"))), -mpmath.inf, 0, mpmath.inf)),
    "exponential, gamma(2)": (stats.expon(), stats.gamma(2), float(mpmath.euler)),
    "uniform, beta(2, 2)": (stats.uniform(), stats.beta(2, 2), 2 - math.log(6)),
    "normal, laplace": (NORMAL, LAPLACE, math.log(2) + math.sqrt(2 / math.pi) - 0.5 * math.log(2 * math.pi) - 0.5),
    "gamma(3), gamma(2)": (stats.gamma(3), stats.gamma(2), 1.5 - float(mpmath.euler) - math.log(2)),
}


def columns(p, q, n, seed, dim=1):
    rng = np.random.default_rng([seed, n, dim])
    return p.rvs((n, dim), random_state=rng), q.rvs((n, dim), random_state=rng)


def covered(estimate, truth):
    return estimate.interval[0] <= truth <= estimate.interval[1]


def test_the_truths_agree_with_each_other():
    by_density = wk.estimate(p=torch.distributions.Laplace(0.0, 1.0), q=torch.distributions.Normal(0.0, 1.0)).value
    assert LINE["laplace, normal"][2] == pytest.approx(by_density, abs=1e-5)
    gammas = integral(lambda x: x**2 * mpmath.exp(-x) / 2 * N(x / 2), 0, 1, mpmath.inf)
    assert LINE["gamma(3), gamma(2)"][2] == pytest.approx(gammas, abs=1e-9)


# ---- reliable answers cover


@pytest.mark.parametrize("name", LINE)
def test_forward_kl_from_samples_covers_where_it_is_called_reliable(name):
    p, q, truth = LINE[name]
    found = [wk.estimate(p=x, q=y, seed=seed) for seed in range(3) for x, y in [columns(p, q, 400, seed)]]
    assert sum(one.reliable and not covered(one, truth) for one in found) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [500, 2000])
@pytest.mark.parametrize("name", LINE)
def test_intervals_cover_over_repeats(name, rows):
    p, q, truth = LINE[name]
    found = [wk.estimate(p=x, q=y, seed=seed) for seed in range(30) for x, y in [columns(p, q, rows, seed)]]
    trusted = [one for one in found if one.reliable]
    # 90 % of at most 30 answers, less two standard deviations of the count
    assert sum(covered(one, truth) for one in trusted) >= 0.9 * len(trusted) - 2 * math.sqrt(0.09 * len(trusted))


@pytest.mark.parametrize("name", ["laplace, normal", "uniform, beta(2, 2)"])
def test_bounded_divergences_are_right_where_no_ratio_is_quadratic(name):
    p, q, _ = LINE[name]
    grid = np.linspace(-12, 12, 400_001) if name.startswith("laplace") else np.linspace(0, 1, 400_001)[1:-1]
    a, b = p.pdf(grid), q.pdf(grid)
    both = {
        "total_variation": np.trapezoid(np.abs(a - b), grid) / 2,
        "jensen_shannon": np.trapezoid((a * np.log(2 * a / (a + b)) + b * np.log(2 * b / (a + b))) / 2, grid),
    }
    for kind, truth in both.items():
        found = [classifier_divergence(*map(torch.from_numpy, columns(p, q, 1000, seed)), kind, seed=seed) for seed in range(2)]
        assert any(one.reliable for one in found)
        assert all(abs(one.value - truth) < 3 * one.stderr for one in found)


def test_a_total_variation_that_few_rows_hide_is_in_the_interval():
    grid = np.linspace(-14, 14, 400_001)
    bumps = (stats.norm.pdf(grid, -1, 0.7) + stats.norm.pdf(grid, 1, 0.7)) / 2
    truth = np.trapezoid(np.abs(stats.norm.pdf(grid, 0, 1.2) - bumps), grid) / 2
    found = []
    for seed in range(12):
        rng = np.random.default_rng([seed, 400])
        x, y = rng.normal(0, 1.2, (400, 1)), rng.choice([-1.0, 1.0], (400, 1)) + 0.7 * rng.normal(size=(400, 1))
        found.append(classifier_divergence(torch.from_numpy(x), torch.from_numpy(y), "total_variation", seed=seed))
    trusted = [one for one in found if one.reliable]
    assert len(trusted) >= 8
    assert sum(not covered(one, truth) for one in trusted) <= 1
    assert max(one.stderr for one in trusted) < 0.15


def test_tails_in_a_plane_are_reliable_and_covered():
    """A quadratic log ratio shows nothing of tails at equal variances; what finer features add widens the interval."""
    wide = math.sqrt(2)
    truth = 2 * (math.log(2) + wide * math.sqrt(2 / math.pi) - 0.5 * math.log(2 * math.pi * math.e * wide**2))
    pairs = [columns(LAPLACE, stats.norm(0, wide), 500, seed, 2) for seed in range(5)]
    found = [classifier_divergence(*map(torch.from_numpy, pair), "reverse_kl", seed=seed) for seed, pair in enumerate(pairs)]
    trusted = [one for one in found if one.reliable]
    assert len(trusted) >= 3
    assert sum(not covered(one, truth) for one in trusted) <= 1


def test_columns_with_ends_are_covered_in_a_plane_too():
    p, q, truth = LINE["uniform, beta(2, 2)"]
    x, y = columns(p, q, 600, 0, 2)
    for one in (wk.estimate(p=x, q=y), two_sample_kl(x, y), classifier_divergence(*map(torch.from_numpy, (x, y)), "forward_kl")):
        assert not one.reliable or covered(one, 2 * truth)

    def log_q(z):
        return torch.from_numpy(q.logpdf(z.numpy()).sum(1))

    known = [one_sample_kl(columns(p, q, 500, seed, 2)[0], log_q, seed=seed) for seed in range(5)]
    assert sum(one.reliable and not covered(one, 2 * truth) for one in known) <= 1


# ---- what can't be seen


@pytest.mark.parametrize("seed", range(2))
def test_tails_beyond_the_other_sample_are_reported(seed):
    x, y = columns(LAPLACE, NORMAL, 2000, seed)
    found = two_sample_kl(x, y, seed=seed)
    assert not found.reliable
    assert any(re.search(r"[\d.]+ nats lie beyond the outermost rows of the other sample", note) for note in found.notes)
    assert two_sample_kl(y, x, seed=seed).reliable  # every draw of the narrow one has neighbours in the wide one


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys"])
def test_an_infinite_divergence_is_never_a_reliable_number(divergence):
    """A normal has 2.3 % of its mass where a gamma has none."""
    x, y = columns(stats.gamma(4), stats.norm(4, 2), 1500, 0)
    assert not wk.estimate(p=x, q=y, divergence=divergence).reliable


@pytest.mark.slow
def test_few_rows_rarely_call_an_infinite_divergence_a_number():
    pairs = [columns(stats.gamma(4), stats.norm(4, 2), 500, seed) for seed in range(20)]
    assert sum(wk.estimate(p=x, q=y, divergence="reverse_kl").reliable for x, y in pairs) <= 4


def test_reach_under_gaussian_tails_is_extrapolated():
    """What lies beyond the fifteenth largest of 2,000 normals under a Laplace law, by quadrature of both ends."""
    end = float(stats.norm.isf(15.5 / 2000))
    of_p, of_q = mpmath.exp(-end) / 2, M(float(stats.norm.sf(end)))
    beyond = integral(
        lambda x: mpmath.exp(-x) / 2 * (N(mpmath.exp(-x) / 2 / of_p) - log_normal(x) + N(of_q)), end, 10, mpmath.inf
    )
    found = [beyond_reach(*columns(LAPLACE, NORMAL, 2000, seed)) for seed in range(20)]
    assert np.median(found) == pytest.approx(2 * beyond, rel=0.5)


@pytest.mark.parametrize("name", ["uniform, beta(2, 2)", "exponential, gamma(2)"])
def test_a_value_is_raised_towards_the_truth_by_what_lies_beyond_an_end(name):
    """Nearest neighbours miss the end of a support; the correction, with an error of its own size, covers the truth."""
    p, q, truth = LINE[name]
    pairs = [columns(p, q, 1000, seed) for seed in range(40)]
    values = [compare(*whiten(x, y), 5, "bias_reduced") for x, y in pairs]
    sampling = float(np.std(values))
    raised = [raised_for_reach(x, y, sampling, value) for (x, y), value in zip(pairs, values, strict=True)]
    accepted = [(value, *one[:2]) for value, one in zip(values, raised, strict=True) if not one[3]]
    assert len(accepted) >= 16
    errors = np.array([(value + more - truth, value - truth, math.hypot(sampling, error)) for value, more, error in accepted])
    assert abs(errors[:, 0].mean()) < abs(errors[:, 1].mean())
    assert (np.abs(errors[:, 0]) < 1.96 * errors[:, 2]).mean() >= 0.9


def test_a_value_isn_t_raised_where_too_much_lies_beyond():
    x, y = columns(stats.norm(8), NORMAL, 500, 0)
    more, error, notes, wrong = raised_for_reach(x, y, 0.05, 4.0)
    assert (more, notes) == (0.0, [])
    assert error > 4
    assert "lie beyond the outermost rows" in wrong[0]


# ---- twins of the shape


def test_labels_are_drawn_by_the_odds_and_keep_the_rows():
    z = torch.linspace(-1, 1, 400, dtype=torch.float64)[:, None]
    sample = Pooled(z, 100, 5, True, torch.Generator().manual_seed(0))
    ratio, counts = z[:, 0], torch.zeros(400, dtype=torch.float64)
    for _ in range(400):
        twin, known = sample.relabelled(ratio)
        assert torch.equal(twin.z.sort(0).values, z)
        assert torch.equal(known, twin.z[:, 0])
        counts[torch.isin(z[:, 0], twin.z[: twin.n, 0])] += 1
    chance = torch.sigmoid(ratio + math.log(100 / 300))
    off = (counts - 400 * chance) / (400 * chance * (1 - chance)).sqrt()
    assert float(off.abs().max()) < 4.5
    assert abs(float(off.mean())) < 4 / math.sqrt(400)


def test_the_bound_is_the_kl_at_the_true_ratio_and_lower_elsewhere():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, generator=generator, dtype=torch.float64)
    z[:100_000] += 1
    assert lower_bound(z - 0.5, 100_000) == pytest.approx(0.5, abs=0.02)
    assert lower_bound(0.5 * z, 100_000) < 0.45


# ---- few rows


@pytest.mark.parametrize("rows", [7, 10, 19])
def test_an_answer_stands_where_the_second_opinion_needs_more_rows(rows):
    rng = np.random.default_rng(rows)
    few = rng.normal(size=rows)
    found = wk.estimate(p=rng.normal(size=1000), q=few)
    assert not found.reliable
    assert found.method.startswith("nearest neighbours")
    assert any(f"classifier was refused: Cannot use q: it has {rows} rows, and 20 are needed." in note for note in found.notes)
    back = wk.estimate(p=few, q=rng.normal(size=1000), divergence="reverse_kl")
    assert any(f"Cannot use p: it has {rows} rows" in note for note in back.notes)


@pytest.mark.parametrize(
    ("divergence", "method", "message"),
    [
        ("forward_kl", "knn", "Cannot find neighbours in q: `k=5` in dimension 1 needs at least 7 rows, and there are 6."),
        ("reverse_kl", "knn", "Cannot find neighbours in q: "),
        ("jensen_shannon", None, "Cannot use q: it has 6 rows, and 20 are needed."),
        ("forward_kl", "bound", "Cannot use q: it has 6 rows"),
        ("reverse_kl", "bound", "Cannot use q: it has 6 rows"),
    ],
)
def test_errors_name_the_side(divergence, method, message):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=re.escape(message)):
        wk.estimate(p=rng.normal(size=100), q=rng.normal(size=6), divergence=divergence, method=method)
