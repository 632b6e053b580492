"""Values with mass: samples of which many rows have one and the same value have no density, and no number comes of one."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Exponential, Normal

import whichkl as wk
from whichkl.families import Gaussian, LinearGaussian, Mixture, Product
from whichkl.samples.point_masses import point_masses

N = 1000


def inflated(share, scale=1.0, seed=0, value=0.0):
    """Exponential amounts, of which a share is exactly `value`."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(N) < share, value, rng.exponential(scale, size=N))


def binary(a, b):
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


CONTINUOUS = {
    "normal": lambda rng: rng.normal(size=N),
    "two digits": lambda rng: rng.laplace(size=N).round(2),
    "one digit": lambda rng: rng.normal(size=N).round(1),
    "whole": lambda rng: rng.normal(size=N).round(),
    "counts": lambda rng: rng.poisson(3, N),
    "many zero counts": lambda rng: np.where(rng.random(N) < 0.5, 0, rng.poisson(3, N)),
    "geometric": lambda rng: rng.geometric(0.05, N),
    "drawn again": lambda rng: rng.choice(rng.normal(size=N), N),
    "heaped": lambda rng: np.where(
        rng.random(N) < 0.3, (rng.gamma(4, size=N) * 10).round(-1), (rng.gamma(4, size=N) * 10).round()
    ),
    "skewed and rounded": lambda rng: rng.exponential(size=N).round(1),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_rounded_and_counted_values_have_no_mass(name):
    for seed in range(5):
        rows = torch.as_tensor(np.asarray(CONTINUOUS[name](np.random.default_rng(seed)), dtype=float))
        assert point_masses(rows[:, None]) == {}


@pytest.mark.parametrize(("share", "digits"), [(0.02, 15), (0.3, 15), (0.9, 15), (0.3, 2), (0.9, 2)])
def test_values_with_mass_are_found(share, digits):
    rows = torch.from_numpy(np.column_stack([inflated(0.0), inflated(share, value=-1.5).round(digits)]))
    found = point_masses(rows)
    assert list(found) == [1]
    assert found[1] == {-1.5: pytest.approx(share, abs=0.05)}


def test_clipped_values_have_two_masses():
    assert set(point_masses(torch.from_numpy(np.random.default_rng(0).normal(size=(N, 1)).clip(-1, 1)))[0]) == {1.0, -1.0}


@pytest.mark.parametrize(("scale", "columns"), [(1.0, 0), (2.0, 0), (1.0, 1)])
def test_two_such_samples_are_counted_and_the_rest_is_measured(scale, columns):
    more = [np.random.default_rng(i).normal(size=(N, columns)) for i in (10, 11)]
    p, q = (np.column_stack([rows, others]) for rows, others in zip((inflated(0.5), inflated(0.3, scale, 1)), more, strict=True))
    found = wk.estimate(p=p, q=q)
    truth = binary(0.5, 0.3) + 0.5 * (math.log(scale) + 1 / scale - 1)
    assert found.method.startswith("counting in 2 cells, and nearest neighbours in 2")
    assert abs(found.value - truth) < 3 * found.stderr < 0.3


def test_a_mass_that_only_q_has_costs_its_share():
    found = wk.estimate(p=np.random.default_rng(2).exponential(size=N), q=inflated(0.5))
    assert abs(found.value - math.log(2)) < 3 * found.stderr < 0.3


def test_a_mass_that_only_p_has_is_no_number_to_rely_on():
    found = wk.estimate(p=inflated(0.5), q=np.random.default_rng(2).exponential(size=N))
    assert not found.reliable
    assert "lies on atoms that no row of q has: if q excludes them, it is infinite" in found.notes[0]


@pytest.mark.parametrize("q", [Normal(0.0, 1.0), Exponential(1.0), wk.Target(log_prob=lambda x: -x[:, 0].abs(), dim=1)])
@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys"])
def test_against_a_density_it_is_infinite(q, divergence):
    found = wk.estimate(p=inflated(0.5), q=q, divergence=divergence)
    assert (found.value, found.finite) == (math.inf, "infinite")
    assert "% of the rows are exactly 0 in `x1`, and q has a density" in found.notes[0]
    assert wk.estimate(q=inflated(0.5), p=Normal(0.0, 1.0), divergence="reverse_kl").value == math.inf


@pytest.mark.parametrize("divergence", ["jensen_shannon", "total_variation", "hellinger"])
def test_divergences_that_take_densities_report_the_mass(divergence):
    for q in (inflated(0.3, 2.0, 1), Normal(0.0, 1.0)):
        found = wk.estimate(p=inflated(0.5), q=q, divergence=divergence)
        assert not found.reliable
        assert "are exactly 0 in `x1`: this method takes rows as draws of a density" in found.notes[0]


@pytest.mark.parametrize("family", [Gaussian(), Mixture(2), Product()])
def test_a_fit_of_a_density_reports_the_mass(family):
    fit = wk.fit(inflated(0.5), family)
    assert "point_masses" in fit.findings
    assert "family_too_small" not in fit.findings
    assert not fit.value.reliable
    assert "rows are exactly 0 in `x1`, where no density has mass" in str(fit.value)
    assert fit.trust.startswith("Use neither the fit")


def test_conditional_fits_report_it_and_laws_of_counts_do_not():
    x = np.random.default_rng(1).normal(size=(N, 2))
    assert "point_masses" in wk.fit((x, inflated(0.5)), LinearGaussian()).findings
    zeros = np.where(np.random.default_rng(0).random(N) < 0.6, 0, np.random.default_rng(1).poisson(40, N))
    assert "point_masses" not in wk.fit(zeros, Product("poisson")).findings
    assert "point_masses" not in wk.fit(np.random.default_rng(0).normal(size=N).round(1), Gaussian()).findings
