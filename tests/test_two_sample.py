"""The classifier two-sample test: uniform p-values where the model is right, small ones where it is wrong, and reasons."""

import json

import numpy as np
import pytest
import scipy
import torch
from scipy.stats import kstest
from torch.distributions import Categorical, Independent, MultivariateNormal, Normal, Poisson, StudentT

from whichkl.goodness import TwoSample, c2st, two_sample_test
from whichkl.goodness.two_sample import mann_whitney, ranks_of

F = torch.float64
ONE = MultivariateNormal(torch.zeros(3, dtype=F), torch.eye(3, dtype=F))
CAUCHY = Independent(StudentT(torch.ones(1, dtype=F)), 1)
COUNTS = Independent(Poisson(torch.tensor([2.0, 1.0], dtype=F)), 1)


def line(c):
    return Normal(2 * c[:, 0], 0.5 + c[:, 1].abs())


def classes(c):
    return Categorical(logits=c)


def alone(law):
    return lambda n: (law.sample((n,)), None, law)


def given(model):
    def rows(n):
        c = torch.randn(n, 3, dtype=F)
        y = model(c).sample().to(F)
        return (y[:, None] if y.ndim == 1 else y), c, model

    return rows


@pytest.mark.parametrize(
    "rows",
    [alone(ONE), alone(CAUCHY), alone(COUNTS), given(line), given(classes)],
    ids=["normal", "cauchy", "counts", "line", "classes"],
)
def test_p_values_are_uniform_where_the_model_is_right(rows):
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        x, context, model = rows(120)
        found.append(two_sample_test(x, None, context, model, seed).p_value)
    assert kstest(found, "uniform").pvalue > 0.005
    assert 0.005 < sum(p < 0.05 for p in found) / 200 < 0.105


def test_the_error_of_the_auc_covers_where_the_model_is_right():
    off = []
    for seed in range(200):
        x, y = torch.randn(2, 150, 2, dtype=F, generator=torch.Generator().manual_seed(seed))
        result = c2st(x, y, seed)
        off.append((result.auc - 0.5) / result.stderr)
    assert 0.85 < float(torch.tensor(off).std()) < 1.2


@pytest.mark.parametrize(
    ("x", "law"),
    [
        (lambda: ONE.sample((1000,)) + 0.3, ONE),
        (lambda: ONE.sample((1000,)) * 1.2, ONE),
        (lambda: (lambda z: torch.cat([z[:, :2], z[:, :1] * 0.6 + 0.8 * z[:, 2:]], 1))(ONE.sample((1000,))), ONE),
        (lambda: torch.distributions.StudentT(2.0).sample((1000, 3)).to(F), ONE),
        (lambda: torch.sign(ONE.sample((1000,))) * 0.9 + 0.4 * ONE.sample((1000,)), ONE),
        (lambda: (lambda a: torch.stack([a.cos(), a.sin()], 1) * 1.4)(6.28 * torch.rand(1000, dtype=F)),
         MultivariateNormal(torch.zeros(2, dtype=F), torch.eye(2, dtype=F))),
    ],
    ids=["mean", "scale", "correlation", "tails", "two bumps", "ring"],
)  # fmt: skip
def test_a_wrong_model_is_told_apart(x, law):
    result = two_sample_test(x(), None, None, law)
    assert result.differs
    assert result.p_value < 1e-3
    assert result.auc > 0.5 + 2 * result.stderr
    assert "can tell" in str(result)


@pytest.mark.parametrize(
    ("true", "model"),
    [
        (line, lambda c: Normal(1.6 * c[:, 0], 0.5 + c[:, 1].abs())),
        (line, lambda c: Normal(2 * c[:, 0], 1.4)),
        (classes, lambda c: Categorical(logits=0.4 * c)),
        (classes, lambda c: Categorical(logits=c[:, [1, 0, 2]])),
    ],
    ids=["slope", "spread", "confidence", "labels"],
)
def test_a_wrong_conditional_model_is_told_apart(true, model):
    y, c, _ = given(true)(4000)
    assert two_sample_test(y, None, c, model).p_value < 1e-3
    assert not two_sample_test(y, None, c, true).differs


def test_weights_stand_for_repeats():
    x = torch.cat([ONE.sample((2000,)), ONE.sample((2000,)) + 3])
    w = torch.cat([torch.ones(2000), torch.zeros(2000)])
    assert two_sample_test(x, None, None, ONE).differs
    assert not two_sample_test(x, w, None, ONE).differs


def test_the_same_seed_gives_the_same_answer_and_no_global_generator_moves():
    x, before = ONE.sample((200,)), torch.get_rng_state()
    assert two_sample_test(x, None, None, ONE, 3) == two_sample_test(x, None, None, ONE, 3)
    assert torch.equal(before, torch.get_rng_state())


class Silent:
    """A model that can only be evaluated."""


class Broken:
    event_shape = torch.Size([3])

    def sample(self, shape):
        raise RuntimeError("no draws today")


class Infinite(Broken):
    def sample(self, shape):
        return torch.full((*shape, 3), torch.inf)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Silent(), "no `sample`"),
        (Broken(), "RuntimeError: no draws today"),
        (Infinite(), "aren't finite"),
        (CAUCHY, "1 columns, and the rows have 3"),
    ],
)
def test_what_cannot_be_tested_says_why(model, says):
    result = two_sample_test(torch.randn(50, 3), None, None, model)
    assert result.auc is None
    assert says in result.reason
    assert says in str(result)
    assert not result.differs


def test_too_few_rows_broken_functions_and_still_columns_say_why():
    assert "too few" in two_sample_test(torch.randn(9, 3), None, None, ONE).reason
    assert "ValueError" in two_sample_test(torch.randn(50, 1), None, torch.randn(50, 1), lambda c: [][1:] or Normal(c, -1)).reason
    assert "not a Distribution" in two_sample_test(torch.randn(50, 1), None, torch.randn(50, 1), lambda c: c).reason
    assert "constant" in c2st(torch.zeros(50, 1), torch.zeros(50, 1)).reason


def test_a_column_that_is_constant_on_one_side_alone_is_told_apart():
    assert c2st(torch.zeros(100, 1), torch.randn(100, 1)).differs


def test_results_survive_json():
    for result in (c2st(torch.randn(100, 2), torch.randn(100, 2)), c2st(torch.randn(3, 2), torch.randn(3, 2))):
        assert TwoSample.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_ranks_and_mann_whitney_are_scipys():
    rng = np.random.default_rng(0)
    for digits in (0, 1, 9):  # many ties, some, none
        ours, theirs = rng.normal(0.1, 1, 200).round(digits), rng.normal(size=300).round(digits)
        np.testing.assert_array_equal(ranks_of(ours), scipy.stats.rankdata(ours))
        known = scipy.stats.mannwhitneyu(ours, theirs, alternative="greater", use_continuity=False, method="asymptotic")
        assert mann_whitney(ours, theirs) == pytest.approx(known.pvalue, rel=1e-12)
