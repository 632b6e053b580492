"""Supports: every support that torch's laws name is read as one constraint per column, or refused in words."""

import math

import pytest
import torch
from torch.distributions import (
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Gamma,
    GeneralizedPareto,
    Independent,
    MixtureSameFamily,
    Pareto,
    Uniform,
    constraints,
)

import whichkl as wk
from whichkl.families import Flow, LinearGaussian
from whichkl.solvers import Stochastic

LOW, HIGH = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0])
COMPONENTS = Uniform(torch.tensor([[0.0, 1.0], [1.0, 2.0]]), torch.tensor([[2.0, 3.0], [3.0, 4.0]]))
LAWS = {
    "uniform": (Independent(Uniform(LOW, HIGH), 1), [(0, 1), (-1, 3)]),
    "a batch of uniforms": (Uniform(LOW, HIGH), [(0, 1), (-1, 3)]),
    "pareto": (Independent(Pareto(HIGH, HIGH), 1), [(1, math.inf), (3, math.inf)]),
    "generalised pareto": (Independent(GeneralizedPareto(LOW, HIGH, -HIGH), 1), [(0, 1), (-1, 0)]),
    "a mixture of numbers": (MixtureSameFamily(Categorical(torch.ones(2)), Uniform(LOW, HIGH)), [(-1, 3)]),
    "a mixture of rows": (MixtureSameFamily(Categorical(torch.ones(2)), Independent(COMPONENTS, 1)), [(0, 3), (1, 4)]),
    "gamma": (Independent(Gamma(HIGH, HIGH), 1), [(0, math.inf)] * 2),
    "beta": (Independent(Beta(HIGH, HIGH), 1), [(0, 1)] * 2),
    "dirichlet": (Dirichlet(torch.ones(3)), [(-math.inf, math.inf)] * 3),
}


@pytest.mark.parametrize("name", LAWS)
def test_samples_take_the_support_of_their_law(name):
    law, ends = LAWS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = law.sample((100,)).double()
    target = wk.Target(samples=x, support=law.support)
    assert target.bijection.bounds == ends
    free = target.unconstrained().samples
    torch.testing.assert_close(target.bijection.forward(free), x.reshape(100, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "support",
    [
        constraints.interval(LOW, HIGH),
        constraints.independent(constraints.half_open_interval(LOW, HIGH), 1),
        constraints.stack([constraints.interval(0.0, 1.0), constraints.interval(-1.0, 3.0)], -1),
        constraints.cat([constraints.interval(0.0, 1.0), constraints.interval(-1.0, 3.0)], -1, [1, 1]),
        [constraints.interval(LOW[:1], HIGH[:1]), "interval(-1, 3)"],
        {"x1": constraints.interval(LOW[:1], 1.0), "x2": "interval(-1, 3)"},
    ],
)
def test_a_support_may_be_given_in_every_form(support):
    x = LOW + torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * (HIGH - LOW)
    assert wk.Target(samples=x, support=support).bijection.bounds == [(0, 1), (-1, 3)]


def test_whole_numbers_have_their_own_ends_per_column_and_an_infinite_end_is_none():
    target = wk.Target(samples=torch.tensor([[0.0, 5.0], [3.0, 1.0]]), support=Binomial(torch.tensor([3, 5]), LOW.abs()).support)
    assert target.bijection.levels == ((0, 3), (0, 5))
    ends = constraints.interval(torch.tensor([0.0, -torch.inf, -torch.inf]), torch.tensor([torch.inf, 1.0, torch.inf]))
    kinds = [str(one) for one in wk.Target(dim=3, support=ends).bijection.constraints]
    assert kinds == ["GreaterThanEq(lower_bound=0.0)", "LessThan(upper_bound=1.0)", "Real()"]


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (constraints.interval(torch.zeros(3), torch.ones(3)), r"shape \(3,\) for 2 columns"),
        (constraints.interval(LOW, LOW), "nothing between its ends 0 and 0"),
        (constraints.interval(LOW, torch.tensor([1.0, torch.nan])), "nothing between its ends -1 and nan"),
        (Uniform.support, "no bijection"),
        (constraints.lower_cholesky, "constrains a matrix"),
        ([constraints.simplex, constraints.real], "constrains a whole row"),
        (constraints.independent(constraints.simplex, 1), "constrains a matrix"),
    ],
)
def test_a_support_of_something_else_is_refused(support, message):
    with pytest.raises(wk.InputError, match=message):
        wk.Target(samples=torch.full((5, 2), 0.5), support=support)


@pytest.mark.parametrize("family", [LinearGaussian(), Flow(kind="maf", transforms=1, hidden=(8,))])
@pytest.mark.parametrize("kind", ["row", "column", "number", "positive row", "positive number"])
def test_a_model_at_one_x_is_one_distribution(family, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    y = x + 0.3 * torch.randn(300, 2, generator=generator, dtype=torch.float64)
    y = y if kind.endswith("row") else y[:, :1] if kind == "column" else y[:, 0]
    support = "positive" if kind.startswith("positive") else None
    solver = Stochastic(epochs=3, learning_rate=0.01) if isinstance(family, Flow) else None
    fit = wk.fit(wk.Target(samples=(x, y.exp() if support else y), support=support), family, solver=solver, judge=False)
    law = fit.model(x[:1])
    target = wk.Target.of(law)
    drawn = target.draws(2000, seed=1)
    assert drawn.shape == (2000, y.reshape(300, -1).shape[1])
    where = drawn if len(law.event_shape) else drawn[:, 0]
    torch.testing.assert_close(target.log_prob(drawn), law.log_prob(where).to(drawn.dtype), rtol=1e-4, atol=1e-4)
    assert abs(wk.estimate(p=target, q=target).value) < 1e-6
    free = target.unconstrained()
    assert bool(free.log_prob(free.draws(10, seed=0)).isfinite().all())
    with pytest.raises(wk.InputError, match=r"batch shape \(2,\)"):
        wk.Target.of(fit.model(x[:2]))
