"""Divergences and distances from two samples alone: right within their errors, flagged where they aren't, and described."""

import math

import pytest
import torch
from torch.distributions import Cauchy, Laplace, MultivariateNormal, Normal, kl_divergence

from whichkl._checks import InputError
from whichkl.divergences.kinds import KINDS, JensenShannonDivergence, RenyiDivergence, SkewForwardKLDivergence
from whichkl.divergences.samples.bound import variational_bound
from whichkl.divergences.samples.ratio import classifier_divergence
from whichkl.divergences.samples.sample_distances import energy_distance, mmd_squared, sliced_wasserstein

D = torch.float64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draws(n, d=1, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=D)


def integral(kind, p, q):
    x = torch.linspace(-30, 30, 200_001, dtype=D)
    return kind.of_integral(float(torch.trapezoid(kind.integrand(p.log_prob(x), q.log_prob(x)), x)))


def normal(loc, scale):
    return Normal(torch.tensor(loc, dtype=D), torch.tensor(scale, dtype=D))


P, Q = normal(0.0, 1.0), normal(1.0, 1.5)
KINDS_TRIED = [
    *(kind() for kind in KINDS.values()),
    JensenShannonDivergence(0.2),
    SkewForwardKLDivergence(0.5),
    RenyiDivergence(0.8),
    RenyiDivergence(1.5),
]


def pair(n, m, seed):
    return draws(n, seed=seed), 1 + 1.5 * draws(m, seed=seed + 1)


# ---- the classifier


@pytest.mark.parametrize("kind", KINDS_TRIED, ids=str)
def test_classifier_is_within_its_error_and_reliable(kind):
    truth = integral(kind, P, Q)
    estimates = [classifier_divergence(*pair(1200, 800, 2 * seed), kind, seed=seed) for seed in range(3)]
    for one in estimates:
        assert abs(one.value - truth) < 2.5 * one.stderr
        assert one.stderr < 0.2 * truth  # an error bar that is wide enough for anything says nothing
        assert one.quantity == kind.name
        assert one.finite == "not certified"
        assert "cross-fitted classifier (quadratic logistic, 5 folds)" in one.method
    assert sum(one.reliable for one in estimates) >= 2  # quadratic features are right here; chance may flag one of three
    mean = sum(one.value for one in estimates) / 3
    assert abs(mean - truth) < 2.5 * max(one.stderr for one in estimates) / math.sqrt(3)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jeffreys", "jeffreys_sum"])
def test_classifier_in_several_dimensions(name):
    mean, cov = torch.full((3,), 0.4, dtype=D), torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.8]], dtype=D)
    p, q = MultivariateNormal(mean, cov), MultivariateNormal(torch.zeros(3, dtype=D), torch.eye(3, dtype=D))
    forward, reverse = float(kl_divergence(p, q)), float(kl_divergence(q, p))
    truth = {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "jeffreys_sum": forward + reverse,
        "jeffreys": (forward + reverse) / 2,
    }[name]
    x = mean + draws(2000, 3, 1) @ torch.linalg.cholesky(cov).T
    estimate = classifier_divergence(x, draws(2000, 3, 2), name)
    assert abs(estimate.value - truth) < 4 * estimate.stderr
    assert estimate.reliable, estimate.notes


@pytest.mark.slow
def test_classifier_error_covers_over_repeats():
    repeats = [classifier_divergence(*pair(400, 600, 2 * seed), "jensen_shannon", seed=seed) for seed in range(40)]
    truth = integral(JensenShannonDivergence(), P, Q)
    inside = sum(one.interval[0] <= truth <= one.interval[1] for one in repeats)
    assert inside >= 33


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("n", "d"), [(500, 1), (400, 4), (200, 12)])
def test_classifier_finds_nothing_between_equal_laws(kind, n, d):
    estimate = classifier_divergence(draws(n, d, 11), draws(n, d, 12), kind)
    assert abs(estimate.value) < 4 * estimate.stderr + 0.01
    assert abs(estimate.value) < 0.2


def test_classifier_on_the_case_that_overfits_without_a_cross_fit():
    places = torch.arange(20)
    root = torch.linalg.cholesky((0.5 ** (places[:, None] - places).abs()).to(D))
    x, y = 0.5 + draws(1000, 20, 5) @ root.T, draws(1000, 20, 6)
    estimate = classifier_divergence(x, y, "forward_kl")
    assert estimate.value < 5.5
    assert not estimate.reliable
    assert abs(estimate.value - 5.23) < 4 * estimate.stderr
    assert "diagonal" in estimate.method
    assert any("no small part" in note or "can't be seen" in note or "may add more" in note for note in estimate.notes)


@pytest.mark.parametrize("law", ["two modes", "laplace", "cauchy"])
def test_classifier_follows_a_ratio_that_is_not_quadratic_or_says_that_it_does_not(law):
    line = torch.linspace(-8, 8, 80_001, dtype=D)
    modes = [normal(sign * math.sqrt(0.75), 0.5).log_prob(line) for sign in (1, -1)]
    two = torch.logaddexp(*modes) - math.log(2)
    x, truth = {
        "two modes": lambda: (
            0.5 * draws(2000, seed=1) + math.sqrt(0.75) * draws(2000, seed=2).sign(),
            float(torch.trapezoid(two.exp() * (two - P.log_prob(line)), line)),
        ),
        "laplace": lambda: (Laplace(0.0, 1.0).sample((4000, 1)), 0.5 * math.log(2 * math.pi) - math.log(2)),
        "cauchy": lambda: (Cauchy(0.0, 1.0).sample((2000, 1)), math.inf),
    }[law]()
    estimate = classifier_divergence(x, draws(len(x), seed=3), "forward_kl")
    assert "finer logistic" in estimate.method
    assert not estimate.reliable or abs(estimate.value - truth) < 2.5 * estimate.stderr


def test_classifier_ignores_units_and_order_of_columns():
    x, y = pair(400, 300, 7)
    one = classifier_divergence(x, y, "forward_kl")
    other = classifier_divergence(1e6 - 1e-3 * x, 1e6 - 1e-3 * y, "forward_kl")
    assert other.value == pytest.approx(one.value, rel=1e-4)
    assert classifier_divergence(x[:, 0], y[:, 0], "forward_kl").value == one.value


def test_classifier_swaps_with_its_samples():
    x, y = pair(1000, 1000, 9)
    forward, reverse = classifier_divergence(x, y, "forward_kl"), classifier_divergence(y, x, "reverse_kl")
    assert abs(forward.value - reverse.value) < forward.stderr
    assert classifier_divergence(x, x, "chi_squared").value < 0.01


def test_classifier_with_few_rows_says_that_they_are_few():
    estimate = classifier_divergence(*pair(20, 20, 1), "forward_kl")
    assert math.isfinite(estimate.value)
    assert not estimate.reliable


# ---- the bound


@pytest.mark.parametrize("bound", ["dv", "nwj"])
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 1.5])
def test_bound_stays_below_the_truth(bound, shift):
    repeats = [variational_bound(shift + draws(1000, 1, 2 * s), draws(1000, 1, 2 * s + 1), bound=bound) for s in range(40)]
    truth = shift**2 / 2
    values = torch.tensor([one.value for one in repeats])
    assert all(one.value < truth + 3 * one.stderr for one in repeats if one.reliable)
    assert float(values.mean()) < truth + 3 * float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) > 0.8 * truth - 0.02
    assert sum(one.reliable for one in repeats) >= 25
    assert repeats[0].cap == pytest.approx(math.log(500))
    assert "lower bound" in repeats[0].notes[0]


@pytest.mark.parametrize("bound", ["dv", "nwj"])
@pytest.mark.parametrize("shift", [4.0, 8.0, 1000.0])
def test_bound_never_exceeds_what_its_draws_can_show(bound, shift):
    estimate = variational_bound(shift + draws(400, 1, 1), draws(400, 1, 2), bound=bound)
    assert estimate.value <= estimate.cap == pytest.approx(math.log(200))
    assert not estimate.reliable


# ---- distances between samples


def test_energy_distance_is_unbiased_and_covers():
    repeats = [energy_distance(draws(60, 1, 2 * s), 1 + draws(80, 1, 2 * s + 1)) for s in range(200)]
    values = torch.tensor([one.value for one in repeats])
    assert abs(float(values.mean()) - 0.541807) < 4 * float(values.std()) / math.sqrt(200)
    inside = sum(one.interval[0] <= 0.541807 <= one.interval[1] for one in repeats)
    assert inside >= 180
    assert "not in nats" in repeats[0].notes[0]


def test_mmd_is_unbiased_and_covers():
    h = 0.8
    truth = 2 * (1 - math.exp(-0.5 / (h**2 + 2))) * h / math.sqrt(h**2 + 2)
    repeats = [mmd_squared(draws(60, 1, 2 * s), 1 + draws(80, 1, 2 * s + 1), bandwidth=h) for s in range(200)]
    values = torch.tensor([one.value for one in repeats])
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(200)
    inside = sum(one.interval[0] <= truth <= one.interval[1] for one in repeats)
    assert inside >= 180


@pytest.mark.parametrize("distance", [energy_distance, mmd_squared], ids=lambda one: one.__name__)
def test_distance_between_equal_laws_is_zero_on_average(distance):
    repeats = [distance(draws(60, 2, 2 * s), draws(50, 2, 2 * s + 1)) for s in range(200)]
    values = torch.tensor([one.value for one in repeats])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(200)
    assert float(values.min()) < 0
    assert sum(abs(one.value) < 1.96 * one.stderr for one in repeats) >= 180
    assert any("laws may be the same" in note for note in repeats[0].notes)


def test_energy_distance_by_its_definition_and_in_blocks(monkeypatch):
    x, y = draws(30, 3, 1), 1e6 + draws(20, 3, 2)
    within = [torch.pdist(one).mean() for one in (x, y)]
    truth = float(2 * torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean() - within[0] - within[1])
    assert energy_distance(x, y).value == pytest.approx(truth, rel=1e-9)
    monkeypatch.setattr("whichkl.divergences.samples.sample_distances._NUMBERS_PER_BLOCK", 100)
    assert energy_distance(x, y).value == pytest.approx(truth, rel=1e-9)
    assert energy_distance(1e200 * x, -1e200 * x).value < math.inf


def test_mmd_says_its_bandwidth():
    x, y = draws(50, 1, 1), draws(40, 1, 2)
    median = float(torch.pdist(torch.cat([x, y])).median())
    chosen = mmd_squared(x, y)
    assert f"bandwidth {median:.4g}, the median distance" in chosen.notes[0]
    assert chosen.value == pytest.approx(mmd_squared(x, y, bandwidth=median).value)
    assert mmd_squared(1000 * x, 1000 * y).value == pytest.approx(chosen.value)


@pytest.mark.parametrize(("n", "m", "power"), [(300, 300, 2), (300, 200, 2), (300, 200, 1)])
def test_sliced_wasserstein_of_shifted_gaussians(n, m, power):
    shift = torch.tensor([3.0, 0.0], dtype=D)
    truth = 9 / 2 if power == 2 else 3 * 2 / math.pi
    repeats = [
        sliced_wasserstein(draws(n, 2, 2 * s), shift + draws(m, 2, 2 * s + 1), power=power, projections=50, seed=s)
        for s in range(20)
    ]
    bias = 3 * 2 / min(n, m)
    inside = sum(abs(one.value - truth) < 1.96 * one.stderr + bias for one in repeats)
    assert inside >= 16
    mean = sum(one.value for one in repeats) / 20
    assert abs(mean - truth) < 4 * repeats[0].stderr / math.sqrt(20) + bias
    assert "biased upwards" in repeats[0].notes[1]
    assert repeats[0].reliable


def test_sliced_wasserstein_in_one_dimension_by_its_definition():
    x, y = draws(40, 1, 1), 2 + draws(40, 1, 2)
    truth = float((x.sort(0).values - y.sort(0).values).square().mean())
    assert sliced_wasserstein(x, y).value == pytest.approx(truth)
    doubled = torch.cat([y, y, y])
    assert sliced_wasserstein(x, doubled).value == pytest.approx(truth)
    assert sliced_wasserstein(5 * x, 5 * y, power=3).value == pytest.approx(125 * sliced_wasserstein(x, y, power=3).value)


def test_sliced_wasserstein_between_equal_laws_says_that_it_is_bias():
    estimate = sliced_wasserstein(draws(400, 3, 1), draws(400, 3, 2))
    assert 0 < estimate.value < 0.05
    assert abs(estimate.value) < 3 * estimate.stderr
    assert "where the truth is 0" in estimate.notes[1]


# ---- what holds for all

ALL = {
    "classifier": lambda x, y, **k: classifier_divergence(x, y, "forward_kl", **k),
    "bound": variational_bound,
    "energy": lambda x, y, seed=0: energy_distance(x, y),
    "mmd": lambda x, y, seed=0: mmd_squared(x, y),
    "sliced": sliced_wasserstein,
}


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_answer_and_the_global_generator_is_left(name):
    x, y = draws(100, 2, 1), 0.5 + draws(80, 2, 2)
    before = torch.get_rng_state()
    first, again = ALL[name](x, y, seed=3), ALL[name](x, y, seed=3)
    assert first == again
    assert torch.equal(before, torch.get_rng_state())
    assert ALL[name](x.float().requires_grad_(True), y.float()).value == pytest.approx(ALL[name](x, y).value, rel=1e-3)
    assert (first.up_to, first.unit, first.exact) == (None, "nats", False)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(0, 2), draws(30, 2), "Cannot use `x`: it has 0 rows, and"),
        (draws(30, 2), draws(30, 3), "Cannot compare these samples: `x` has 2 columns and `y` has 3. Pass the same"),
        (draws(30, 2), torch.zeros(30, 2, 2), "Cannot use `y`: its shape is (30, 2, 2), not (n, d). Pass one row a draw."),
        (draws(30, 2), torch.zeros(30, 0), "Cannot use `y`: its shape is (30, 0), not (n, d)"),
        (draws(30, 2), torch.full((30, 2), math.nan), "Cannot use these samples `y`: 60 cells in 30 of 30 rows"),
        (torch.tensor([0.0] * 30 + [math.inf]), draws(30), "`column 1` in row 30"),
    ],
)
def test_bad_samples_are_refused(name, x, y, message):
    with pytest.raises(InputError) as error:
        ALL[name](x, y)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classifier_divergence(draws(19), draws(30), "forward_kl"), "`x`: it has 19 rows, and 20 are needed. Pass more"),
        (lambda: variational_bound(draws(30), draws(1)), "Cannot use `y`: it has 1 row, and 20 are needed"),
        (lambda: classifier_divergence(draws(30), torch.ones(30), "hellinger"), "column 1 of `y` is constant. Drop that column."),
        (lambda: variational_bound(torch.ones(30), draws(30)), "column 1 of `x` is constant"),
        (
            lambda: classifier_divergence(draws(30), draws(30), "kl"),
            "the divergence `kl`: there is no such divergence here. Use one of",
        ),
        (lambda: classifier_divergence(draws(30), draws(30), "forward_kl", folds=1), "Cannot use `folds=1`: it must be 2 to 20"),
        (lambda: variational_bound(draws(30), draws(30), bound="mine"), "Cannot use `bound='mine'`: there is no such bound."),
        (lambda: mmd_squared(draws(30), draws(30), bandwidth=0.0), "Cannot use `bandwidth=0.0`: it must be positive and finite"),
        (lambda: mmd_squared(torch.ones(30), torch.ones(30)), "Cannot choose a bandwidth for these samples: more than half"),
        (lambda: sliced_wasserstein(draws(30), draws(30), power=0.5), "Cannot use `power=0.5`: it must be at least 1"),
        (lambda: sliced_wasserstein(draws(30), draws(30), projections=1), "Cannot use `projections=1`: the spread over"),
        (lambda: sliced_wasserstein(draws(7), draws(30)), "Cannot use `x`: it has 7 rows, and 8 are needed"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (40, 70), (900, 300)])
def test_energy_distance_on_a_line_is_the_sum_over_all_pairs(n, m):
    x, y = draws(n, 1, 1), draws(m, 1, 2).round(decimals=1)
    x[: min(n, m) // 2] = y[: min(n, m) // 2]  # ties
    on_the_line, in_a_plane = energy_distance(x, y), energy_distance(*(torch.cat([z, torch.zeros_like(z)], 1) for z in (x, y)))
    assert on_the_line.value == pytest.approx(in_a_plane.value, rel=1e-12, abs=1e-12)
    assert on_the_line.stderr == pytest.approx(in_a_plane.stderr, rel=1e-9, abs=1e-12)


def test_of_very_many_rows_some_are_compared_and_a_note_says_so():
    x, y = draws(20_000, 2, 1), draws(9_000, 2, 2) + 0.3
    for distance in (energy_distance, mmd_squared):
        found = distance(x, y)
        assert any("8,000 and 8,000 rows were compared" in note for note in found.notes)
        few = distance(x[:4_000], y[:4_000])
        assert abs(found.value - few.value) < 4 * math.hypot(found.stderr, few.stderr)


def test_a_ratio_whose_mean_is_far_above_one_is_refused_however_large_its_error():
    generator = torch.Generator().manual_seed(1007)
    x, y = 1.5 * torch.randn(2_000, 1, generator=generator, dtype=D), torch.randn(2_000, 1, generator=generator, dtype=D)
    found = classifier_divergence(x, y, "forward_kl")
    note = next(note for note in found.notes if "E_q[p/q] = " in note)
    mean, _, error = note.split("E_q[p/q] = ")[1].split()[:3]
    assert float(mean) > 20 and float(mean) - 1 < 3 * float(error) and "one too far from 1" in note
    assert not found.reliable
