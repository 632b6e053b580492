"""Bad input: a message in the one grammar with the place and the next action, and never a number."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.distributions import Poisson, Uniform

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.families import Gaussian, Mixture

GRAMMAR = re.compile(r"^Cannot [^:]+: .+\. [A-Z].+\.$", re.DOTALL)
X = np.random.default_rng(0).normal(size=(50, 2))


def poked(value, *cells):
    x = X.copy()
    for cell in cells:
        x[cell] = value
    return x


def gaussian(x):
    return -0.5 * x.square().sum(-1)


def only_at_edges(x):
    return torch.where(x[:, 0] > 0.5, torch.nan, gaussian(x))


def raises(x):
    raise ZeroDivisionError("no prior here")


def rough(x):
    return -(x.square().sum(-1) + 0 * torch.sqrt(x[:, 0] * 0).nan_to_num())


SAMPLES = [
    (
        poked(math.nan, (3, 1)),
        r"1 cell in 1 of 50 rows is NaN or infinite: `x2` in row 3\. .*pass `Target.samples=…, missing='drop'",
    ),
    (poked(math.inf, (0, 0), (7, 1)), r"2 cells in 2 of 50 rows .*: `x1` in row 0, `x2` in row 7\."),
    (poked(math.nan, *((i, 0) for i in range(9))), r"9 cells in 9 of 50 rows .*: `x1` in 9 rows \(0, 1, 2, …\)"),
    (np.empty((0, 2)), r"they are empty, shape \(0, 2\)"),
    (X[:2], "needs at least 3 rows in dimension 2, and there are 2"),
    (np.column_stack([X[:, 0], np.ones(50)]), "column `x2` is constant"),
    (np.column_stack([X, X[:, 0] + X[:, 1]]), r"columns `x1`, `x2`, `x3` are linearly dependent"),
    (X.reshape(5, 10, 2), r"shape \(5, 10, 2\), not \(n, d\)\. .*5 Markov chains, .*samples=x\.reshape\(-1, 2\), chains=5\)"),
    (X.reshape(10, 5, 2), r"pass `Target\(samples=x\.swapaxes\(0, 1\)\.reshape\(-1, 2\), chains=5\)`, else"),
    (np.zeros((10, 3, 4, 4)), r"Give one row per draw, `x\.reshape\(len\(x\), -1\)`"),
    (X.T, r"needs at least 51 rows in dimension 50, and there are 2\. .*, or `x\.T` if its columns are the draws"),
    (["Lima", "Oslo"], r"a list of texts names files, and 'Lima' isn't one\. .*categories=\['x'\]"),
    (np.array([["a", "b"]]), "not a number"),
    (X + 1j, "not a number|complex"),
    ((X, X), r"conditional target: .* y holds real numbers, and no .* Use `LinearGaussian\(\)`, `MixtureDensityNetwork\(\)`"),
    ((X, X[:, 0] > 0), r"y holds 0 and 1, .* Use `GeneralizedLinear\(.bernoulli.\)`, `Neural\(.bernoulli.\)`"),
    ((X, np.arange(50) % 4), r"y holds whole numbers from 0 to 3, .* `GeneralizedLinear\(.categorical.\)`.*poisson"),
    ((X, np.arange(50) * 3), r"y holds whole numbers from 0, .* Use `GeneralizedLinear\(.poisson.\)`"),
    ((X, (X > 0) * 1.0), r"y holds 0 and 1, .* Use `Neural\(.bernoulli.\)`"),
    (
        pd.DataFrame({"a": [1.0, 2.0], "species": ["x", "y"]}),
        r"column `species` holds text in 2 cells \(rows 0, 1, such as `x`\). Pass `Target.samples=…, drop=\['species'\]",
    ),
]
DENSITIES = [
    (lambda x: x.square(), r"returned shape \(\d+, 2\) for \d+ points of dimension 2, not \(\d+,\)"),
    (lambda x: gaussian(x).sum(), r"returned shape \(\)"),
    (lambda x: gaussian(x)[:, None] - gaussian(x), r"returned shape \(\d+, \d+\)"),
    (only_at_edges, r"`log_prob` is NaN at \d+ of \d+ points, first at \("),
    (lambda x: torch.full_like(x[:, 0], -math.inf), "-inf at all 256 start points"),
    (lambda x: torch.full_like(x[:, 0], math.nan), "NaN"),
    (lambda x: -gaussian(x) / 0.0, r"\+inf|NaN"),
    (lambda x: gaussian(x).exp(), "a density, not its log"),
    (raises, r"it raised ZeroDivisionError: no prior here \(.*test_inputs.py:\d+\)"),
    (lambda x: gaussian(x) + 0 * (x[:, 0] * 0).sqrt(), "gradient of `log_prob` is not finite"),
    (
        lambda x: gaussian(x[:, :1]) + gaussian(x[:, 1:].detach()),
        "autograd's gradient of `log_prob` is not the gradient of its values",
    ),
]


@pytest.mark.parametrize(("samples", "message"), SAMPLES)
def test_bad_samples_are_refused_with_their_place(samples, message):
    with pytest.raises(InputError, match=message) as error:
        wk.fit(wk.Target(samples=samples))
    assert GRAMMAR.match(str(error.value))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("log_prob", "message"), DENSITIES)
def test_bad_log_densities_are_refused_with_their_place(log_prob, message):
    with pytest.raises(TargetError, match=message) as error:
        wk.fit(wk.Target(log_prob=log_prob, dim=2))
    assert GRAMMAR.match(str(error.value))
    assert error.value.exit_code == 3


CALLS = [
    (lambda: wk.Target(log_prob=gaussian), "Pass `dim=`"),
    (lambda: wk.Target(samples=X, dim=3), "the samples have 2 columns"),
    (lambda: wk.Target(dim=0), "at least 1"),
    (lambda: wk.Target(samples=X, names=["a"]), "the names given are 1, and the coordinates 2"),
    (lambda: wk.Target(samples=X, names=["a", "a"]), "`a` appears twice"),
    (lambda: wk.Target(samples=X, weights=np.ones(3)), r"must be \(50,\) finite, non-negative .*, and their shape is \(3,\)"),
    (lambda: wk.Target(samples=X, weights=np.ones((50, 1))), r"their shape is \(50, 1\)"),
    (lambda: wk.Target(samples=X, weights=np.ones(50) + 1j), r"they are complex, of shape \(50,\)"),
    (lambda: wk.Target(samples=X, weights="even"), "the samples are neither a file nor a DataFrame, whose columns have names"),
    (lambda: wk.Target(samples=X, weights=np.r_[1.0, -1.0, np.nan, np.ones(47)]), "rows 1, 2 don't"),
    (lambda: wk.Target(samples=X, weights=np.zeros(50)), "and all are 0"),
    (lambda: wk.Target(samples=(X, poked(math.nan, (3, 1)))), "`y2` in row 3. Drop or repair those rows first.$"),
    (lambda: wk.Target(samples=(X, np.full(50, math.nan))), r"`y` in 50 rows \(0, 1, 2, …\)"),
    (lambda: wk.Target(samples=(poked(math.nan, (3, 1)), X)), "use these x: .*`x2` in row 3"),
    (lambda: wk.Target(samples=X, given=["x3"]), "no column `x3`, but `x1`, `x2`"),
    (lambda: wk.Target(samples=X, given=[]), "it names no column"),
    (lambda: wk.Target(samples=X, given=["x1", "x2"]), "no column is left for y"),
    (lambda: wk.Target(samples=(X, X), given="x1"), "pairs .x, y. already"),
    (lambda: wk.Target(dim=2, given="x1"), "there are no samples"),
    (lambda: wk.Target(samples=X, weights=-np.ones(50)), "non-negative"),
    (lambda: wk.Target(samples=X, support="positive"), r"\d+ of 50 rows lie outside the support"),
    (lambda: wk.Target(samples=X, support="positve"), "isn't a known one"),
    (lambda: wk.Target(samples=X, support=["real", "real", "real"]), "3 constraints were given for 2 columns"),
    (lambda: wk.Target(weights=np.ones(3)), "no samples to weight"),
    (lambda: wk.Target.of(Poisson(3.0)), "discrete"),
    (lambda: wk.Target.of(Uniform(torch.zeros(3), 1.0)), r"batch shape \(3,\)"),
    (lambda: wk.Target.of(gaussian), "doesn't say its dimension"),
    (lambda: wk.Target.of(3.5), "make a target of a `float`"),
    (lambda: wk.Target.of("nowhere.csv"), "there is no such file"),
    (lambda: Mixture(0), "whole number of at least 1"),
    (lambda: Mixture(2.5), "whole number"),
    (lambda: Gaussian("spherical"), "Choose 'full', 'diagonal' or 'low_rank'"),
    (lambda: wk.fit(X, torch.nn.Linear(2, 2)), "models y given x, and the samples aren't pairs"),
    (lambda: wk.fit(X, 3), "an `int` isn't a `Family`"),
    (lambda: wk.fit(X, "gausian"), "it isn.t a known one"),
    (lambda: wk.fit(X, objective="kl"), "this version minimises forward_kl, reverse_kl"),
    (
        lambda: wk.fit(X, objective="reverse_kl"),
        "it requires `log_prob` or `score`, but the target only has samples. Use `ForwardKL`, or pass",
    ),
    (
        lambda: wk.fit(wk.Target(score=lambda x: -x, dim=2), objective="forward_kl"),
        "requires `samples` or `sampler` or `log_prob`",
    ),
    (lambda: wk.fit(wk.Target(dim=2)), "neither sample the target nor evaluate it"),
    (lambda: wk.fit(X, solver="adam"), r"use adam here: .* Use solver='closed_form'"),
    (lambda: wk.fit(wk.Target(sampler=lambda n: X, dim=2)), r"returned shape \(50, 2\)"),
    (lambda: wk.Access.parse("samples,density"), "read the access `density`"),
    (lambda: wk.problems.bimodal(-1.0), "half_distance"),
    (lambda: wk.report(3, "x.html"), "it is a `int`"),
    (lambda: wk.plot(3), "it is a `int`"),
    (lambda: wk.fit(X, seed="a"), "isn't a whole number"),
    (lambda: wk.Target(samples=pd.DataFrame(X, columns=["a", "a"])), "`a` appears twice"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_bad_arguments_are_refused_in_the_one_grammar(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert GRAMMAR.match(str(error.value))


def test_a_claim_to_be_normalised_is_checked_on_the_line():
    p = wk.problems.bimodal()
    target = wk.Target(sampler=lambda n: p.sample((n,)), log_prob=lambda x: p.log_prob(x[:, 0]) + 1, normalized=True, dim=1)
    with pytest.raises(TargetError, match=r"given as normalised \(`normalized=True`\), and the density integrates to 2\.718"):
        wk.fit(target)


def test_a_model_with_mass_where_the_target_has_none_is_said_to_be_infinitely_far():
    def half(x):
        return torch.where((x > 0).all(-1), -x.sum(-1), torch.tensor(-math.inf, dtype=x.dtype))

    with pytest.raises(TargetError, match=r"-inf inside the support .* Pass `support=`"):
        wk.fit(wk.Target(log_prob=half, dim=2))
    assert wk.fit(wk.Target(log_prob=half, dim=2, support="positive")).status == "converged"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1.0, 2.0], [3.0]], "rows have different lengths"),
        (np.ones((9, 2), dtype=complex), "real and imaginary parts"),
        (np.zeros((9, 1), dtype="datetime64[D]"), "days since"),
        (np.ones((9, 2), dtype=object), "dtype=float"),
    ],
)
def test_arrays_that_hold_no_numbers_are_refused_with_what_to_do(values, said):
    with pytest.raises(InputError, match=said):
        wk.fit(values)


DISCRETE = [
    torch.distributions.Bernoulli(0.3),
    torch.distributions.Categorical(torch.tensor([0.2, 0.3, 0.5])),
    torch.distributions.Binomial(5, torch.tensor(0.3)),
    torch.distributions.Poisson(3.0),
    torch.distributions.Geometric(torch.tensor(0.3)),
    torch.distributions.Independent(torch.distributions.Bernoulli(torch.tensor([0.3, 0.6])), 1),
]


@pytest.mark.parametrize("p", DISCRETE, ids=lambda p: type(p).__name__)
def test_the_call_that_is_named_for_a_discrete_law_makes_its_target(p):
    with pytest.raises(wk.InputError) as caught:
        wk.fit(p)
    call = re.search(r"(Target\(.*\))\.$", str(caught.value))[1]
    target = eval(call, {"Target": wk.Target, "p": p})  # noqa: S307
    fit = wk.fit(target, "product:poisson" if target.samples is not None else None)
    assert fit.status == "converged"
    assert target.samples is not None or abs(fit.value.value) < 1e-6


@pytest.mark.parametrize("method", ["knn", "classifier", "bound"])
def test_turned_samples_are_named_as_such_by_estimates(method):
    with pytest.raises(InputError, match=r"or `x\.T` if its columns are the draws"):
        wk.estimate(p=X.T[:, :40], q=X.T[:, :40] + 1, method=method)
    with pytest.raises(InputError, match=r"p has dimension 50 and q has 2\. .*or `x\.T`"):
        wk.estimate(p=X.T, q=X, method=method)


COLUMN = lambda x: -0.5 * (x**2).sum(-1, keepdims=True)  # noqa: E731
SHAPES = {
    "a column": (COLUMN, {}),
    "a column of arrays": (lambda x: COLUMN(np.asarray(x)), {}),
    "SciPy's, a number for one row": (lambda x: np.squeeze(COLUMN(np.asarray(x))), {}),
    "one point, a vector of one": (lambda x: -0.5 * (x**2).sum(0, keepdims=True), {"batched": False}),
    "an energy's column": (None, {"energy": lambda x: -COLUMN(x)}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dim", [1, 2])
def test_one_number_per_row_is_read_in_any_shape(name, dim):
    log_prob, others = SHAPES[name]
    target = wk.Target(log_prob=log_prob, dim=dim, **others)
    for rows in (1, 2, 7):
        x = torch.from_numpy(np.random.default_rng(rows).normal(size=(rows, dim)))
        value, score = target.value_and_score(x)
        torch.testing.assert_close(value, -0.5 * x.square().sum(-1))
        torch.testing.assert_close(score, -x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", [lambda x: -x[:, 0], lambda x: np.squeeze(-np.asarray(x)), lambda x: -x])
def test_a_score_on_the_line_is_read_in_any_shape(score):
    target = wk.Target(log_prob=lambda x: -0.5 * x[:, 0] ** 2, score=score, dim=1)
    for rows in (1, 5):
        x = torch.ones(rows, 1, dtype=torch.float64)
        torch.testing.assert_close(target.gradient(x), -x)


def test_two_densities_of_scipy_are_compared():
    p, q = (wk.Target(log_prob=multivariate_normal([m, 0.0]).logpdf, dim=2, normalized=True) for m in (0.0, 1.0))
    assert wk.estimate(p=p, q=q).value == pytest.approx(0.5, abs=1e-8)
    assert wk.estimate(p=np.random.default_rng(0).normal(size=(400, 2)), q=q).value == pytest.approx(0.5, abs=0.3)
