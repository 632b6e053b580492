"""What a fit prints: its table against closed forms, draws and other libraries, after saving too, and how long it is."""

import importlib.util
import math
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch

import whichkl as wk
from whichkl.divergences import Estimate
from whichkl.families import Gaussian, GeneralizedLinear, LinearGaussian, Mixture, Product, StudentT
from whichkl.fitting.moments import moments_of, weighted_moments
from whichkl.fitting.summary import Summary
from whichkl.goodness.draws import drawn

RNG = np.random.default_rng(0)
X = RNG.normal(size=(500, 2)) @ [[1.0, 0.6], [0.0, 1.0]]


def table(fit, **how):
    return {row["name"]: row for row in fit.summary(**how).rows}


def law_of(kind):
    positive = wk.Target(samples=np.exp(X), support="positive")
    mixed = wk.Target(
        samples=np.c_[X[:, 0], np.exp(X[:, 1]), 1 / (1 + np.exp(X[:, 0] + X[:, 1] ** 2))],
        support=["real", "greater_than(0)", "interval(-1, 3)"],
    )
    made = {
        "gaussian": lambda: wk.fit(X, judge=False),
        "positive": lambda: wk.fit(positive, judge=False),
        "negative": lambda: wk.fit(wk.Target(samples=-np.exp(X), support="less_than(1)"), judge=False),
        "mixed": lambda: wk.fit(mixed, judge=False),
        "mixture": lambda: wk.fit(wk.problems.petals(), Mixture(2), judge=False),
        "carried mixture": lambda: wk.fit(positive, Mixture(2), judge=False),
        "student": lambda: wk.fit(RNG.standard_t(6, size=(500, 2)), StudentT(), judge=False),
        "product": lambda: wk.fit(
            np.c_[RNG.gamma(2, size=500), RNG.beta(2, 3, size=500), RNG.poisson(3, 500)], Product(), judge=False
        ),
        "simplex": lambda: wk.fit(wk.Target(samples=RNG.dirichlet([2, 3, 4], 500), support="simplex"), judge=False),
    }
    return made[kind]()


@pytest.mark.parametrize(
    "kind",
    ["gaussian", "positive", "negative", "mixed", "mixture", "carried mixture", "student", "product", "simplex"],
)
def test_moments_and_intervals_are_those_of_many_draws(kind):
    """Means to 5 standard errors, and the share of draws below each end to 5 binomial errors, where columns have no atoms."""
    fit, n = law_of(kind), 200_000
    x, rows = drawn(fit.model, (n,), len(fit.names), 7), fit.summary().rows
    for i, name in enumerate(fit.names):
        row, column = rows[i], x[:, i]
        error = math.hypot(float(column.std()) / n**0.5, row.get("mcse") or 0.0)
        assert row["name"] == name and abs(row["mean"] - float(column.mean())) < 5 * error
        spread = float((column - column.mean()).square().std()) / n**0.5 / (2 * float(column.std()))
        from_draws = kind == "simplex" or (kind == "product" and i == 1)  # torch has no cdf of a beta law
        assert abs(row["sd"] - float(column.std())) < 5 * spread * (6 if from_draws else 1)
        if bool((column == column.round()).all()):
            assert float((column < row["low"]).double().mean()) <= 0.03 and float((column <= row["high"]).double().mean()) >= 0.97
            continue
        for end, level in (("low", 0.025), ("high", 0.975)):
            share = float((column <= row[end]).double().mean())
            assert abs(share - level) < 5 * (0.025 * 0.975 / (10_000 if from_draws else n)) ** 0.5


def test_what_has_no_finite_mean_shows_none():
    heavy = wk.fit(wk.Target(samples=np.exp(RNG.standard_t(8, size=(400, 2))), support="positive"), StudentT(), judge=False)
    assert all(row["mean"] == math.inf and row["sd"] == math.inf and row["high"] < math.inf for row in heavy.summary().rows)
    assert "∞" in str(heavy)
    law = StudentT().model(
        {"loc": torch.zeros(1).double(), "scale_tril": torch.eye(1).double(), "df": torch.tensor(1.0).double()}
    )
    found = moments_of(law, 1, 0)
    assert math.isnan(found.mean[0]) and found.sd[0] == math.inf
    assert found.high[0] == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)  # the quantile of Cauchy's law


def test_columns_of_p_are_those_that_expect_computes():
    """A skewed target on (0, ∞): Gamma(5, 1), whose importance weights from a log-normal are bounded in one tail only."""
    gamma = torch.distributions.Gamma(torch.tensor(5.0).double(), torch.tensor(1.0).double())
    target = wk.Target(log_prob=lambda x: gamma.log_prob(x).sum(-1), dim=2, support="positive", names=["a", "b"])
    fit = wk.fit(target, Mixture(2))
    before = dict(target.evaluations)
    rows = table(fit)
    assert dict(target.evaluations) == before
    exact = {"p_mean": 5.0, "p_sd": 5**0.5}
    for name in ("a", "b"):
        assert rows[name]["p_mcse"] > 0
        assert abs(rows[name]["p_mean"] - exact["p_mean"]) < 5 * rows[name]["p_mcse"]
        assert abs(rows[name]["p_sd"] - exact["p_sd"]) < 10 * rows[name]["p_mcse"]
        for end, level in (("p_low", 0.025), ("p_high", 0.975)):
            below = float(gamma.cdf(torch.tensor(rows[name][end]).double()))
            assert abs(below - level) < 5 * (0.025 * 0.975 / 2_000) ** 0.5
    again = table(fit, target=target)
    assert again["a"]["p_mean"] == pytest.approx(rows["a"]["p_mean"], rel=1e-9)
    assert dict(target.evaluations) != before


def test_columns_of_p_are_those_of_expect_with_the_same_draws():
    fit = wk.fit(wk.Target(log_prob=lambda x: -(x.square() / 2 + 0.01 * x**4).sum(-1), dim=2))
    rows = fit.summary().rows
    expected = fit.expect(lambda x: x, n=10_000, seed=fit.seed + 1)
    assert expected.method == "importance weights"
    assert expected.value.tolist() == pytest.approx([row["p_mean"] for row in rows], rel=1e-9)
    assert expected.stderr.tolist() == pytest.approx([row["p_mcse"] for row in rows], rel=1e-9)


def test_a_model_of_another_library_has_rows_for_its_own_variables():
    target = wk.Target(log_prob=lambda x: -(x.square() / 2 + 0.01 * x**4).sum(-1), dim=2)
    variables = {"tau": lambda u: u[:, 0].exp().numpy(), "both": lambda u: torch.stack([u, u + 1], 1).numpy()}
    target.origin = SimpleNamespace(constrain=lambda u: {name: made(u) for name, made in variables.items()})
    fit = wk.fit(target)
    rows = table(fit)
    assert list(rows) == ["tau", "both[0, 0]", "both[0, 1]", "both[1, 0]", "both[1, 1]"]
    law = torch.distributions.LogNormal(fit.model.mean[0], fit.model.variance[0].sqrt())
    assert abs(rows["tau"]["mean"] - float(law.mean)) < 5 * rows["tau"]["mcse"]
    expected = fit.expect(lambda x: x[:, 0].exp(), n=10_000, seed=fit.seed + 1)
    assert rows["tau"]["p_mean"] == pytest.approx(float(expected.value), rel=1e-9)
    assert rows["both[1, 1]"]["p_low"] == pytest.approx(rows["both[0, 1]"]["p_low"] + 1)


def test_weights_that_cannot_be_trusted_leave_a_note_and_no_columns():
    narrow = wk.fit(wk.Target(log_prob=lambda x: -2 * (1 + x.square().sum(-1)).log(), dim=2), "gaussian")
    found = narrow.summary()
    assert not any(one.startswith("p_") for one in found.columns)
    assert any("no columns for p" in one and "k̂" in one for one in found.notes)
    missing = wk.fit(wk.problems.bimodal(), objective="reverse_kl")
    assert any("misses modes" in one for one in missing.summary().notes)
    assert wk.fit(X).summary().notes == ("2.5 % to 97.5 % is the equal-tailed 95 % interval under q.",)


def test_weighted_moments_of_equal_weights_are_those_of_the_points():
    x = torch.arange(1.0, 1001.0).double()[:, None]
    found = weighted_moments(x, torch.zeros(1000).double() - math.log(1000))
    assert found.mean[0] == pytest.approx(500.5)
    assert found.low[0] in (25.0, 26.0) and found.high[0] in (975.0, 976.0)  # the ends are atoms
    assert found.mcse[0] == pytest.approx(float(x.std(correction=0)) / 1000**0.5)


def test_a_mixture_shows_its_components_in_their_order():
    fit = wk.fit(wk.problems.petals(), Mixture(2), judge=False)
    rows, model = table(fit), fit.model
    for k in (0, 1):
        for i, name in enumerate(fit.names):
            row = rows[f"{name}[{k}]"]
            assert row["weight"] == pytest.approx(float(model.mixture_distribution.probs[k]))
            assert row["mean"] == pytest.approx(float(model.component_distribution.mean[k, i]))
            assert row["sd"] == pytest.approx(float(model.component_distribution.variance[k, i].sqrt()))


def test_a_linear_model_has_the_errors_of_least_squares():
    y = 1 + X @ [2.0, -1.0] + RNG.normal(size=500)
    rows = table(wk.fit(wk.Target(samples=(X, y)), LinearGaussian()))
    design = np.c_[np.ones(500), X]
    coef, rest, *_ = np.linalg.lstsq(design, y, rcond=None)
    errors = (rest[0] / (500 - 3) * np.diag(np.linalg.inv(design.T @ design))) ** 0.5
    assert list(rows) == ["intercept", "x1", "x2"]
    assert [row["coef"] for row in rows.values()] == pytest.approx(coef.tolist())
    assert [row["stderr"] for row in rows.values()] == pytest.approx(errors.tolist())


@pytest.mark.parametrize("response", ["bernoulli", "categorical", "poisson"])
def test_a_generalised_linear_model_has_the_errors_of_its_likelihood(response):
    """The inverse of the Hessian of the negative log likelihood, by autograd, at the coefficients of the table."""
    scores = X @ [[0.8, -0.4, 0.0], [0.0, 0.5, -0.5]]
    y = {
        "bernoulli": (scores[:, 0] + RNG.logistic(size=500) > 0).astype(float),
        "categorical": (scores + RNG.gumbel(size=(500, 3))).argmax(1).astype(float),
        "poisson": RNG.poisson(np.exp(0.3 * X[:, 0] + 0.2)).astype(float),
    }[response]
    rows = list(table(wk.fit(wk.Target(samples=(X, y)), GeneralizedLinear(response))).values())
    design, seen = torch.from_numpy(np.c_[np.ones(500), X]), torch.from_numpy(y)

    def loss(flat):
        eta = design @ flat.reshape(-1, 3).T
        if response == "categorical":
            return torch.nn.functional.cross_entropy(torch.cat([torch.zeros(500, 1), eta], 1), seen.long(), reduction="sum")
        if response == "poisson":
            return (eta[:, 0].exp() - seen * eta[:, 0]).sum()
        return torch.nn.functional.binary_cross_entropy_with_logits(eta[:, 0], seen, reduction="sum")

    at = torch.tensor([row["coef"] for row in rows], dtype=torch.float64)
    assert float(torch.autograd.functional.jacobian(loss, at).abs().max()) < 1e-3
    errors = torch.linalg.inv(torch.autograd.functional.hessian(loss, at)).diagonal().sqrt()
    assert [row["stderr"] for row in rows] == pytest.approx(errors.tolist(), rel=1e-6)


def test_coefficients_without_errors_say_why():
    y = (X[:, 0] + RNG.logistic(size=500) > 0).astype(float)
    ridge = wk.fit(wk.Target(samples=(X, y)), GeneralizedLinear("bernoulli", penalty=1.0)).summary()
    assert ridge.rows[1]["stderr"] is None and "a penalty biases" in ridge.notes[0] and "–" in str(ridge)
    weighted = wk.fit(wk.Target(samples=(X, y), weights=RNG.random(500)), GeneralizedLinear("bernoulli")).summary()
    assert weighted.rows[1]["stderr"] is None and "weights" in weighted.notes[0]


@pytest.mark.parametrize("name", ["inf", "nan", "\x1b[2J", "a" * 300])
def test_a_table_survives_saving_whatever_its_columns_are_called(name, tmp_path):
    fit = wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2, names=[name, "b"]))
    fit.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    assert again.summary() == fit.summary() and str(again) == str(fit)
    assert again.summary().rows[0]["name"] == name and "p_mean" in again.summary().columns
    assert "\x1b" not in str(fit)


def test_a_summary_is_a_frame_and_plain_values():
    found = wk.fit(X).summary()
    assert found.to_dict()["rows"][0]["name"] == "x1" and found.to_dict()["columns"] == ["mean", "sd", "low", "high"]
    if importlib.util.find_spec("pandas"):
        frame = found.to_frame()
        assert list(frame.index) == ["x1", "x2"] and frame.loc["x2", "sd"] == found.rows[1]["sd"]


def test_summaries_leave_the_random_states_alone():
    fit = law_of("simplex")
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    fit.summary()
    assert torch.equal(torch.random.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_a_broken_model_is_printed_without_a_table():
    class Odd(torch.distributions.Normal):
        def sample(self, shape=()):
            raise RuntimeError("no draws")

        mean = property(lambda self: 1 / 0)

    law = Odd(torch.tensor(0.0), torch.tensor(1.0))
    fit = wk.fit(X)
    object.__setattr__(fit, "model", law)
    assert "No table" in str(fit.summary()) and "forward_kl" in str(fit)


def test_many_dimensions_print_twenty_rows_and_keep_all():
    fit = wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=300), Gaussian("diagonal"))
    found = fit.summary()
    assert len(found.rows) == 300
    assert "x20 " in str(found) and "x21 " not in str(found) and "280 more rows" in str(found)
    assert len(str(fit).splitlines()) <= 40


@pytest.mark.parametrize(
    "make",
    [
        lambda: wk.fit(X),
        lambda: wk.fit(wk.problems.eight_schools()),
        lambda: wk.fit(wk.problems.bimodal(), objective="reverse_kl"),
        lambda: wk.fit(RNG.normal(size=(400, 50))),
        lambda: wk.fit(RNG.normal(size=(400, 12)), Mixture(4)),
        lambda: wk.fit(wk.Target(log_prob=lambda x: -x.abs().sum(-1), dim=50), "gaussian:diagonal"),
    ],
)
def test_a_fit_prints_on_a_screen(make):
    fit = make()
    assert len(str(fit).splitlines()) <= 40 and max(map(len, str(fit).splitlines())) <= 120
    parts = [fit, fit.advice, fit.value, fit.target, fit.bijection, fit.summary(), *vars(fit.diagnostics).values()]
    for one in [*parts, fit.diagnostics, *fit.diagnostics.optima, fit.advice.best, fit.expect(lambda x: x, corrected=False)]:
        assert isinstance(one, (torch.Tensor, tuple, dict)) or len(repr(one)) <= 300, type(one)


def test_an_estimate_in_short_is_its_line():
    assert (
        repr(Estimate("forward_kl", 0.5, 0.01, method="Monte Carlo")) == "Estimate(forward_kl = 0.500 ± 0.010 nats (Monte Carlo))"
    )
    assert len(repr(Estimate("forward_kl", 0.5, notes=("x" * 900,), reliable=False))) <= 300


def test_a_column_of_categories_has_a_row_per_label():
    frame = pandas.DataFrame({"city": ["Rome", "Oslo", "Rome", "Lima"] * 30, "size": range(120)})
    fit = wk.fit(wk.Target(samples=frame, categories=["city"]))
    rows = {row["name"]: row for row in fit.summary().rows}
    assert list(rows) == ["city = Lima", "city = Oslo", "city = Rome", "size"]
    assert rows["city = Rome"]["mean"] == pytest.approx(0.5) and rows["city = Rome"]["sd"] is None and rows["size"]["sd"] > 0


def test_no_columns_of_p_where_the_weights_miss_the_tail_that_sets_its_variance():
    # under exp(−√|x|₁), r = |x|₁ has E r² = 7!/3! and x₁/r is uniform on (−1, 1): sd x₁ = √280 = 16.7, weights show 11 to 13
    target = wk.Target(log_prob=lambda x: -x.abs().sum(-1).sqrt(), dim=2)
    for seed in range(3):
        fit = wk.fit(target, seed=seed)
        assert fit.diagnostics.khat < 0.7  # the weights alone look reliable
        shown = [name for name, row in table(fit).items() if row.get("p_sd") is not None]
        notes = " ".join(fit.summary().notes)
        assert len(shown) < 2 and ("have a heavy tail" in notes or "p has mass where its weights hardly come" in notes)
    light = wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1) / 2 - x[:, 0].exp(), dim=2))
    assert "p_sd" in table(light)["x1"]


def test_a_saved_table_without_one_of_its_numbers_is_refused():
    with pytest.raises(ValueError, match="lacks one of its numbers"):
        Summary(("mean", "sd"), ({"name": "a", "mean": 1.0},))
