"""Generalised linear models by Newton: agreement with scikit-learn, laws, separation, and messages about bad input."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.linear_model import LogisticRegression, PoissonRegressor

import whichkl as wk
from whichkl import Target
from whichkl._checks import InputError
from whichkl.families import GeneralizedLinear, Neural, family_from_config, richer, simpler
from whichkl.families.family import log_likelihood
from whichkl.files.journal import Journal
from whichkl.samples import Block, Stream
from whichkl.samples import stream as streams
from whichkl.solvers import Newton, solver_for
from whichkl.solvers.work import Work

D = torch.float64
G = np.random.default_rng(0)
X = G.normal(size=(400, 3))
BY, TO = np.array([1.0, 1e4, 1e-3]), np.array([0.0, -1e6, 5.0])
WORDS = ("bernoulli", "categorical", "poisson")


def respond(word):
    g = np.random.default_rng(1)
    if word == "bernoulli":
        return (g.random(400) < 1 / (1 + np.exp(-(X @ [1.0, -1, 0.5] + 0.3)))).astype(float)
    if word == "poisson":
        return g.poisson(np.exp(X @ [0.5, 0.2, -0.3] + 1)).astype(float)
    odds = np.exp(X @ g.normal(size=(3, 4)))
    return np.array([g.choice(4, p=one / one.sum()) for one in odds]).astype(float)


Y = {word: respond(word) for word in WORDS}
EACH = pytest.mark.parametrize("word", WORDS)


def solve(family, x, y, solver=None, weights=None, **more):
    p = Target(samples=(x, y))
    if weights is not None:
        p.weights = torch.as_tensor(weights, dtype=D)
    return (solver or Newton()).solve(p, family, 0, **more)


def fitted(family, x, y, **more):
    return solve(family, x, y, **more).best.model


# ---- agreement with scikit-learn


@pytest.mark.parametrize("penalty", [0.0, 0.1, 30.0])
def test_logistic_regression_agrees_with_scikit_learn(penalty):
    model = fitted(GeneralizedLinear("bernoulli", penalty), X, Y["bernoulli"])
    peer = LogisticRegression(C=1 / penalty if penalty else np.inf, tol=1e-10, max_iter=10_000).fit(X, Y["bernoulli"])
    np.testing.assert_allclose(model.weight.numpy(), peer.coef_, atol=1e-4)
    np.testing.assert_allclose(model.bias.numpy(), peer.intercept_, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 0.1, 30.0])
def test_multinomial_regression_agrees_with_scikit_learn(penalty):
    model = fitted(GeneralizedLinear("categorical", penalty), X, Y["categorical"])
    peer = LogisticRegression(C=1 / penalty if penalty else np.inf, tol=1e-10, max_iter=10_000).fit(X, Y["categorical"])
    np.testing.assert_allclose(model(torch.tensor(X)).probs.numpy(), peer.predict_proba(X), atol=1e-4)
    np.testing.assert_allclose(model.weight.numpy(), peer.coef_ - peer.coef_.mean(0), atol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 8.0])
def test_poisson_regression_agrees_with_scikit_learn(penalty):
    model = fitted(GeneralizedLinear("poisson", penalty), X, Y["poisson"])
    peer = PoissonRegressor(alpha=penalty / len(X), tol=1e-10, max_iter=10_000).fit(X, Y["poisson"])
    np.testing.assert_allclose(model.weight.numpy()[0], peer.coef_, atol=1e-4)
    assert float(model.bias) == pytest.approx(peer.intercept_, abs=1e-4)


def test_two_categories_are_a_coin():
    coin, table = (fitted(GeneralizedLinear(word), X, Y["bernoulli"]) for word in ("bernoulli", "categorical"))
    torch.testing.assert_close(table(torch.tensor(X)).probs[:, 1], coin(torch.tensor(X)).probs)


# ---- laws


@EACH
def test_parameters_and_configuration_say_the_model_and_the_family(word):
    family = GeneralizedLinear(word, 0.5)
    solution = solve(family, X, Y[word])
    model, y, x = solution.best.model, torch.tensor(Y[word])[:, None], torch.tensor(X)
    for again in (family.model(family.parameters(model)), pickle.loads(pickle.dumps(model))):  # noqa: S301
        torch.testing.assert_close(log_likelihood(again, y, x), log_likelihood(model, y, x))
        assert str(again) == str(model)
    assert -float(log_likelihood(model, y, x).mean()) == pytest.approx(solution.best.loss, rel=1e-12)
    assert family_from_config(json.loads(json.dumps(family.config()))) == family
    law = model(x[:7])
    assert tuple(law.batch_shape) == (7,)
    assert tuple(law.event_shape) == ()
    assert tuple(law.sample((2,)).shape) == (2, 7)
    assert richer(family) == Neural(family.response)
    assert simpler(family) is None
    assert family.label


@EACH
@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_the_gradient_of_the_stated_objective_is_nought(word, penalty):
    family = GeneralizedLinear(word, penalty)
    solution = solve(family, X, Y[word])
    assert solution.best.converged
    parameters = family.parameters(solution.best.model)
    y, x = torch.tensor(Y[word])[:, None], torch.tensor(X)

    def objective(changed):
        prior = 0.5 * penalty * float(changed["weight"].square().sum())
        return -float(log_likelihood(family.model(changed), y, x).sum()) + prior

    best = objective(parameters)
    for key, value in parameters.items():
        for where in [tuple(at) for at in value.nonzero().tolist()]:
            sides = []
            for sign in (-1, 1):
                moved = value.clone()
                moved[where] += sign * 1e-4
                sides.append(objective({**parameters, key: moved}))
            assert min(sides) >= best - 1e-9
            assert abs(sides[1] - sides[0]) / 2e-4 < 1e-4


class Pieces(Stream):
    """Rows in memory, given as a stream."""

    def __init__(self, x, y):
        self.names, self.context_names = ("y",), tuple(f"x{i + 1}" for i in range(x.shape[1]))
        y = torch.as_tensor(y)[:, None]
        self._parts = streams.slices(Block(y, torch.ones(len(y), dtype=D), torch.as_tensor(x)))

    @property
    def parts(self):
        return self._parts

    @property
    def rows(self):
        return None


@EACH
def test_a_stream_of_small_parts_gives_the_same_as_rows_in_memory(word, monkeypatch):
    family, whole = GeneralizedLinear(word, 0.5), solve(GeneralizedLinear(word, 0.5), X, Y[word])
    monkeypatch.setattr(streams, "PART", 61)
    monkeypatch.setattr(streams, "BLOCK", 17)
    stream = Newton().solve(Target(samples=Pieces(X, Y[word])), family, 0, stride=5)
    torch.testing.assert_close(stream.best.model.weight, whole.best.model.weight, rtol=1e-9, atol=1e-11)
    assert 40 < len(stream.held.block) < 130
    assert stream.best.loss == pytest.approx(
        -float(log_likelihood(stream.best.model, stream.held.block.x, stream.held.block.context).mean()), rel=1e-12
    )


@EACH
def test_the_model_without_the_rows_held_out_is_that_of_the_other_rows(word):
    family = GeneralizedLinear(word)
    solution = solve(family, X, Y[word], stride=4)
    is_held = (torch.tensor(X)[:, None] == solution.held.block.context[None]).all(-1).any(1).numpy()
    other = fitted(family, X[~is_held], Y[word][~is_held])
    torch.testing.assert_close(solution.held.model.weight, other.weight, rtol=1e-7, atol=1e-9)


@EACH
def test_a_weight_of_three_is_a_row_three_times(word):
    times = np.arange(400) % 4
    family = GeneralizedLinear(word)
    one = fitted(family, np.repeat(X, times, 0), np.repeat(Y[word], times))
    torch.testing.assert_close(fitted(family, X, Y[word], weights=times).weight, one.weight, rtol=1e-8, atol=1e-10)


@EACH
def test_units_of_the_columns_cost_no_digits(word):
    plain, scaled = fitted(GeneralizedLinear(word), X, Y[word]), fitted(GeneralizedLinear(word), X * BY + TO, Y[word])
    torch.testing.assert_close(scaled.weight * torch.tensor(BY), plain.weight, rtol=1e-7, atol=1e-9)


@EACH
@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_conjugate_gradients_end_where_newton_does(word, penalty):
    family = GeneralizedLinear(word, penalty)
    dense, products = (solve(family, X * BY, Y[word], solver=Newton(dense=limit)).best for limit in (1_000, 0))
    assert products.converged
    torch.testing.assert_close(products.model.weight, dense.model.weight, rtol=1e-6, atol=1e-9)


def test_a_killed_fit_goes_on_from_its_journal(tmp_path):
    family, journal, told = GeneralizedLinear("poisson"), Journal.of(tmp_path, {"fit": 1}), []
    whole = solve(family, X, Y["poisson"], work=Work(journal=journal, tell=lambda step, done: told.append(step)))
    assert len(told) == whole.iterations > 2
    again = solve(family, X, Y["poisson"], work=Work(journal=journal, tell=lambda step, done: told.append(step)))
    assert len(told) == again.iterations == whole.iterations + 1
    torch.testing.assert_close(again.best.model.weight, whole.best.model.weight, rtol=1e-12, atol=1e-12)


def test_values_that_a_response_does_not_take_have_probability_nought():
    x, one = torch.tensor(X[:1]), torch.ones(1, dtype=D)
    for word in WORDS:
        law = fitted(GeneralizedLinear(word), X, Y[word])(x)
        bad = (-1.0, 0.5, math.nan) if word == "poisson" else (-1.0, 0.5, 4.0, math.nan)
        assert [float(law.log_prob(value * one)) for value in bad] == [-math.inf] * len(bad)
        assert math.isfinite(float(law.log_prob(one)))


def test_newton_is_what_forward_kl_takes():
    from whichkl import ForwardKL

    p = Target(samples=(X, Y["bernoulli"]))
    assert solver_for(ForwardKL(), GeneralizedLinear(), p.access).name == "newton"


# ---- separation, and other fits without a maximum


def flag(where, share=0.3):
    return np.column_stack([X, where & (np.random.default_rng(5).random(400) < share)]).astype(float)


CODES, COUNTS, COINS = Y["categorical"], Y["poisson"], Y["bernoulli"]
SEPARATED = {
    "one column, wholly": ("bernoulli", X, (X[:, 1] > 0.2).astype(float), "classes are separated by `x2`"),
    "two columns, wholly": ("bernoulli", X, (X[:, 0] + X[:, 1] > 0.2).astype(float), "separated by a combination of `x1`, `x2`"),
    "a flag of one class": ("bernoulli", flag(COINS == 1), COINS, "classes are separated by `x4`"),
    "one class of many, wholly": ("categorical", X, np.digitize(X[:, 2], [-0.5, 0.5]).astype(float), "separated by `x3`"),
    "a flag of one class of many": ("categorical", flag(CODES == 2), CODES, "classes are separated by `x4`"),
    "a flag of empty counts": ("poisson", flag(COUNTS == 0, 0.6), COUNTS, "counts of 0 and above are separated by `x4`"),
}


@pytest.mark.parametrize("dense", [1_000, 0])
@pytest.mark.parametrize("name", SEPARATED)
def test_separation_is_found_and_named(name, dense):
    word, x, y, message = SEPARATED[name]
    with pytest.raises(InputError, match=message + ".*so the likelihood has no maximum. Use penalty="):
        solve(GeneralizedLinear(word), x, y, solver=Newton(dense=dense))
    assert solve(GeneralizedLinear(word, 1.0), x, y, solver=Newton(dense=dense)).best.converged


def lines(word, x, y):
    """Rows a with a · δ ≥ 0 for every row of the data, along a direction δ that separates; and those that may not change."""
    z = np.column_stack([x, np.ones(len(x))])
    if word == "bernoulli":
        return z * (2 * y - 1)[:, None], z[:0]
    if word == "poisson":
        return -z[y == 0], z[y > 0]
    classes = int(y.max()) + 1
    ways = []
    for row, own in zip(z, y.astype(int), strict=True):
        for other in set(range(classes)) - {own}:
            way = np.zeros((classes, z.shape[1]))
            way[own], way[other] = row, -row
            ways.append(way.ravel())
    return np.array(ways), np.zeros((0, classes * z.shape[1]))


@EACH
def test_separation_is_found_exactly_where_a_linear_program_finds_it(word):
    counts = {True: 0, False: 0}
    for seed in range(40):
        g = np.random.default_rng(seed)
        x = g.integers(-2, 3, (14, 2)).astype(float) if seed % 2 else g.normal(size=(14, 2))
        y = {"bernoulli": x[:, 0] + g.normal(size=14) > 0, "poisson": g.poisson(np.exp(2 * x[:, 0] - 2.5))}.get(word)
        y = np.digitize(x[:, 0] + 0.7 * g.normal(size=14), [-0.7, 0.7]) if y is None else y
        y = y.astype(float)
        if len(np.unique(y)) < (3 if word == "categorical" else 2) or set(np.unique(y)) == {1.0, 2.0}:
            continue
        grow, stay = lines(word, x, y)
        program = linprog(-grow.sum(0), -grow, np.zeros(len(grow)), stay if len(stay) else None, np.zeros(len(stay)), (-1, 1))
        separated = -program.fun > 1e-7
        counts[separated] += 1
        if separated:
            with pytest.raises(InputError, match="separated by"):
                solve(GeneralizedLinear(word), x, y)
        else:
            assert solve(GeneralizedLinear(word), x, y).best.converged
    assert min(counts.values()) >= 4


def test_a_class_that_only_rows_held_out_have_is_said():
    y = CODES.copy()
    y[y == 3] = 0
    probe = solve(GeneralizedLinear("categorical"), X, y, stride=4).held.block
    at = int((torch.tensor(X) == probe.context[0]).all(1).nonzero()[0])
    y[at] = 3
    solution = solve(GeneralizedLinear("categorical", 1.0), X, y, stride=4)
    assert solution.best.converged
    assert solution.held is None
    assert "no rows could be held out" in solution.notes[0]


SAID = [
    (lambda: GeneralizedLinear("normal"), "Choose 'bernoulli', 'categorical' or 'poisson'"),
    (lambda: GeneralizedLinear(penalty=-1.0), "finite number of at least 0"),
    (lambda: GeneralizedLinear(penalty=math.nan), "finite number of at least 0"),
    (
        lambda: fitted(GeneralizedLinear(), X, COINS + 1),
        "doesn't take: it takes 0 and 1. Recode the classes as 0",
    ),
    (lambda: fitted(GeneralizedLinear("categorical"), X, CODES + 1), "class 0 never occurs"),
    (lambda: fitted(GeneralizedLinear("categorical"), X, 2 * CODES), "class 1 never occurs"),
    (lambda: fitted(GeneralizedLinear("categorical"), X, CODES + 0.5), "y holds 400 values"),
    (lambda: fitted(GeneralizedLinear("poisson"), X, COUNTS - 9), "it takes whole numbers from 0. Correct y"),
    (lambda: fitted(GeneralizedLinear(), X, 0 * COINS), "class 1 never occurs"),
    (lambda: fitted(GeneralizedLinear("categorical"), X, 0 * COINS), "class 1 never occurs"),
    (lambda: fitted(GeneralizedLinear("poisson"), X, 0 * COUNTS), "all counts y are 0"),
    (lambda: fitted(GeneralizedLinear(), np.column_stack([X, 0 * X[:, 0] + 7]), COINS), "column `x4` of x is constant"),
    (
        lambda: fitted(GeneralizedLinear(), np.column_stack([X, X[:, 0] - 3 * X[:, 2]]), COINS),
        "columns `x1`, `x3`, `x4` of x are linearly dependent",
    ),
    (lambda: fitted(GeneralizedLinear(), X, np.column_stack([COINS, COINS])), "y has 2 columns, and it models one"),
    (lambda: Newton().solve(Target(samples=COINS), GeneralizedLinear(), 0), "there is no x"),
    (
        lambda: GeneralizedLinear().check_samples(torch.tensor([[0.0], [1.0], [-2.0]]), ["y"]),
        "y holds −2 in row 2, and `bernoulli` takes 0 and 1",
    ),
    (lambda: GeneralizedLinear().parameters(3), "it is a `int`"),
]


@pytest.mark.parametrize(("act", "message"), SAID)
def test_bad_input_is_refused_with_the_reason(act, message):
    with pytest.raises(InputError, match=message):
        act()


def test_dependent_columns_are_no_matter_under_a_prior():
    twice = np.column_stack([X, X[:, 0]])
    model = fitted(GeneralizedLinear(penalty=1.0), twice, COINS)
    torch.testing.assert_close(model.weight[0, 0], model.weight[0, 3])


@pytest.mark.parametrize("response", ["bernoulli", "categorical", "poisson"])
def test_events_have_the_shape_in_which_y_came(response, tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator, dtype=D)
    y = (x[:, 0] + torch.randn(200, generator=generator, dtype=D) > 0).to(D)
    flat, column = (wk.fit(Target(samples=(x, one)), GeneralizedLinear(response)) for one in (y, y[:, None]))
    assert (tuple(flat.model(x).event_shape), tuple(column.model(x).event_shape)) == ((), (1,))
    torch.testing.assert_close(flat.model(x).log_prob(y), column.model(x.numpy()).log_prob(y[:, None]))
    column.save(tmp_path / "fit")
    assert tuple(wk.Fit.load(tmp_path / "fit").model(x).event_shape) == (1,)
    with pytest.raises(ValueError, match="the model was fitted on 2 columns"):
        flat.model(x[:, :1])
