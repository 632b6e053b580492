"""Families with closed forms: laws over all of them, agreement with other libraries, and messages about bad input."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import FactorAnalysis
from sklearn.linear_model import LinearRegression
from torch.distributions import Gamma, Independent, LowRankMultivariateNormal, MultivariateNormal, kl_divergence

from whichkl import Target, estimate, fit
from whichkl._checks import InputError
from whichkl.families import (
    Categorical,
    Gaussian,
    LinearGaussian,
    Mixture,
    MixtureDensityNetwork,
    Product,
    StudentT,
    family_from_config,
    richer,
    simpler,
)
from whichkl.families.family import cast, log_likelihood
from whichkl.families.margins import _gamma_shape, _log_minus_digamma
from whichkl.families.product import MARGINS
from whichkl.samples import Block, Stream
from whichkl.samples import stream as streams
from whichkl.solvers import ClosedForm
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.rows.closed_form import weighted_medians
from whichkl.solvers.rows.rows import Rows

D = torch.float64


def data(seed=0, n=300):
    """A column for each margin, in the order of NAMED."""
    g = np.random.default_rng(seed)
    real = [
        g.normal(3, 2, n),
        g.laplace(-1, 2, n),
        g.exponential(3, n),
        g.gamma(2.5, 2, n),
        g.lognormal(1, 0.7, n),
        g.beta(0.7, 3, n),
    ]
    whole = [g.integers(0, 2, n), g.poisson(4, n), g.integers(0, 5, n)]
    return torch.tensor(np.column_stack(real + whole), dtype=D)


NAMED = ("normal", "laplace", "exponential", "gamma", "lognormal", "beta", "bernoulli", "poisson", "categorical")
CORRELATED = data()[:, :6] @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=D) + 5
G = torch.Generator().manual_seed(2)
LOADINGS = torch.tensor([[1.0, 2, -1, 0.5, 0, 3], [0, 1, 1, -2, 1, 0]], dtype=D)
FACTORED = torch.randn(300, 2, generator=G, dtype=D) @ LOADINGS + torch.randn(300, 6, generator=G, dtype=D)
PAIRED = CORRELATED[:, :2], CORRELATED[:, 2:4]
FITS = {
    "full": (Gaussian(), CORRELATED, None),
    "diagonal": (Gaussian("diagonal"), CORRELATED, None),
    "low_rank": (Gaussian("low_rank", rank=2), FACTORED, None),
    "categorical": (Categorical(), data()[:, 8:], None),
    "smoothed": (Categorical(categories=7, smoothing=0.5), data()[:, 8:], None),
    "product": (Product(NAMED), data(), None),
    "normals": (Product("normal"), CORRELATED, None),
    "linear": (LinearGaussian(), *PAIRED),
    "linear_diagonal": (LinearGaussian("diagonal"), *PAIRED),
    "linear_line": (LinearGaussian(), PAIRED[0][:, :1], PAIRED[1]),
}
EACH = pytest.mark.parametrize("name", FITS)


def target(name, keep=slice(None)):
    family, y, x = FITS[name]
    return family, Target(samples=y[keep] if x is None else (x[keep], y[keep]))


def solve(name, stride=0):
    family, p = target(name)
    return family, ClosedForm().solve(p, family, 0, stride=stride)


def maximum_likelihood(family, x, **more):
    return ClosedForm().solve(Target(samples=x, **more), family, 0).best.model


class Pieces(Stream):
    """Rows in memory, given as a stream."""

    def __init__(self, x, context=None):
        self.names = tuple(f"x{i + 1}" for i in range(x.shape[1]))
        self.context_names = () if context is None else tuple(f"z{i + 1}" for i in range(context.shape[1]))
        self._parts = streams.slices(Block(x, torch.ones(len(x), dtype=x.dtype), context))

    @property
    def parts(self):
        return self._parts

    @property
    def rows(self):
        return None


# ---- laws


@EACH
def test_parameters_say_the_model(name):
    family, solution = solve(name)
    model, (_, y, x) = solution.best.model, FITS[name]
    again = family.model(family.parameters(model))
    torch.testing.assert_close(log_likelihood(again, y, x), log_likelihood(model, y, x))
    torch.testing.assert_close(log_likelihood(pickle.loads(pickle.dumps(model)), y, x), log_likelihood(model, y, x))  # noqa: S301
    narrow = cast(family, model, torch.float32, torch.device("cpu"))
    assert all(value.dtype == torch.float32 for value in family.parameters(narrow).values())
    assert str(model) == str(again)
    assert float(-log_likelihood(model, y, x).mean()) == pytest.approx(solution.best.loss, rel=1e-12)


@EACH
def test_configuration_says_the_family(name):
    family = FITS[name][0]
    again = family_from_config(json.loads(json.dumps(family.config())))
    assert again == family
    assert str(again) == str(family)
    assert family.label


@EACH
@pytest.mark.parametrize("stride", [0, 5])
def test_a_stream_of_small_parts_gives_the_same_as_rows_in_memory(name, stride, monkeypatch):
    family, whole = solve(name)
    monkeypatch.setattr(streams, "PART", 70)
    monkeypatch.setattr(streams, "BLOCK", 23)
    _, y, x = FITS[name]
    stream = ClosedForm().solve(Target(samples=Pieces(y, x)), family, 0, stride=stride)
    for key, value in family.parameters(whole.best.model).items():
        torch.testing.assert_close(family.parameters(stream.best.model)[key], value, rtol=1e-6, atol=1e-7)
    assert (stream.held is None) == (stride == 0)


@EACH
def test_the_model_without_the_rows_held_out_is_that_of_the_other_rows(name):
    family, solution = solve(name, stride=4)
    _, y, x = FITS[name]
    held = solution.held.block
    is_held = (y[:, None] == held.x[None]).all(-1).any(1)
    if y.shape[1] > 1:
        assert int(is_held.sum()) == len(held) < len(y) / 2
        other = ClosedForm().solve(target(name, ~is_held)[1], family, 0).best.model
        for key, value in family.parameters(solution.held.model).items():
            torch.testing.assert_close(value, family.parameters(other)[key], rtol=1e-6, atol=1e-8)
    assert not math.isnan(float(log_likelihood(solution.held.model, held.x, held.context).sum()))


@pytest.mark.parametrize("name", [name for name in FITS if name != "smoothed"])
def test_no_model_nearby_is_likelier(name):
    family, solution = solve(name)
    _, y, x = FITS[name]
    best, parameters = solution.best.loss, family.parameters(solution.best.model)
    for key, value in parameters.items():
        for where in [tuple(at) for at in value.nonzero().tolist()]:
            step = 1e-4 * max(1e-3, abs(float(value[where])))
            sides = []
            for sign in (-1, 1):
                moved = value.clone()
                moved[where] += sign * step
                sides.append(-float(log_likelihood(family.model({**parameters, key: moved}), y, x).mean()))
            assert min(sides) >= best - 1e-13 * max(1, abs(best)), (key, where)
            if "laplace" not in key:  # which has a kink there
                curvature = (sum(sides) - 2 * best) / step**2
                assert abs(sides[1] - sides[0]) / (2 * step) <= 1e-5 * max(1.0, curvature * step / 1e-5, 1e-9 / step)


@EACH
def test_a_weight_of_three_is_a_row_three_times(name):
    family, y, x = FITS[name]
    times = torch.arange(len(y)) % 4
    rows = torch.arange(len(y)).repeat_interleave(times)
    if x is not None:
        repeated, weighted = Target(samples=(x[rows], y[rows])), Target(samples=(x, y))
        weighted.weights = times.to(D)
    else:
        repeated, weighted = Target(samples=y[rows]), Target(samples=y, weights=times)
    one, other = (family.parameters(ClosedForm().solve(p, family, 0).best.model) for p in (repeated, weighted))
    for key, value in one.items():
        if not (name == "smoothed" or key.endswith("laplace.loc")):
            torch.testing.assert_close(value, other[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["full", "diagonal", "low_rank", "normals", "product"])
def test_draws_come_from_the_law_that_log_prob_says(name):
    _, solution = solve(name)
    model = solution.best.model
    x = model.sample((20_000,))
    assert tuple(x.shape) == (20_000, *model.event_shape)
    known = model.mean.isfinite()
    stderr = (model.variance / len(x)).sqrt()
    assert bool(((x.mean(0) - model.mean).abs() < 5 * stderr)[known].all())
    assert bool(model.log_prob(x).isfinite().all())
    assert bool(model.support.check(x).all())


# ---- Gaussians


@pytest.mark.parametrize(("n", "d", "k"), [(200, 6, 2), (500, 10, 3), (20, 30, 3)])
def test_low_rank_is_maximum_likelihood_factor_analysis(n, d, k):
    g = np.random.default_rng(d)
    x = g.normal(size=(n, k)) @ g.normal(size=(k, d)) + g.normal(size=(n, d)) * g.uniform(0.3, 1.5, d) + 7
    model = maximum_likelihood(Gaussian("low_rank", rank=k), x)
    peer = FactorAnalysis(k, svd_method="lapack", tol=1e-9, max_iter=20_000).fit(x)
    mine = float(model.log_prob(torch.tensor(x)).mean())
    assert mine >= peer.score(x) - 1e-7
    if n > d:
        assert mine == pytest.approx(peer.score(x), abs=1e-3)
        assert mine <= float(maximum_likelihood(Gaussian(), x).log_prob(torch.tensor(x)).mean())


def test_low_rank_with_one_factor_less_than_columns_reaches_the_full_gaussian():
    full, low = (maximum_likelihood(family, CORRELATED[:, :4]) for family in (Gaussian(), Gaussian("low_rank", rank=3)))
    torch.testing.assert_close(low.covariance_matrix, full.covariance_matrix, rtol=1e-5, atol=1e-5)


def test_low_rank_parameters_describe_the_same_density_and_moments():
    family = Gaussian("low_rank", rank=2)
    model = maximum_likelihood(family, CORRELATED)
    assert isinstance(model, LowRankMultivariateNormal)
    named = family.parameters(model)
    x, full = CORRELATED[:30], MultivariateNormal(model.mean, model.covariance_matrix)
    torch.testing.assert_close(model.log_prob(x), full.log_prob(x))
    torch.testing.assert_close(family.model(named).log_prob(x), model.log_prob(x))
    torch.testing.assert_close(named["cov_factor"] @ named["cov_factor"].T + named["cov_diag"].diag(), full.covariance_matrix)
    z, w = gaussian_rule(6, 256, seed=1)
    nodes = model.loc + z @ torch.linalg.cholesky(full.covariance_matrix).T
    torch.testing.assert_close(w @ nodes, model.mean)
    torch.testing.assert_close(w @ (nodes - model.mean).square(), model.variance)
    shift, scale = model.mean, model.variance.sqrt()
    moved = {"loc": (named["loc"] - shift) / scale, "cov_factor": named["cov_factor"] / scale[:, None]}
    white = family.model({**moved, "cov_diag": named["cov_diag"] / scale.square()})
    torch.testing.assert_close(white.mean, torch.zeros(6, dtype=D), atol=1e-12, rtol=0)
    torch.testing.assert_close(white.variance, torch.ones(6, dtype=D))
    torch.testing.assert_close(white.log_prob((x - shift) / scale), model.log_prob(x) + scale.log().sum())


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_a_far_first_row_costs_no_digits(covariance):
    x = torch.randn(1_000, 3, dtype=D) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0.3], [0, 0, 1]], dtype=D)
    moved = torch.cat([torch.full((1, 3), -1e8, dtype=D), x])
    w = torch.ones(1_001, dtype=D)
    w[0] = 0
    near, far = maximum_likelihood(Gaussian(covariance), x), maximum_likelihood(Gaussian(covariance), moved, weights=w)
    torch.testing.assert_close(far.variance, near.variance, rtol=1e-12, atol=0)
    torch.testing.assert_close(far.mean, near.mean, rtol=1e-8, atol=1e-8)


def test_a_constant_column_and_a_far_one_are_told_apart():
    x = torch.cat([torch.full((50, 1), 3.0, dtype=D), torch.randn(50, 1, dtype=D)], 1)
    x = torch.cat([torch.tensor([[3.0, 1e9]], dtype=D), x])
    w = torch.ones(51, dtype=D)
    w[0] = 0
    with pytest.raises(InputError, match="column `x1` is constant"):
        maximum_likelihood(Gaussian("diagonal"), x, weights=w)


# ---- categories and margins


def test_categories_are_frequencies_and_an_unseen_one_has_probability_nought():
    x = torch.tensor([0.0, 1, 1, 2, 2, 2], dtype=D)[:, None]
    model = maximum_likelihood(Categorical(), x)
    torch.testing.assert_close(model.log_prob(x).exp(), torch.tensor([1, 2, 2, 3, 3, 3], dtype=D) / 6)
    other = torch.tensor([[3.0], [-1.0], [0.5], [math.nan]], dtype=D)
    assert model.log_prob(other).tolist() == [-math.inf] * 4
    assert tuple(model.event_shape) == (1,)
    assert isinstance(model, Independent)
    assert tuple(model.sample((5,)).shape) == (5, 1)
    rare = maximum_likelihood(Categorical(categories=4), x)
    assert rare.log_prob(other)[0] == -math.inf
    smooth = maximum_likelihood(Categorical(categories=4, smoothing=1.0), x)
    torch.testing.assert_close(Categorical().parameters(smooth)["probs"], torch.tensor([2, 3, 4, 1], dtype=D) / 10)


def test_a_category_that_only_rows_held_out_have_makes_the_held_out_loss_infinite():
    probe = ClosedForm().solve(Target(samples=torch.arange(40, dtype=D)), Categorical(), 0, stride=5).held.block
    codes = (torch.arange(40) % 2).to(D)
    first = int(probe.x[0, 0])
    codes[codes == 1] = 2
    codes[first], rest = 1.0, codes[:, None]
    solution = ClosedForm().solve(Target(samples=rest), Categorical(), 0, stride=5)
    assert math.isfinite(solution.best.loss)
    assert solution.held.model.log_prob(solution.held.block.x).min() == -math.inf


PEERS = {
    "normal": lambda x: dict(zip(("loc", "scale"), stats.norm.fit(x), strict=True)),
    "laplace": lambda x: {"scale": stats.laplace.fit(x)[1]},
    "exponential": lambda x: {"rate": 1 / stats.expon.fit(x, floc=0)[1]},
    "gamma": lambda x: {"concentration": stats.gamma.fit(x, floc=0)[0], "rate": 1 / stats.gamma.fit(x, floc=0)[2]},
    "lognormal": lambda x: {"scale": stats.lognorm.fit(x, floc=0)[0], "loc": math.log(stats.lognorm.fit(x, floc=0)[2])},
    "beta": lambda x: dict(zip(("concentration1", "concentration0"), stats.beta.fit(x, floc=0, fscale=1)[:2], strict=True)),
    "bernoulli": lambda x: {"probs": x.mean()},
    "poisson": lambda x: {"rate": x.mean()},
}


@pytest.mark.parametrize("margin", PEERS)
def test_margins_agree_with_scipy(margin):
    x = data()[:, NAMED.index(margin)]
    family = Product(margin)
    found = family.parameters(maximum_likelihood(family, x))
    for name, value in PEERS[margin](x.numpy()).items():
        assert float(found[f"0.{margin}.{name}"]) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("shape", [1e-3, 0.1, 1.0, 19.9, 20.1, 1e4, 1e8])
def test_the_shape_of_a_gamma_is_found_to_machine_precision(shape):
    assert _gamma_shape(_log_minus_digamma(shape)) == pytest.approx(shape, rel=1e-13)


def test_a_narrow_gamma_keeps_its_digits():
    x = Gamma(torch.tensor(1e8, dtype=D), torch.tensor(1.0, dtype=D)).sample((2_000,))
    found = Product("gamma").parameters(maximum_likelihood(Product("gamma"), x))
    y = x / x.mean() - 1
    gap = float((y - torch.log1p(y)).mean())
    assert float(found["0.gamma.concentration"]) == pytest.approx(_gamma_shape(gap), rel=1e-6)


@pytest.mark.parametrize("many", [1, 2, 7, 100, 1001])
def test_medians_by_counting_are_those_by_sorting(many, monkeypatch):
    monkeypatch.setattr(streams, "PART", 37)
    g = torch.Generator().manual_seed(many)
    x = torch.randn(many, 3, generator=g, dtype=D) * torch.tensor([1e-200, 1.0, 1e200], dtype=D)
    x[:, 1] = x[:, 1].round()
    w = torch.randint(1, 4, (many,), generator=g).to(D)
    found = weighted_medians(Rows(streams.slices(Block(x, w)), ("a", "b", "c")), [0, 1, 2])
    for column, median in zip(x.T, found, strict=True):
        sorted_rows = column.repeat_interleave(w.long()).sort().values
        assert float(median) == float(sorted_rows[(len(sorted_rows) - 1) // 2])


def test_margins_are_inferred_from_the_values_and_said():
    g = np.random.default_rng(3)
    x = torch.cat([data(1, 2_000), torch.tensor(g.lognormal(9, 1, (2_000, 1))).round()], 1)
    names = [f"x{i + 1}" for i in range(10)]
    family, note = Product().resolve(x, names)
    assert family == Product((*NAMED, "lognormal"), categories=(None,) * 8 + (5, None))
    assert Product().resolve(x, names, whole=False)[0] == Product((*NAMED, "lognormal"))
    assert "`x8` holds whole numbers from 0: poisson" in note
    assert "`x7` holds 0 and 1: bernoulli" in note
    assert Product("gamma").resolve(x, names) == (Product("gamma"), "")


def test_categories_are_counted_before_a_fit_so_that_rows_held_out_may_be_the_only_ones_of_their_kind():
    x = torch.tensor([0.0, 1, 2, 2], dtype=D)[:, None]
    assert Categorical(smoothing=0.5).resolve(x, ["side"]) == (Categorical(3, 0.5), "`side` holds the codes of 3 categories")
    assert Categorical().resolve(x, ["side"], whole=False) == (Categorical(), "")
    assert Product("categorical").resolve(x, ["side"])[0] == Product("categorical", categories=(3,))
    with pytest.raises(InputError, match="1 never occurs"):
        Categorical().resolve(x[[0, 2]], ["side"])
    once = Target(samples=torch.tensor([0.0] * 50 + [2.0] * 49 + [1.0]))
    for family in (Categorical(), Product("categorical")):
        found = fit(once, family)
        assert found.value.value == math.inf
        assert "10-fold" in found.value.method
        assert math.isfinite(fit(once, type(family)(*["categorical"] * (type(family) is Product), smoothing=1.0)).value.value)


def test_a_product_is_evaluated_only_where_its_margins_are():
    model = maximum_likelihood(Product(NAMED), data())
    outside = data()[:9].clone()
    for i, bad in enumerate([math.nan, math.inf, -1.0, 0.0, -1.0, 1.0, 0.5, 2.5, 5.0]):
        outside[i, i] = bad
    assert model.log_prob(outside).tolist() == [-math.inf] * 9
    with pytest.raises(ValueError, match="last axis"):
        model.log_prob(data()[:, :2])
    assert not model.has_rsample
    assert maximum_likelihood(Product("gamma"), data()[:, 3]).rsample((2,)).shape == (2, 1)


def test_a_product_of_densities_is_a_target_like_any_law():
    p, q = (maximum_likelihood(Product(["gamma", "normal"]), data(seed)[:, [3, 0]]) for seed in (0, 1))
    target = Target.of(p)
    x = data()[:20, [3, 0]]
    free = target.unconstrained()
    u = target.bijection.inverse(x)
    torch.testing.assert_close(target.bijection.forward(u), x)
    torch.testing.assert_close(free.log_prob(u), p.log_prob(x) + x[:, 0].log())
    each = [float(kl_divergence(a, b)) for a, b in zip(p.laws, q.laws, strict=True)]
    found = estimate(p=p, q=q, divergence="forward_kl")
    assert found.value == pytest.approx(sum(each), abs=5 * (found.stderr or 0) + 1e-6)


# ---- linear Gaussian


@pytest.mark.parametrize("name", ["linear", "linear_diagonal", "linear_line"])
def test_linear_gaussian_is_least_squares(name):
    family, solution = solve(name)
    _, y, x = FITS[name]
    peer = LinearRegression().fit(x.numpy(), y.numpy())
    found = family.parameters(solution.best.model)
    np.testing.assert_allclose(found["weight"].numpy(), peer.coef_, rtol=1e-6)
    np.testing.assert_allclose(found["bias"].numpy(), peer.intercept_, rtol=1e-6)
    rest = y.numpy() - peer.predict(x.numpy())
    squared = rest.T @ rest / len(y)
    if family.covariance == "diagonal":
        squared = np.diag(np.diag(squared))
    np.testing.assert_allclose((found["scale_tril"] @ found["scale_tril"].T).numpy(), squared, rtol=1e-6, atol=1e-9)
    law = solution.best.model(x[:7])
    assert tuple(law.batch_shape) == (7,)
    assert tuple(law.event_shape) == (() if y.shape[1] == 1 else (y.shape[1],))


def test_linear_gaussian_keeps_its_digits_on_badly_scaled_columns():
    x = torch.randn(300, 2, dtype=D)
    y = x @ torch.tensor([[1.0], [-2.0]], dtype=D) + torch.randn(300, 1, dtype=D) + 3
    by, to = torch.tensor([1e-6, 1e5], dtype=D), torch.tensor([1e3, -1e9], dtype=D)
    plain, scaled = (ClosedForm().solve(Target(samples=(z, y)), LinearGaussian(), 0).best.model for z in (x, x * by + to))
    torch.testing.assert_close(scaled.weight * by, plain.weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled(x * by + to).mean, plain(x).mean, rtol=1e-6, atol=1e-6)


# ---- messages about bad input


def bad(column, value):
    x = data()
    x[4, column] = value
    return x


SAID = [
    (lambda: Gaussian("low_rank"), "`rank=None` isn't a whole number of at least 1"),
    (lambda: Gaussian("low_rank", rank=0), "`rank=0` isn't a whole number of at least 1"),
    (lambda: Gaussian("full", rank=2), "a rank belongs to"),
    (lambda: Gaussian("round"), "Choose 'full', 'diagonal' or 'low_rank'"),
    (lambda: maximum_likelihood(Gaussian("low_rank", rank=6), CORRELATED), "there are 6 columns, and the rank must be smaller"),
    (lambda: maximum_likelihood(Gaussian("low_rank", rank=2), CORRELATED[:3]), "at least 4 rows"),
    (
        lambda: maximum_likelihood(Gaussian("low_rank", rank=2), torch.cat([CORRELATED, CORRELATED[:, :2].sum(1)[:, None]], 1)),
        "explain the columns `x1`, `x2`, `x7` exactly",
    ),
    (
        lambda: maximum_likelihood(Gaussian(), torch.cat([CORRELATED, CORRELATED[:, :2].sum(1)[:, None]], 1)),
        "columns `x1`, `x2`, `x7` are linearly dependent",
    ),
    (lambda: Categorical(categories=0), "whole number of at least 1"),
    (lambda: Categorical(smoothing=-1), "finite number of at least 0"),
    (lambda: maximum_likelihood(Categorical(), torch.tensor([0.0, 1, 3, 3])), "codes go to 3, and 2 never occurs. Recode"),
    (lambda: maximum_likelihood(Categorical(), torch.tensor([0.0, 1.5])), "holds 1 value outside whole numbers from 0"),
    (lambda: maximum_likelihood(Categorical(categories=3), torch.tensor([0.0, 3.0])), "holds 1 value outside"),
    (lambda: Categorical().check_samples(torch.tensor([[0.0], [-1.0]]), ["side"]), "column `side` holds −1 in row 1"),
    (lambda: maximum_likelihood(Categorical(), data()[:, :2]), r"there are 2 columns.*Use Product\('categorical'\)"),
    (lambda: Product("normel"), "margin 'normel': it isn't a known one. Choose among bernoulli"),
    (lambda: Product().statistics(data(), torch.ones(300), data()[0]), "haven't been chosen yet"),
    (
        lambda: Product("categorical", categories=[2]).check_samples(data()[:, 7:], "ab"),
        "gives the categories of 1 columns, and there are 2",
    ),
    (lambda: Product(NAMED[:3]).check_samples(data(), ["x"] * 9), "names 3 margins, and there are 9 columns"),
    (
        lambda: Product(NAMED).check_samples(bad(7, -3.0), NAMED),
        "column `poisson` holds −3 in row 4, and `poisson` takes whole numbers",
    ),
    (lambda: maximum_likelihood(Product(NAMED), bad(7, -3.0)), "fit `poisson` to column `x8`: it holds 1 value outside whole"),
    (lambda: maximum_likelihood(Product(NAMED), bad(5, 1.0)), "outside numbers between 0 and 1, without the ends"),
    (lambda: maximum_likelihood(Product(NAMED), bad(3, 0.0)), "fit `gamma` to column `x4`"),
    (lambda: maximum_likelihood(Product("laplace"), torch.ones(5)), "it is constant"),
    (lambda: maximum_likelihood(Product("gamma"), torch.full((5,), 0.1)), "it is constant"),
    (lambda: maximum_likelihood(Product("exponential"), torch.zeros(5)), "all its values are 0"),
    (lambda: Product().resolve(torch.full((9, 1), 0.5), ["flat"]), r"column `flat`: it is constant \(0.5\)"),
    (lambda: Product().resolve(torch.full((9, 1), 0.5), ["flat"], whole=False), "column `flat`: it is constant"),
    (lambda: Product().resolve(torch.zeros(9, 1), ["flat"]), r"column `flat`: it is constant \(0\), .* Drop the column, or name"),
    (lambda: fit(np.column_stack([np.ones(50), np.arange(50)]), Product()), r"column `x1`: it is constant \(1\)"),
    (lambda: Product("normal").parameters(maximum_likelihood(Gaussian(), CORRELATED)), "isn't|it is a `MultivariateNormal`"),
    (
        lambda: ClosedForm().solve(Target(samples=(torch.ones(20, 1), torch.randn(20))), LinearGaussian(), 0),
        "column `x1` of x is constant",
    ),
    (
        lambda: ClosedForm().solve(Target(samples=(CORRELATED[:, [0, 1, 0]], CORRELATED[:, 2:3])), LinearGaussian(), 0),
        "columns `x1`, `x3` of x are linearly dependent",
    ),
    (
        lambda: ClosedForm().solve(Target(samples=(CORRELATED[:, :2], CORRELATED[:, :1] * 2)), LinearGaussian(), 0),
        "x determines column `y` of y exactly",
    ),
    (
        lambda: ClosedForm().solve(Target(samples=(CORRELATED[:, :2], CORRELATED[:, [2, 2]])), LinearGaussian(), 0),
        "residuals of y's columns depend on each other",
    ),
    (
        lambda: ClosedForm().solve(Target(samples=(CORRELATED[:3, :2], CORRELATED[:3, 2:3])), LinearGaussian(), 0),
        "at least 4 rows",
    ),
    (lambda: LinearGaussian("low_rank"), "`covariance='low_rank'` isn't one of its choices. Choose 'full' or 'diagonal'"),
]


@pytest.mark.parametrize(("act", "message"), SAID)
def test_bad_input_is_refused_with_the_reason(act, message):
    with pytest.raises(InputError, match=message):
        act()


def test_what_cannot_be_held_out_is_said():
    x = torch.randn(7, 6, dtype=D)
    solution = ClosedForm().solve(Target(samples=x), Gaussian(), 0, stride=2)
    assert solution.held is None
    assert "no rows could be held out" in solution.notes[0]


def test_the_ladder_has_an_answer_for_every_family():
    assert richer(Gaussian("low_rank", rank=2)) == Gaussian()
    assert simpler(Gaussian("low_rank", rank=2)) == Gaussian("diagonal")
    assert isinstance(richer(Gaussian()), Mixture)
    for family in (Gaussian("diagonal"), Product("normal"), Product(["normal", "normal"])):
        assert richer(family, correlated=True) == Gaussian()
        assert richer(family) == Mixture(2, "diagonal")
    assert richer(StudentT("diagonal"), correlated=True) == StudentT()
    for family, _, _ in FITS.values():
        if not isinstance(family, Gaussian) and family != Product("normal"):
            assert richer(family) == (MixtureDensityNetwork(1) if isinstance(family, LinearGaussian) else None)
        if not isinstance(family, Gaussian):
            assert simpler(family) is None
    assert set(NAMED) == set(MARGINS)
