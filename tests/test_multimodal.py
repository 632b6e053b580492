"""Multimodal problems: their published numbers, and both accesses telling of one target."""

import math

import pytest
import torch

import whichkl as wk
from whichkl._checks import InputError
from whichkl.problems.synthetic import gmm40_means

D = torch.float64


def mean(x):
    return float(x.mean()), float(x.std()) / math.sqrt(len(x))


def test_forty_gaussians_are_the_published_ones():
    p = wk.problems.gmm40()
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    first = ((torch.rand(40, 2) - 0.5) * 80)[0].to(D)
    torch.random.set_rng_state(state)
    torch.testing.assert_close(first, torch.tensor([-0.2995, 21.4577], dtype=D), atol=1e-4, rtol=0)
    scale = math.log1p(math.e)
    assert scale == pytest.approx(1.3133, abs=1e-4)
    assert torch.equal(gmm40_means()[0], first)
    height = float(p.log_prob(first[None]))
    assert height == pytest.approx(-math.log(40 * 2 * math.pi * scale**2), abs=0.02)
    assert float(p.log_prob(torch.tensor([[500.0, 0.0]], dtype=D))) == -math.inf
    value, stderr = mean(p.log_prob(p.draws(100_000, 0)))
    assert abs(value + 6.861) < 4 * math.hypot(stderr, 0.002)


def test_forty_gaussians_integrate_to_one():
    p = wk.problems.gmm40()
    axis = torch.arange(-60, 60, 0.25, dtype=D)
    grid = torch.cartesian_prod(axis, axis)
    assert float(p.log_prob(grid).exp().sum()) * 0.25**2 == pytest.approx(1, abs=1e-9)
    assert p.normalized


def test_many_wells_have_the_published_numbers():
    grid = torch.linspace(-5, 5, 200_001, dtype=D)
    pair = wk.problems.many_well(2)
    well = pair.log_prob(torch.stack([grid, torch.zeros_like(grid)], 1)).exp()
    log_z = math.log(float(torch.trapezoid(well, grid))) + math.log(2 * math.pi) / 2
    assert 16 * log_z == pytest.approx(164.69568, abs=1e-5)
    right = float(torch.trapezoid(well[grid > 0], grid[grid > 0]) / torch.trapezoid(well, grid))
    assert right == pytest.approx(0.8443, abs=1e-4)
    p = wk.problems.many_well(32)
    x = p.draws(50_000, 1)
    value, stderr = mean((x[:, 0::2] > 0).to(D).flatten())
    assert abs(value - right) < 4 * stderr
    value, stderr = mean(p.log_prob(x) - 16 * log_z)
    assert abs(value + 27.497) < 4 * math.hypot(stderr, 0.001)
    assert not p.normalized


@pytest.mark.parametrize("make", [wk.problems.gmm40, wk.problems.many_well])
def test_accesses(make):
    assert str(make(access="log_prob").access) == str(wk.Access.LOG_PROB | make(access="log_prob").access)
    assert make(access="log_prob").sampler is None
    assert make(access="samples").density is None
    assert torch.equal(make().draws(5, 3), make(access="samples").draws(5, 3))
    with pytest.raises(InputError, match="access='all'"):
        make(access="all")


def test_wells_come_in_pairs():
    for dim in (3, 0, True, 2.0):
        with pytest.raises(InputError, match="pairs"):
            wk.problems.many_well(dim)


def test_a_single_gaussian_on_forty_is_the_published_distance_away():
    fit = wk.fit(wk.problems.gmm40(), objective="forward_kl")
    assert abs(fit.value.value - 2.183) < 4 * fit.value.stderr + 0.01
