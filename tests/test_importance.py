"""Importance weights: the same numbers as ArviZ, and the limits."""

import math
import warnings

import numpy as np
import pytest
import scipy
import torch

import whichkl as wk
from whichkl.importance import effective_sample_size, khat_limit, pareto_smooth, tail_shape

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz as az

if hasattr(az, "psislw"):
    psislw = az.psislw
else:
    psislw = pytest.importorskip("arviz_stats").psislw


@pytest.mark.parametrize("shape", [0.1, 0.4, 0.7, 1.1])
@pytest.mark.parametrize("n", [100, 1000, 10_000])
def test_pareto_smoothing_agrees_with_arviz(shape, n):
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    log_weights = -shape * torch.log(uniform)
    smoothed, khat = pareto_smooth(log_weights)
    theirs, their_khat = psislw(log_weights.numpy())
    assert khat == pytest.approx(float(their_khat), abs=1e-6)
    torch.testing.assert_close(smoothed, torch.from_numpy(theirs), atol=1e-6, rtol=1e-6)
    assert float(smoothed.logsumexp(0)) == pytest.approx(0, abs=1e-9)


def test_effective_sample_size_by_its_definition():
    w = torch.rand(50, dtype=torch.float64)
    assert effective_sample_size(w.log() + 300) == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    assert effective_sample_size(torch.tensor([0.0, -math.inf])) == 1
    assert effective_sample_size(torch.full((3,), -math.inf)) == 0


def test_equal_and_few_weights():
    assert pareto_smooth(torch.zeros(1000))[1] == -math.inf
    assert pareto_smooth(torch.tensor([0.0, 1.0, 2.0]))[1] == math.inf
    assert khat_limit(10_000) == 0.7
    assert khat_limit(100) == pytest.approx(0.5)


def test_values_that_gather_before_a_light_tail_are_not_taken_for_a_heavy_one():
    x = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 12**-0.25
    light = (x.pow(4) - math.sqrt(3) * x.square()).sum(-1)  # with a local maximum, 0, about which three of a hundred lie
    assert pareto_smooth((light - light.median()).clamp(min=1e-300).log())[1] > 1
    assert tail_shape(light) < 0.5
    heavy = torch.distributions.Cauchy(0.0, 1.0).icdf((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    assert tail_shape(heavy) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_a_narrow_proposal_make_a_fit_unreliable_and_even_ones_do_not(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2_000, 5, generator=generator, dtype=torch.float64)
    narrow, log_weight = 0.5 * x, (1 - 0.5**2) / 2 * x.square().sum(1)
    value = wk.fit(wk.Target(samples=narrow, weights=(log_weight - log_weight.max()).exp())).value
    assert not value.reliable and any("heavy tail" in note for note in value.notes)
    for even in (torch.rand(2_000, generator=generator) + 0.5, torch.randint(1, 6, (2_000,), generator=generator)):
        assert wk.fit(wk.Target(samples=x, weights=even.double())).value.reliable


def test_rare_values_that_repeat_are_no_heavy_tail():
    for share in (0.3, 0.05, 0.005):
        p = torch.tensor([share, 0.3 - share / 2, 0.7 - share / 2], dtype=torch.float64)
        loss = -p.log()[torch.arange(3).repeat_interleave((2_000 * p).round().long())]
        jitter = 0.01 * torch.randn(len(loss), generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # as of folds
        assert tail_shape(loss) <= 0 and tail_shape(loss + jitter) <= 0.5


def test_a_heavy_tail_hardly_ever_seems_to_have_an_end():
    generator = torch.Generator().manual_seed(0)
    pareto = torch.rand(2_000, 400, generator=generator, dtype=torch.float64).pow(-0.6)  # k = 0.6
    found = sum(tail_shape(one) <= 0 for one in pareto)
    assert found <= 2_000 * 0.005


@pytest.mark.parametrize("n", [300, 1000, 5000])
def test_log_probabilities_of_counts_and_categories_have_no_heavy_tail(n):
    zipf = np.array([0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01])
    laws = {
        "poisson 3": (lambda g: g.poisson(3, n), lambda x: scipy.stats.poisson.logpmf(x, 3)),
        "poisson 0.1": (lambda g: g.poisson(0.1, n), lambda x: scipy.stats.poisson.logpmf(x, 0.1)),
        "poisson 30": (lambda g: g.poisson(30, n), lambda x: scipy.stats.poisson.logpmf(x, 30)),
        "geometric": (lambda g: g.geometric(0.3, n), lambda x: x * math.log(0.7)),
        "bernoulli": (lambda g: g.random(n) < 0.01, lambda x: np.where(x, math.log(0.01), math.log(0.99))),
        "categories": (lambda g: g.choice(8, n, p=zipf), lambda x: np.log(zipf)[x]),
        "five bits": (lambda g: g.random((n, 5)) < 0.2, lambda x: np.where(x, math.log(0.2), math.log(0.8)).sum(1)),
    }
    for name, (draw, log_q) in laws.items():
        losses = [torch.from_numpy(-log_q(draw(np.random.default_rng(seed)))) for seed in range(20)]
        assert sum(tail_shape(one) >= 0.5 for one in losses) <= 1, name
        # each fold of a cross-fit has its own log probabilities
        folds = [one * (1 + 0.01 * torch.arange(len(one)).remainder(5)) for one in losses]
        assert sum(tail_shape(one) >= 0.5 for one in folds) <= 1, name


@pytest.mark.parametrize("exponent", [1.8, 2.2])
def test_heavy_tails_of_counts_are_seen(exponent):
    """−log q grows with a count whose variance is infinite: k = 1 / (exponent − 1)."""
    shapes = [tail_shape(torch.from_numpy(np.random.default_rng(seed).zipf(exponent, 2000) * 0.5)) for seed in range(20)]
    assert sum(one >= 0.5 for one in shapes) >= 18
    assert np.median(shapes) == pytest.approx(1 / (exponent - 1), abs=0.15)
