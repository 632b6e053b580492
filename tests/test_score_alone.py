"""A target known by its score alone: log p up to a constant by line integrals, and what isn't a gradient is refused."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Gamma, MultivariateNormal, StudentT

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.families import Gaussian, Mixture
from whichkl.targets.line_integral import LineIntegral, clenshaw_curtis

D = torch.float64


def score_of(log_prob):
    def score(x):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            return torch.autograd.grad(log_prob(x).sum(), x)[0]

    return score


def integral(score, dim, anchor=0.0):
    counted = []
    return LineIntegral(score, torch.full((1, dim), anchor, dtype=D), counted.append), counted


@pytest.mark.parametrize("order", [4, 8, 16, 32])
def test_the_rule_is_exact_for_polynomials_up_to_its_order_and_nested(order):
    t, w = clenshaw_curtis(order)
    for k in range(order + 1):
        assert float(w @ t**k) == pytest.approx(1 / (k + 1), abs=1e-14)
    if order > 4:
        torch.testing.assert_close(t[::2], clenshaw_curtis(order // 2)[0], rtol=0, atol=1e-16)


SMOOTH = {
    "quartic": lambda x: -x.pow(4).sum(-1) + 6 * x.square().sum(-1) + x[:, 0] / 2,
    "student": lambda x: StudentT(torch.tensor(3.0, dtype=D)).log_prob(x).sum(-1),
    "waves": lambda x: torch.sin(20 * x).sum(-1) - x.square().sum(-1),
    "narrow": lambda x: -((x - 50) / 0.01).square().sum(-1) / 2,
    "eight schools": lambda x: wk.problems.eight_schools().log_prob(torch.cat([x, x, x, x, x], -1)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_line_integrals_are_differences_of_the_log_density(name):
    f = SMOOTH[name]
    value, _ = integral(score_of(f), 2, 0.3)
    x = 5 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    truth = f(x) - f(torch.full((1, 2), 0.3, dtype=D))
    torch.testing.assert_close(value(x), truth, rtol=1e-7, atol=1e-7)
    assert value.gap < 1e-6 * float(truth.abs().max())
    assert not value.is_open or name == "narrow"


def test_kinks_are_found_by_halving():
    value, counted = integral(lambda x: -x.sign(), 1, -0.3)
    x = torch.tensor([[1.0], [5.0], [-2.0]], dtype=D)
    torch.testing.assert_close(value(x), 0.3 - x[:, 0].abs(), rtol=0, atol=1e-3)
    assert sum(counted) < 6_000


def test_a_quadratic_costs_nine_scores_a_point():
    value, counted = integral(lambda x: -x, 3)
    value(torch.randn(2, 3, dtype=D))
    assert sum(counted) == 2 * 9


def rotated(angle):
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=D)
    return lambda x: -x @ turn.T


def test_a_score_that_is_no_gradient_is_refused_and_one_that_nearly_is_one_is_said():
    with pytest.raises(TargetError, match=r"is the gradient of no log density.*Check its signs"):
        wk.fit(wk.Target(score=rotated(0.5), dim=2))
    assert "score_not_conservative" in wk.fit(wk.Target(score=rotated(0.01), dim=2)).findings
    assert "score_not_conservative" not in wk.fit(wk.Target(score=rotated(0.0), dim=2)).findings


def test_the_fit_is_that_of_the_log_density():
    by_value = wk.fit(wk.problems.eight_schools())
    target = wk.Target(score=score_of(wk.problems.eight_schools().log_prob), dim=10)
    by_score = wk.fit(target)
    torch.testing.assert_close(by_score.model.mean, by_value.model.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_score.model.covariance_matrix, by_value.model.covariance_matrix, rtol=1e-4, atol=1e-5)
    assert by_score.value.up_to == "log_z"
    assert by_score.status == "converged"
    assert target.evaluations["log_prob"] == 0
    assert target.evaluations["score"] > 1000
    assert by_score.diagnostics.ess == pytest.approx(by_value.diagnostics.ess, rel=1e-3)


@pytest.mark.parametrize("family", [Gaussian("diagonal"), Mixture(2)], ids=str)
def test_every_family_by_reverse_kl_takes_a_score(family):
    p = MultivariateNormal(torch.tensor([1.0, -2.0], dtype=D), torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=D))
    fit = wk.fit(wk.Target(score=score_of(p.log_prob), dim=2), family)
    torch.testing.assert_close(fit.model.mean, p.mean, rtol=0, atol=0.05)


def test_supports_arrays_and_single_points():
    gamma = wk.fit(wk.Target(score=lambda x: 3 / x - 2, dim=1, support="positive"))
    draws = gamma.model.sample((100_000,))
    truth = Gamma(torch.tensor(4.0), torch.tensor(2.0))
    assert float(draws.min()) > 0
    assert float(draws.mean()) == pytest.approx(float(truth.mean), abs=0.05)
    array = wk.fit(wk.Target(score=lambda x: -np.asarray(x), dim=2, batched=False))
    torch.testing.assert_close(array.model.covariance_matrix, torch.eye(2, dtype=D), rtol=0, atol=1e-9)


BAD = [
    (lambda x: x.sum(-1), TargetError, r"`score` returned shape \(1,\) for points of shape \(1, 2\)"),
    (lambda x: -x * math.nan, TargetError, "NaN"),
    (lambda x: x.nothing, TargetError, "it raised AttributeError"),
]


@pytest.mark.parametrize(("score", "kind", "message"), BAD)
def test_bad_scores(score, kind, message):
    with pytest.raises(kind, match=message):
        wk.fit(wk.Target(score=score, dim=2))


def test_a_score_needs_a_dimension():
    with pytest.raises(InputError, match="Pass `dim=`"):
        wk.Target(score=lambda x: -x)


def test_samples_beside_a_score_are_held_against_it():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    assert "accesses_disagree" not in wk.fit(wk.Target(samples=x, score=lambda x: -x)).findings
    assert "accesses_disagree" in wk.fit(wk.Target(samples=x, score=lambda x: -4 * x)).findings


@pytest.mark.parametrize("batched", [True, False])
def test_a_score_in_jax_is_compiled_in_double_precision(batched):
    pytest.importorskip("jax", reason="JAX isn't installed")
    import jax.numpy as jnp

    target = wk.Target(score=lambda x: -(jnp.asarray(x) - 1 / 3), dim=2, batched=batched)
    assert float((wk.fit(target).model.mean - 1 / 3).abs().max()) < 1e-12
