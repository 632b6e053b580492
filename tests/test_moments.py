"""Moments: the nearest distribution to a reference that has them, against closed forms and against SciPy."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import brentq, minimize
from torch.distributions import Exponential, Gamma, LogNormal, MultivariateNormal, Normal

import whichkl as wk

EXACT = 1e-8


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


def identity(x):
    return x


def squares(x):
    return torch.stack([x[:, 0], x[:, 0] ** 2], 1)


def multiplier(target):
    return target.origin.multipliers[0]


@pytest.mark.parametrize("given", [{"reference": torch.arange(1.0, 7.0)}, {"support": "integer_interval(1, 6)"}])
def test_a_loaded_die(given):
    """Jaynes's die: q_i ∝ e^{λ i} with mean 4.5."""
    faces = np.arange(1, 7)
    true = brentq(lambda t: (faces * np.exp(t * faces)).sum() / np.exp(t * faces).sum() - 4.5, 0, 1, xtol=1e-14)
    die = wk.convert(wk.Moments(of=identity, values=4.5, **given))
    assert abs(multiplier(die) - true) < EXACT
    w = torch.from_numpy(np.exp(true * faces)) / np.exp(true * faces).sum()
    found = die.weights / die.weights.sum() if die.samples is not None else die.log_prob(die.atoms[0]).exp()
    torch.testing.assert_close(found.double(), w, rtol=0, atol=EXACT)
    assert abs(die.origin.kl - float((w * (6 * w).log()).sum())) < EXACT


def test_a_truncated_exponential():
    """On [0, 1] with mean m: q ∝ e^{λx}, m = 1/(1 − e^{−λ}) − 1/λ."""
    target = wk.convert(wk.Moments(of=identity, values=0.3, support="unit_interval"))
    true = brentq(lambda t: 1 / -math.expm1(-t) - 1 / t - 0.3, -10, -1e-3, xtol=1e-14)
    assert abs(multiplier(target) - true) < EXACT
    x = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)[:, None]
    log_p = true * x[:, 0] - math.log(math.expm1(true) / true)
    torch.testing.assert_close(target.log_prob(x), log_p, rtol=0, atol=EXACT)
    assert target.normalized and "uniform on the support" in str(target)


@pytest.mark.parametrize(
    ("reference", "of"),
    [
        (Normal(0.0, 1.0), squares),
        (wk.Target(log_prob=lambda x: -(x[:, 0] ** 2) / 2, dim=1), squares),
        (wk.Target(log_prob=lambda x: -(x[:, 0] ** 2) / 2 + 7, dim=1), lambda x: np.stack([x[:, 0], x[:, 0] ** 2], 1)),
    ],
    ids=["law", "log density", "function of arrays"],
)
def test_a_normal_law_becomes_the_normal_law_with_these_moments(reference, of):
    target = wk.convert(wk.Moments(of=of, values=[0.7, 0.49 + 0.5], reference=reference))
    x = torch.linspace(-3, 4, 15, dtype=torch.float64)[:, None]
    q = Normal(wide(0.7)[0], wide(0.5).sqrt()[0])
    torch.testing.assert_close(target.log_prob(x), q.log_prob(x[:, 0]), rtol=0, atol=EXACT)
    np.testing.assert_allclose(target.origin.multipliers, [1.4, -0.5], atol=EXACT)
    assert abs(target.origin.kl - float(torch.distributions.kl_divergence(q, Normal(wide(0)[0], wide(1)[0])))) < EXACT
    assert (target.samples is not None) == isinstance(reference, Normal)


def test_moments_far_from_the_reference_are_reached_in_steps():
    target = wk.convert(wk.Moments(of=squares, values=[7.0, 49.01], reference=Normal(0.0, 1.0)))
    np.testing.assert_allclose(target.origin.multipliers, [700, -49.5], rtol=EXACT)
    assert target.samples is None and "draws of the reference" in target.origin.left_out[0] and target.origin.reliable


def test_two_variables_and_a_correlation():
    of = lambda x: torch.cat([x, x**2, x[:, :1] * x[:, 1:]], 1)  # noqa: E731
    q = MultivariateNormal(wide(0.5, -0.2), torch.tensor([[1.2, 0.5], [0.5, 0.8]], dtype=torch.float64))
    m = [0.5, -0.2, 1.2 + 0.25, 0.8 + 0.04, 0.5 - 0.1]
    target = wk.convert(wk.Moments(of=of, values=m, reference=MultivariateNormal(torch.zeros(2), torch.eye(2))))
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(target.log_prob(x), q.log_prob(x), rtol=0, atol=1e-6)
    fit = wk.fit(target, objective="reverse_kl")
    torch.testing.assert_close(fit.model.mean, q.mean, atol=1e-3, rtol=0)
    assert fit.value.value < 1e-4 and "accesses_disagree" not in fit.findings


def frames(n=800, k=4, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, k))
    return np.c_[x[:, :2], np.tanh(x[:, 2]), x[:, 0] * x[:, 3]]


def test_weighted_draws_have_the_moments_and_the_least_kl_of_scipy():
    f = frames()
    m = f.mean(0) + [0.3, -0.2, 0.1, 0.2]
    target = wk.convert(wk.Moments(of=f, values=m, reference=f))
    w = (target.weights / target.weights.sum()).numpy()
    np.testing.assert_allclose(w @ f, m, atol=1e-9)

    def dual(t):
        logs = (f - m) @ t
        top = logs.max()
        q = np.exp(logs - top)
        return top + np.log(q.mean()), (f - m).T @ (q / q.sum())

    other = minimize(dual, np.zeros(4), jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-10})
    np.testing.assert_allclose(target.origin.multipliers, other.x, atol=1e-6)
    assert abs(target.origin.kl + other.fun) < 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_every_mean_under_weights_of_the_draws_is_met_whatever_the_units_and_the_tails(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(50, 3000)), int(rng.integers(1, 20))
    f = rng.normal(size=(n, k)) @ rng.normal(size=(k, k))
    f = np.exp(6 * f / np.abs(f).max()) if seed % 3 == 0 else f
    f[:, -1] += (f[:, 0] + 1e-6 * rng.normal(size=n) - f[:, -1]) * (seed % 4 == 0)  # nearly dependent
    f = (f + 10 * rng.normal(size=k)) * 10.0 ** rng.integers(-8, 8, size=k)
    w = rng.random(n) ** rng.integers(1, 12)
    m = (w / w.sum()) @ f
    target = wk.convert(wk.Moments(of=f, values=m, reference=np.arange(float(n))))
    q = (target.weights / target.weights.sum()).numpy()
    assert np.abs((q @ f - m) / f.std(0)).max() < 1e-8


def test_weights_of_the_reference_are_kept():
    f = frames()
    w = np.exp(f[:, 0])
    target = wk.convert(wk.Moments(of=f[:, 1:2], values=0.4, reference=wk.Target(samples=f, weights=w)))
    ratio = np.log(target.weights.numpy()) - np.log(w) - multiplier(target) * f[:, 1]
    assert np.ptp(ratio) < 1e-9


def test_values_with_errors_are_met_up_to_them():
    """r = N(0, 1), f = x: q = N(λ, 1), and λ − m + s² λ = 0."""
    target = wk.convert(wk.Moments(of=identity, values=3.0, stderr=0.5, reference=Normal(0.0, 1.0)))
    assert abs(multiplier(target) - 3 / 1.25) < EXACT
    beyond = wk.convert(wk.Moments(of=frames()[:, 2:3], values=1.5, stderr=0.2, reference=frames()))
    assert "standard error" in str(beyond)


@pytest.mark.parametrize("seed", range(20))
def test_moments_beyond_the_draws_are_refused_with_the_range_that_can_be_had(seed):
    rng = np.random.default_rng(seed)
    f = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
    along = rng.normal(size=5)
    outside = f.mean(0) + along * (1.0 + rng.random()) * np.ptp((f - f.mean(0)) @ along) / (along @ along)
    with pytest.raises(wk.TargetError, match=r"moment `f\d` is .* the draws of the reference allow .* to "):
        wk.convert(wk.Moments(of=f, values=outside, reference=f))


@pytest.mark.parametrize(
    ("f", "values", "message"),
    [
        (np.arange(6.0)[:, None], 7.0, "moment `f1` is 7, and the draws of the reference allow 0 to 5"),
        (np.arange(6.0)[:, None], 5.0, "allow 0 to 5, both ends excluded"),
        (np.c_[np.arange(6.0), np.arange(6.0) ** 2], [2.5, 5.0], "moment `f2` is 5, .* 6.5 to 12.5 given the other moments"),
        (np.c_[np.arange(6.0), np.ones(6)], [2.5, 2.0], "moment `f2` is 2, .* allow 1 to 1"),
        (pd.DataFrame({"a": np.arange(6.0), "a^2": np.arange(6.0) ** 2}), [2.5, 5.0], r"moment `a\^2` is 5"),
    ],
)
def test_the_refusal_names_the_moment_and_its_range(f, values, message):
    with pytest.raises(wk.TargetError, match=message):
        wk.convert(wk.Moments(of=f, values=values, reference=np.arange(6.0)))


def test_moments_that_repeat_each_other_do_no_harm():
    f = np.c_[np.arange(6.0), 2 * np.arange(6.0) + 1, np.ones(6)]
    target = wk.convert(wk.Moments(of=f, values=[3.5, 8.0, 1.0], reference=np.arange(6.0)))
    assert abs(float(target.weights @ target.samples[:, 0] / target.weights.sum()) - 3.5) < 1e-9
    with pytest.raises(wk.TargetError, match="given the other moments|allow"):
        wk.convert(wk.Moments(of=f, values=[3.5, 8.1, 1.0], reference=np.arange(6.0)))


@pytest.mark.parametrize(
    ("reference", "values", "message"),
    [
        (Normal(0.0, 1.0), [0.7, 0.4], r"moment `f2` is 0.4, and the support of the reference allows 0\.49\S* to ∞"),
        (Exponential(1.0), [-1.0, 2.0], "moment `f1` is -1"),
        (LogNormal(0.0, 1.0), [3.0, 30.0], "no finite integral"),
    ],
)
def test_moments_that_no_density_near_the_reference_has_are_refused(reference, values, message):
    with pytest.raises(wk.TargetError, match=message):
        wk.convert(wk.Moments(of=squares, values=values, reference=reference))


def test_few_effective_draws_are_not_reliable():
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = wk.convert(wk.Moments(of=x, values=[1.7, 1.7], reference=x))
    assert not target.origin.reliable and "Below 10 %" in target.origin.trust
    assert "target_in_doubt" in wk.fit(target).findings


def test_a_reference_of_many_variables_lends_its_draws_or_is_drawn_from():
    of = lambda x: x.sum(1)  # noqa: E731
    law = MultivariateNormal(torch.zeros(5), torch.eye(5))
    for reference in (law, wk.Target(log_prob=lambda x: -(x**2).sum(1) / 2, dim=5)):
        target = wk.convert(wk.Moments(of=of, values=1.0, reference=reference), n=4000)
        assert abs(multiplier(target) - 0.2) < 5 / math.sqrt(5 * 2000)  # λ = 1/5; its error is that of a mean over √5
        assert target.density is not None and "λ rests on these rows" in target.origin.trust
        assert (target.samples is None) == (reference is not law)


@pytest.mark.parametrize("has_sampler", [True, False])
@pytest.mark.parametrize("stderr", [None, [0.2, 0.5]])
def test_errors_of_the_multipliers_and_of_what_rests_on_them_are_those_of_other_seeds(has_sampler, stderr):
    cov = torch.eye(4, dtype=torch.float64)
    cov[0, 1] = cov[1, 0] = 0.5
    law = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), cov)
    square = torch.zeros(2, dtype=torch.float64) if stderr is None else torch.tensor(stderr, dtype=torch.float64).square()
    m = torch.tensor([0.5, 0.5], dtype=torch.float64)
    exact = torch.linalg.solve(cov[:2, :2] + torch.diag(square), m)
    kl = float(exact @ cov[:2, :2] @ exact) / 2
    off = []
    for seed in range(24):
        reference = law if has_sampler else wk.Target(log_prob=law.log_prob, dim=4)
        moments = wk.Moments(of=lambda x: x[:, :2], values=m, stderr=stderr, reference=reference)
        origin = wk.convert(moments, n=1_000, seed=seed).origin
        off.append([(origin.multipliers[0] - exact[0]) / origin.multipliers_stderr[0], (origin.kl - kl) / origin.kl_stderr])
    assert bool((torch.tensor(off, dtype=torch.float64).square().mean(0).sqrt() - 1).abs().max() < 0.4)


def test_a_value_that_rests_on_the_integral_of_a_converted_density_has_the_error_of_lambda():
    law = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    reference = wk.Target(log_prob=law.log_prob, dim=4)
    target = wk.convert(wk.Moments(of=lambda x: x[:, 0], values=0.5, reference=reference))
    value = wk.fit(target).value
    assert 0.002 < value.stderr < 0.02
    assert abs(value.value + 0.125) < 4 * value.stderr
    assert " ± " in target.origin.trust
    line = wk.convert(wk.Moments(of=lambda x: x[:, 0], values=0.5, reference=torch.distributions.Normal(0.0, 1.0)))
    assert line.origin.multipliers_stderr == (0.0,) and line.origin.log_z_stderr == 0


def test_draws_of_chains_are_thinned():
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(1, len(x)):
        x[i] = 0.9 * x[i - 1] + math.sqrt(1 - 0.81) * x[i]
    target = wk.convert(wk.Moments(of=squares(x), values=[0.1, 1.0], reference=wk.Target(samples=x, chains=1)))
    assert len(target.samples) < 1000 and "row of each chain" in str(target)


def test_the_result_has_the_names_and_the_support_of_the_reference():
    rates = wk.Target(samples=np.abs(frames()[:, :2]), names=["a", "b"], support="positive")
    target = wk.convert(wk.Moments(of=lambda x: x, values=[0.7, 0.9], reference=rates))
    assert target.names == ("a", "b") and target.bijection.bounds == [(0, math.inf)] * 2
    gamma = wk.convert(wk.Moments(of=lambda x: x, values=3.0, reference=Gamma(2.0, 1.0)))
    x = torch.linspace(0.1, 9, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(gamma.log_prob(x), Gamma(wide(2)[0], wide(2 / 3)[0]).log_prob(x[:, 0]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"of": identity, "values": 1.0}, "neither a reference nor a bounded support"),
        ({"of": identity, "values": 1.0, "support": "positive"}, "no bounds on both sides"),
        ({"of": identity, "values": 1.0, "support": "simplex"}, "no bounds on both sides"),
        ({"of": identity, "values": 1.0, "support": "unit_interval", "reference": frames()}, "the reference has its own"),
        ({"of": None, "values": 1.0, "reference": frames()}, "`of` is None"),
        ({"of": identity, "values": "x", "reference": frames()}, "`values`.*a `str`"),
        ({"of": identity, "values": [1.0, math.nan], "reference": frames()}, "number 1 is nan"),
        ({"of": identity, "values": [1.0], "reference": frames()}, "4 columns, and `values` has 1 number"),
        ({"of": identity, "values": [1.0] * 4, "stderr": -1.0, "reference": frames()}, "below 0"),
        ({"of": identity, "values": [1.0] * 4, "stderr": [1.0] * 3, "reference": frames()}, "3 standard errors"),
        ({"of": frames()[:5], "values": [0.0] * 4, "reference": frames()}, "5 rows of `of`, and the reference has 800"),
        ({"of": frames(), "values": [0.0] * 4, "reference": Normal(0.0, 1.0)}, "none of its own"),
        ({"of": lambda x: x * math.nan, "values": [0.0] * 4, "reference": frames()}, "isn't finite"),
        ({"of": lambda x: x[:3], "values": [0.0] * 4, "reference": frames()}, r"shape \(3, 4\)"),
        ({"of": lambda x: 1 / 0, "values": [0.0] * 4, "reference": frames()}, "ZeroDivisionError"),
        (
            {
                "of": lambda x: x.sum(1),
                "values": 9.0,
                "reference": wk.Target(log_prob=lambda x: 0 * x.sum(1), dim=20, support="boolean"),
            },
            "more than 65,536 states, and no draws",
        ),
        ({"of": identity, "values": 1.0, "reference": wk.Target(dim=1)}, "neither draws nor a density"),
        ({"of": identity, "values": 1.0, "reference": wk.Target(samples=(frames(), frames()))}, "conditional"),
    ],
)
def test_what_is_no_moment_or_no_reference_is_refused(given, message):
    with pytest.raises(wk.InputError, match=message):
        wk.convert(wk.Moments(**given))


def test_n_is_a_number_of_draws():
    assert len(wk.convert(wk.Moments(of=identity, values=0.2, reference=Normal(0.0, 1.0)), n=500).samples) == 500
    with pytest.raises(wk.InputError, match="whole number of at least 2"):
        wk.convert(wk.Moments(of=identity, values=0.2, reference=Normal(0.0, 1.0)), n=1)


def test_a_covariance_of_the_errors_is_had_by_turning_the_moments():
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) @ root.T
    f, m = x[:, :2], torch.tensor([0.5, -0.3], dtype=torch.float64)
    errors = torch.tensor([[0.010, 0.012], [0.012, 0.040]], dtype=torch.float64)
    squares, turn = torch.linalg.eigh(errors)
    found = wk.convert(wk.Moments(of=f @ turn, values=m @ turn, stderr=squares.sqrt(), reference=x))
    weights = found.weights / found.weights.sum()
    multipliers = torch.tensor(found.origin.multipliers, dtype=torch.float64) @ turn.T
    torch.testing.assert_close(errors @ multipliers, m - weights @ f, rtol=1e-6, atol=1e-9)
    with pytest.raises(wk.InputError, match=r"shape \(2, 2\).*turn the moments"):
        wk.Moments(of=f, values=m, stderr=errors, reference=x)


@pytest.mark.parametrize("count", [1, 3])
def test_a_table_of_another_width_than_the_values_is_refused_as_such(count):
    frame = pd.DataFrame({"income": [1.0, 2.0, 3.0], "hours": [1.0, 0.0, 2.0]})
    with pytest.raises(wk.InputError, match=rf"`of` has 2 columns, and `values` has {count} number"):
        wk.Moments(of=frame, values=[1.0] * count, reference=frame)
