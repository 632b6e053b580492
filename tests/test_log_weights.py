"""Log weights: draws of another distribution with a density ratio are samples of the target, as far as their weights carry it."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Normal

import whichkl as wk


def drawn(n, seed=0):
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_weights_are_weights_whatever_their_constant():
    x = drawn(500)
    for shift in (0.0, 1e4, -1e4):
        target = wk.Target(samples=x, log_weights=0.5 * x[:, 0] + shift)
        weights = (0.5 * x[:, 0]).exp()
        torch.testing.assert_close(target.weights, weights / weights.max(), rtol=1e-9, atol=0)


def test_the_fit_to_weighted_draws_of_another_distribution_is_that_of_the_target():
    x, n = drawn(4000), 4000
    p, q = Normal(0.5, 0.8), Normal(0.0, 1.0)
    fit = wk.fit(wk.Target(samples=x, log_weights=(p.log_prob(x) - q.log_prob(x))[:, 0]))
    ess = float(fit.target.weights.sum() ** 2 / fit.target.weights.square().sum())
    assert abs(float(fit.model.mean) - 0.5) < 4 * 0.8 / math.sqrt(ess)
    assert "target_in_doubt" not in fit.findings
    assert f"The {n:,} weighted rows are worth" in str(fit.advice)


def test_weights_of_few_rows_put_the_target_in_doubt():
    x = drawn(1000)
    target = wk.Target(samples=x, log_weights=3 * x[:, 0].square())
    assert not target.origin.reliable and "k̂ of the weights" in target.origin.trust
    fit = wk.fit(target)
    assert "target_in_doubt" in fit.findings and not fit.value.reliable


def test_a_log_weight_of_minus_infinity_is_a_weight_of_0():
    x = drawn(100)
    logs = torch.where(x[:, 0] > 0, 0.0, -math.inf)
    target = wk.Target(samples=x, log_weights=logs)
    assert float(target.weights.sum()) == int((x > 0).sum())
    assert f"{int((x <= 0).sum())} rows have the weight 0" in str(target)
    assert wk.Target(samples=x, log_weights=[0.0] * 100).origin.left_out == ()


def test_log_weights_of_rows_that_are_left_out_are_left_out(tmp_path):
    frame = pd.DataFrame({"a": [0.0, np.nan, 2.0, 3.0], "b": [1.0, 2.0, 3.0, 5.0]})
    path = tmp_path / "x.csv"
    frame.to_csv(path, index=False)
    for samples in (frame, path):
        target = wk.Target(samples=samples, missing="drop", log_weights=[0.0, 5.0, -1.0, -2.0])
        torch.testing.assert_close(target.weights, torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64).exp())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"log_weights": [0.0, 1.0]}, r"must be \(3,\) numbers.*shape is \(2,\)"),
        ({"log_weights": [0.0, math.nan, math.inf]}, "rows 1, 2 aren't"),
        ({"log_weights": [-math.inf] * 3}, "all are -inf"),
        ({"log_weights": ["a"] * 3}, "not numbers|something else"),
        ({"log_weights": [1j, 0, 0]}, "complex"),
        ({"log_weights": [0.0] * 3, "weights": [1.0] * 3}, "`weights=` with `log_weights=`"),
        ({"log_weights": [0.0] * 3, "chains": 1}, "weighted"),
    ],
)
def test_what_is_no_log_weight_per_row_is_refused(given, message):
    with pytest.raises(wk.InputError, match=message):
        wk.Target(samples=torch.zeros(3, 1), **given)


def test_log_weights_need_samples():
    with pytest.raises(wk.InputError, match="no samples to weight"):
        wk.Target(dim=1, log_weights=[0.0])
