"""Labels: draws of a model that passed are samples, and the model times P(pass | x) is the density of the same target."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal
from torch.nn.functional import logsigmoid

import whichkl as wk


def drawn(logit, n=10_000, seed=0, dim=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return x, torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(logit(x[:, 0]))


def forward_kl(target, logit):
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    p = -grid[:, 0].square() / 2 + logsigmoid(logit(grid[:, 0]))
    p, q = (one - torch.logsumexp(one, 0) for one in (p, target.log_prob(grid)))
    return float((p.exp() * torch.where(p > -300, p - q, 0.0)).sum())


SHAPES = {
    "a slope": (lambda u: 2 * u, "the columns."),
    "a band": (lambda u: 4 - 4 * u**2, "their products."),
    "waves": (lambda u: 3 * torch.sin(3 * u), "cosines"),
    "a threshold": (lambda u: torch.where(u > 0.5, 60.0, -60.0), ""),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_density_is_the_models_times_the_probability_of_passing(name):
    logit, features = SHAPES[name]
    for seed in range(2):
        x, passed = drawn(logit, seed=seed)
        target = wk.convert(wk.Labels(draws=x, passed=passed, model=Normal(0.0, 1.0)))
        assert forward_kl(target, logit) < 0.01 and features in str(target).replace("\n    ", " ")
        assert torch.equal(target.samples, x[passed])


def test_both_accesses_describe_one_target():
    x, passed = drawn(lambda u: 2 * u)
    target = wk.convert(wk.Labels(draws=x, passed=passed, model=Normal(0.0, 1.0)))
    assert target.access.cell == "both"
    fit = wk.fit(target, "mixture:2")
    assert "accesses_disagree" not in fit.findings and "target_in_doubt" not in fit.findings
    wrong = wk.convert(wk.Labels(draws=x, passed=passed, model=Normal(1.0, 1.0)))
    assert "accesses_disagree" in wk.fit(wrong, "mixture:2").findings


def test_far_out_the_density_stays_below_the_models():
    x, passed = drawn(lambda u: 3 * torch.sin(3 * u))
    model = wk.Target.of(Normal(0.0, 1.0))
    target = wk.convert(wk.Labels(draws=x, passed=passed, model=model))
    far = torch.tensor([[-50.0], [-8.0], [8.0], [50.0]], dtype=torch.float64)
    assert bool((target.log_prob(far) <= model.log_prob(far)).all())


def test_without_a_model_the_draws_that_passed_are_all():
    x, passed = drawn(lambda u: u, n=50, dim=2)
    target = wk.convert(wk.Labels(draws=pd.DataFrame(x.numpy(), columns=["a", "b"]), passed=passed.numpy()))
    assert target.access.label == "samples" and target.names == ("a", "b") and len(target.samples) == int(passed.sum())
    assert f"{50 - int(passed.sum())} draws that failed" in str(target)


def test_several_columns_with_a_support():
    law = MultivariateNormal(torch.zeros(2), torch.eye(2))
    x, passed = drawn(lambda u: 2 * u, dim=2)
    target = wk.convert(wk.Labels(draws=x, passed=passed.int(), model=law))
    fit = wk.fit(target, objective="reverse_kl")
    # E[x₁ | pass] for P = σ(2x): by quadrature
    u = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    w = torch.softmax(-u.square() / 2 + logsigmoid(2 * u), 0)
    mean = float(w @ u)
    sd = math.sqrt(float(w @ u.square()) - mean**2)
    assert abs(float(target.samples[:, 0].mean()) - mean) < 4 * sd / math.sqrt(len(target.samples))
    assert abs(float(fit.model.mean[0]) - mean) < 0.1


X = np.random.default_rng(0).normal(size=(60, 1))
PASSED = X[:, 0] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"passed": np.zeros(60, bool)}, "no draw passed. Draw more"),
        ({"passed": np.ones(60, bool)}, "every draw passed.*Use the model as the target"),
        ({"passed": np.full(60, 0.3)}, "row 0 of `passed` is 0.3.*weights"),
        ({"passed": np.full(60, np.nan)}, "row 0 of `passed` is nan"),
        ({"passed": PASSED[:5]}, r"shape \(5,\), and there are 60 draws"),
        ({"passed": None}, "`NoneType`"),
        ({"passed": ["yes"] * 60}, "holds something else|no array of numbers|numbers"),
        ({"passed": np.arange(60) < 5, "model": Normal(0.0, 1.0)}, "5 draws passed and 55 failed.*leave `model=` out"),
        ({"model": MultivariateNormal(torch.zeros(2), torch.eye(2))}, "has 2 columns, and the draws have 1"),
        ({"model": wk.Target(samples=X)}, "no log density"),
        ({"draws": wk.Target(samples=X, weights=np.ones(60))}, "independent draws of equal weight"),
        ({"draws": Normal(0.0, 1.0)}, "independent draws of equal weight"),
    ],
)
def test_what_is_no_label_per_draw_is_refused(given, message):
    with pytest.raises(wk.InputError, match=message):
        wk.convert(wk.Labels(**{"draws": X, "passed": PASSED, **given}))


def test_labels_take_no_number_of_draws():
    with pytest.raises(wk.InputError, match="Leave it out"):
        wk.convert(wk.Labels(draws=X, passed=PASSED), n=5)
