"""Calibration: transforms of unseen rows are uniform where the model is right, and show where it isn't."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import smirnov
from scipy.stats import kstest, kstwo
from torch.distributions import (
    Categorical,
    ExpTransform,
    Independent,
    IndependentTransform,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    TransformedDistribution,
)

import whichkl as wk
from whichkl.families.student_t import MultivariateStudentT
from whichkl.goodness import Calibration, transform_calibration
from whichkl.goodness.margin_laws import margins
from whichkl.goodness.transform import _one_sided, band, distance, distance_p_value, levels

F = torch.float64
EYE = torch.eye(2, dtype=F)
TILTED = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=F)
GAUSS = MultivariateNormal(torch.tensor([1.0, -2.0], dtype=F), scale_tril=TILTED)
MIX = MixtureSameFamily(
    Categorical(torch.tensor([0.3, 0.7], dtype=F)),
    MultivariateNormal(torch.tensor([[0.0, 0.0], [4.0, -3.0]], dtype=F), scale_tril=torch.stack([TILTED, 2 * EYE])),
)
CLOSED = {
    "gaussian": GAUSS,
    "low rank": LowRankMultivariateNormal(torch.zeros(2, dtype=F), torch.ones(2, 1, dtype=F), torch.ones(2, dtype=F)),
    "diagonal": Independent(Normal(torch.zeros(2, dtype=F), torch.tensor([1.0, 3.0], dtype=F)), 1),
    "mixture": MIX,
    "student": MultivariateStudentT(torch.tensor(3.0, dtype=F), torch.zeros(2, dtype=F), TILTED),
    "students": Independent(StudentT(torch.tensor([1.0, 5.0], dtype=F)), 1),
    "log-normal": TransformedDistribution(GAUSS, [IndependentTransform(ExpTransform(), 1)]),
}
COUNTS = Independent(Poisson(torch.tensor([2.0, 0.5], dtype=F)), 1)
NAMES = ["a", "b"]


class DrawsAlone:
    """A law without closed forms: what a flow is to these checks."""

    def __init__(self, law):
        self.law, self.event_shape, self.sample, self.log_prob = law, law.event_shape, law.sample, law.log_prob


@pytest.mark.parametrize("name", CLOSED)
def test_closed_margins_agree_with_the_ranks_of_many_draws(name):
    law = CLOSED[name]
    x, draws = law.sample((50,)), law.sample((200_000,))
    ranks = torch.stack([(draws[:, j, None] <= x[:, j]).double().mean(0) for j in range(2)], 1)
    assert float((margins(law, x) - ranks).abs().max()) < 0.006


def test_laws_without_closed_margins_say_so():
    assert margins(COUNTS, COUNTS.sample((5,))) is None
    simplex = torch.distributions.Dirichlet(torch.ones(2, dtype=F))
    assert margins(simplex, simplex.sample((5,))) is None
    sticks = TransformedDistribution(CLOSED["diagonal"], [torch.distributions.StickBreakingTransform()])
    assert margins(sticks, sticks.sample((5,))) is None


@pytest.mark.parametrize("law", [GAUSS, DrawsAlone(MIX), COUNTS], ids=["closed", "draws", "counts"])
def test_p_values_are_uniform_where_the_model_is_right(law):
    joint, least = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        result = transform_calibration(law.sample((100,)), None, None, law, NAMES, seed)
        joint.append(distance_p_value(result.columns[2].distance, result.columns[2].effective))
        least.append(result.p_value)
        assert result.columns[0].exact == (law is GAUSS)
    assert kstest(joint, "uniform").pvalue > 0.005
    assert sum(p < 0.05 for p in least) / 200 < 0.1


@pytest.mark.parametrize(
    "model",
    [
        lambda c: Normal(2 * c[:, 0], 0.5 + c[:, 1].abs()),
        lambda c: Poisson(c[:, 0].exp()),
        lambda c: Independent(Normal(c[:, :2], 1.0), 1),
    ],
    ids=["line", "counts", "two columns"],
)
def test_conditional_models_are_calibrated_where_they_are_right(model):
    least = []
    for seed in range(100):
        torch.manual_seed(seed)
        c = torch.randn(150, 2, dtype=F)
        y = model(c).sample().to(F).reshape(150, -1)
        least.append(transform_calibration(y, None, c, model, NAMES[: y.shape[1]], seed).p_value)
    assert sum(p < 0.05 for p in least) <= 12


def test_wrong_models_show_where():
    x = GAUSS.sample((2000,))
    result = transform_calibration(x * torch.tensor([1.0, 1.3]), None, None, GAUSS, NAMES)
    assert not result.columns[0].differs
    assert result.columns[1].differs
    assert result.differs
    assert "b (gap" in str(result)


def test_a_missing_dependence_shows_in_all_columns_together_alone():
    apart = MultivariateNormal(GAUSS.loc, covariance_matrix=torch.diag(GAUSS.variance))
    result = transform_calibration(GAUSS.sample((2000,)), None, None, apart, NAMES)
    assert [one.differs for one in result.columns] == [False, False, True]


def test_a_wrong_conditional_spread_shows():
    c = torch.randn(2000, 1, dtype=F)
    y = Normal(c[:, 0], 1.0).sample()[:, None]
    assert transform_calibration(y, None, c, lambda c: Normal(c[:, 0], 1.3), ["y"]).differs
    assert not transform_calibration(y, None, c, lambda c: Normal(c[:, 0], 1.0), ["y"]).differs


@pytest.mark.parametrize("n", [30, 400])
def test_bands_hold_the_whole_curve_as_often_as_they_say(n):
    low, high = (np.array(side) for side in band(n, 0.9))
    rng, inside = np.random.default_rng(1), 0
    for _ in range(2000):
        curve = np.searchsorted(np.sort(rng.random(n)), levels(), side="right") / n
        inside += bool(((curve >= low) & (curve <= high)).all())
    assert 0.87 < inside / 2000 < 0.94


def test_the_distance_is_that_of_kolmogorov_and_smirnov():
    u = np.random.default_rng(0).random(77)
    known = kstest(u, "uniform")
    assert distance(u) == pytest.approx(known.statistic)
    assert distance_p_value(distance(u), 77) == pytest.approx(known.pvalue, abs=1e-3)
    for n in (20, 300, 1_001, 5_000):
        for z in np.linspace(1.3, 4.5, 15):  # chances from 0.07 down to 10⁻¹⁷
            chance = kstwo.sf(z / math.sqrt(n), n)
            assert distance_p_value(z / math.sqrt(n), n) == pytest.approx(chance, rel=1e-4 if chance > 1e-3 else 5e-3)


def test_the_chance_of_one_side_is_exact():
    for n in (1, 2, 77, 999, 1_000):
        for d in (0.0, 1e-9, 0.003, 0.05, 0.3, 0.7, 1 - 1e-12, 1.0):
            assert _one_sided(d, n) == pytest.approx(smirnov(n, d), rel=1e-11, abs=1e-300)


class NoDensity:
    event_shape = torch.Size([2])

    def sample(self, shape):
        return GAUSS.sample(shape)

    def log_prob(self, x):
        raise RuntimeError("no density")


def test_what_cannot_be_computed_says_why():
    x = GAUSS.sample((100,))
    assert "no `sample`" in transform_calibration(x, None, None, object(), NAMES).reason
    assert "too few" in str(transform_calibration(x[:5], None, None, GAUSS, NAMES))
    half = transform_calibration(x, None, None, NoDensity(), NAMES)
    assert [one.name for one in half.columns] == NAMES
    assert "no density" in half.notes[0]


def test_rounded_rows_and_weights_are_minded():
    x = GAUSS.sample((500,))
    assert "values repeat in a, b" in transform_calibration(x.round(decimals=1), None, None, GAUSS, NAMES).notes[0]
    both = torch.cat([x, x + 2])
    w = torch.cat([torch.ones(500), torch.zeros(500)])
    assert transform_calibration(both, None, None, GAUSS, NAMES).differs
    assert not transform_calibration(both, w, None, GAUSS, NAMES).differs


def test_results_survive_json():
    for result in (
        transform_calibration(GAUSS.sample((100,)), None, None, GAUSS, NAMES),
        transform_calibration(GAUSS.sample((5,)), None, None, GAUSS, NAMES),
    ):
        assert Calibration.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("support", ["positive", "interval(0, 2)", "simplex", ["positive", "real"]])
def test_a_fit_on_a_support_has_no_density_outside_it_and_says_where_it_lies(support):
    generator = torch.Generator().manual_seed(0)
    x = 0.1 + 1.5 * torch.rand(200, 2, generator=generator, dtype=torch.float64)
    x = x / x.sum(-1, keepdim=True) if support == "simplex" else x
    model = wk.fit(wk.Target(samples=x, support=support), judge=False).model
    outside = torch.tensor([[-0.5, 0.5]], dtype=torch.float64)
    both = torch.cat([outside, x[:1], torch.full_like(outside, float("nan"))])
    value = model.log_prob(both)
    assert float(value[0]) == -float("inf") and bool(value[1].isfinite()) and bool(value[2].isnan())
    assert model.support.check(both).tolist() == [False, True, False]
    assert wk.Target.of(model).bijection.describe() == wk.Target(samples=x, support=support).bijection.describe()
    assert model.expand((3,)).log_prob(x[:1]).shape == (3,)
