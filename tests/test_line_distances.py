"""Energy and Wasserstein distances of densities on the line: closed forms, laws, and what isn't defined."""

import math

import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Exponential,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    Normal,
    StudentT,
    Uniform,
)

import whichkl as wk
from whichkl import Target
from whichkl.divergences.exact.line_distances import energy_distance, wasserstein

D = torch.float64


def t(value):
    return torch.tensor(value, dtype=D)


def law(kind, *parameters):
    return kind(*(t(one) for one in parameters))


def twin_normals(centre, scale):
    return MixtureSameFamily(Categorical(t([0.5, 0.5])), Normal(t([-centre, centre]), t([scale, scale])))


WASSERSTEIN = {
    "test bed": (law(Normal, 0.0, 1.0), law(Normal, 1.0, 2.0), 2.0),
    "far": (law(Normal, 0.0, 1e-3), law(Normal, 100.0, 50.0), 1e4 + (50 - 1e-3) ** 2),
    "disjoint": (law(Uniform, 0.0, 1.0), law(Uniform, 2.0, 3.0), 4.0),
    "exponential": (law(Exponential, 1.0), law(Exponential, 2.0), 0.5),
    "kinks": (law(Laplace, 0.0, 1.0), law(Laplace, 1.0, 3.0), 9.0),
    "heavy": (law(StudentT, 5.0, 0.0, 1.0), law(StudentT, 5.0, 1.0, 2.0), 1 + 5 / 3),
    "heavier": (law(StudentT, 2.5, 0.0, 1.0), law(StudentT, 2.5, 1.0, 1.0), 1.0),
    "lognormal": (law(LogNormal, 0.0, 1.0), law(LogNormal, 0.5, 1.0), (math.exp(0.5) - 1) ** 2 * math.exp(2)),
}


@pytest.mark.parametrize("name", WASSERSTEIN)
def test_wasserstein_agrees_with_the_closed_form_both_ways(name):
    p, q, truth = WASSERSTEIN[name]
    for one, other in ((p, q), (q, p)):
        estimate = wasserstein(Target.of(one), Target.of(other))
        assert estimate.exact
        assert estimate.value == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("p", "q", "truth"),
    [
        (law(Normal, 0.0, 1.0), law(Normal, 1.0, 1.0), 0.541807),
        (law(Uniform, 0.0, 1.0), law(Uniform, 2.0, 3.0), 10 / 3),
        (law(Exponential, 1.0), law(Exponential, 2.0), 1 / 6),
    ],
    ids=["test bed", "disjoint", "exponential"],
)
def test_energy_distance_agrees_with_the_truth(p, q, truth):
    estimate = energy_distance(Target.of(p), Target.of(q))
    assert estimate.exact
    assert estimate.value == pytest.approx(truth, abs=6e-7)


def test_a_gap_in_one_law_costs_nothing():
    p, q = Target.of(law(Normal, 0.0, 1.0)), Target.of(twin_normals(30.0, 0.1))
    there, back = wasserstein(p, q), wasserstein(q, p)
    assert there.exact
    assert there.value == pytest.approx(back.value, rel=1e-7)


def test_a_law_is_at_no_distance_from_itself():
    for p in (law(Beta, 0.5, 0.5), twin_normals(3.0, 1.0), law(StudentT, 3.0, 0.0, 1.0)):
        assert wasserstein(Target.of(p), Target.of(p)).value == pytest.approx(0, abs=1e-12)
        assert energy_distance(Target.of(p), Target.of(p)).value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["energy", "sliced_wasserstein"])
def test_distances_of_samples_agree_with_it(name):
    p, q = law(Normal, 0.0, 1.0), law(Normal, 1.0, 2.0)
    exact = wk.estimate(p=p, q=q, divergence=name)
    assert exact.method == "quadrature"
    assert exact.unit == "none"
    torch.manual_seed(0)
    drawn = wk.estimate(p=p.sample((4000, 1)), q=q.sample((4000, 1)), divergence=name)
    assert abs(drawn.value - exact.value) < 4 * drawn.stderr


def test_distances_scale_with_the_unit():
    def stretched(one, by):
        return Target(
            sampler=lambda n: by * one.sample((n, 1)), log_prob=lambda x: one.log_prob(x[:, 0] / by) - math.log(by), dim=1
        )

    p, q = law(Laplace, 0.0, 1.0), law(Normal, 1.0, 2.0)
    for distance, power in ((energy_distance, 1), (wasserstein, 2)):
        truth = distance(Target.of(p), Target.of(q)).value
        assert distance(stretched(p, 1e-3), stretched(q, 1e-3)).value == pytest.approx(truth * 1e-3**power, rel=1e-6)


def test_what_is_not_defined_is_refused_and_what_is_infinite_said():
    cauchy, normal = law(Cauchy, 0.0, 1.0), law(Normal, 0.0, 1.0)
    infinite = wk.estimate(p=cauchy, q=normal, divergence="sliced_wasserstein")
    assert infinite.value == math.inf
    assert "no finite moment" in infinite.notes[0]
    with pytest.raises(ValueError, match="no mean"):
        wk.estimate(p=cauchy, q=normal, divergence="energy")
    with pytest.raises(ValueError, match="neither has a finite moment"):
        wk.estimate(p=cauchy, q=law(Cauchy, 1.0, 1.0), divergence="sliced_wasserstein")
