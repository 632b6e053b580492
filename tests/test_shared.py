"""Published truths and real posteriors, if they lie next to the checkout; skipped with a reason elsewhere."""

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Beta, Categorical, Cauchy, Exponential, Laplace, Normal, Poisson, Uniform

import whichkl as wk
from whichkl._checks import TargetError

D = torch.float64


def t(value):
    return torch.tensor(float(value), dtype=D)


NAMED = {
    "Normal(0,1)": lambda: Normal(t(0), t(1)),
    "Normal(1,2)": lambda: Normal(t(1), t(2)),
    "Exponential(rate 0.2)": lambda: Exponential(t(0.2)),
    "Exponential(rate 0.4)": lambda: Exponential(t(0.4)),
    "Uniform(0,1)": lambda: Uniform(t(0), t(1)),
    "Uniform(0,2)": lambda: Uniform(t(0), t(2)),
    "Beta(1,1)": lambda: Beta(t(1), t(1)),
    "Cauchy(0,1)": lambda: Cauchy(t(0), t(1)),
    "Cauchy(1,1)": lambda: Cauchy(t(1), t(1)),
    "Laplace(0,1)": lambda: Laplace(t(0), t(1)),
    "Normal(1,1)": lambda: Normal(t(1), t(1)),
    "Uniform(2,3)": lambda: Uniform(t(2), t(3)),
    "Poisson(3)": lambda: Poisson(t(3)),
    "Poisson(5)": lambda: Poisson(t(5)),
    "Categorical(.36,.48,.16)": lambda: Categorical(torch.tensor([0.36, 0.48, 0.16], dtype=D)),
    "uniform over 3": lambda: Categorical(torch.ones(3, dtype=D) / 3),
}


KEYS = {
    "hellinger_squared": ("hellinger", {}),
    "wasserstein2_squared": ("sliced_wasserstein", {}),
    "renyi_half": ("renyi", {"order": 0.5}),
    "energy_distance": ("energy", {}),
}


def test_every_divergence_agrees_with_the_test_bed_by_every_exact_method(shared):
    """Each number by each method that takes the pair and calls itself exact, and by the automatic choice."""
    checked = {}
    for row in json.loads((shared / "testbed.json").read_text())["divergences"]:
        pair = ("Uniform(0,1)", "Uniform(2,3)") if row["p"] == "any" else (row["p"], row["q"])
        p, q = (NAMED[name]() for name in pair)
        for key, truth in row.items():
            if key in ("p", "q", "note"):
                continue
            name, knobs = KEYS.get(key, (key, {}))
            for method in (None, "closed_form", "enumeration", "quadrature"):
                try:
                    found = wk.estimate(p=p, q=q, divergence=name, method=method, **knobs)
                except TargetError as refusal:
                    assert method is not None, refusal
                    continue
                assert found.exact, (pair, key, method)
                right = found.value == math.inf if truth == "inf" else abs(found.value - truth) < 6e-7
                assert right, (pair, key, method, found)
                checked[method] = checked.get(method, 0) + 1
    assert checked[None] >= 27
    assert checked["quadrature"] >= 20
    assert checked["closed_form"] >= 12
    assert checked["enumeration"] >= 4


def test_projections_agree_with_the_test_bed(shared):
    rows = json.loads((shared / "testbed.json").read_text())["projections"]
    textbook = {"0.5 N(-3,1) + 0.5 N(3,1)": (3, 0.5), "0.5 N(-2,1) + 0.5 N(2,1)": (2, 0.5), "0.7 N(-3,1) + 0.3 N(3,1)": (3, 0.7)}
    seen = 0
    for row in rows:
        if row["p"] not in textbook:
            continue
        seen += 1
        p = wk.problems.bimodal(*textbook[row["p"]])
        forward, reverse = wk.fit(p, objective="forward_kl"), wk.fit(p, objective="reverse_kl")
        assert float(forward.model.variance) == pytest.approx(row["forward"]["variance"], abs=1e-9)
        assert forward.value.value == pytest.approx(row["forward"]["forward_kl"], abs=6e-7)
        optima = sorted(reverse.diagnostics.optima, key=lambda o: float(o.model.mean))
        for found, truth in zip(optima, sorted(row["reverse_optima"], key=lambda o: o["mean"]), strict=True):
            assert float(found.model.mean) == pytest.approx(truth["mean"], abs=6e-6)
            assert float(found.model.variance.sqrt()) == pytest.approx(truth["sd"], abs=6e-6)
            assert found.loss == pytest.approx(truth["reverse_kl"], abs=6e-7)
    assert seen == 3


def test_eight_schools_is_the_published_posterior(shared):
    file = np.load(shared / "posteriors" / "eight_schools-noncentered.npz")
    points, values = torch.from_numpy(file["logp_check_x"]), torch.from_numpy(file["logp_check"])
    constant = wk.problems.eight_schools().log_prob(points) - values
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=0, atol=1e-8)


def test_eight_schools_fit_lies_near_the_reference_draws(shared):
    file = np.load(shared / "posteriors" / "eight_schools-noncentered.npz")
    fit = wk.fit(wk.problems.eight_schools())
    mean, sd = (torch.from_numpy(file[name]) for name in ("mean", "sd"))
    assert float(((fit.model.mean - mean) / sd).abs().max()) < 0.15
    moments = wk.fit(file["draws"]).model
    # reverse KL is what was minimised: no other Gaussian, the moment match included, has a better ELBO
    x = fit.model.sample((20_000,))
    y = moments.sample((20_000,))
    target = wk.problems.eight_schools()
    elbo = float((target.log_prob(x) - fit.model.log_prob(x)).mean())
    assert elbo > float((target.log_prob(y) - moments.log_prob(y)).mean())
