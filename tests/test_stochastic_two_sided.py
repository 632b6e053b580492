"""Divergences between the directions to networks: gradients against sums, ends of the paths, optima, and what goes wrong."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import whichkl as wk
from whichkl import Target
from whichkl._checks import InputError, TargetError
from whichkl.families import Autoregressive, Flow, Gaussian, Mixture, Module, Product
from whichkl.families.layers import Shape
from whichkl.families.network_family import NetworkModel
from whichkl.objectives import Jeffreys, JensenShannon, Renyi, SkewForwardKL, SkewReverseKL
from whichkl.problems import bimodal
from whichkl.samples import Block
from whichkl.solvers import NaturalGradient, Stochastic, StochasticTwoSided, TwoSided
from whichkl.solvers.draws.stochastic_two_sided import BothSides

D = torch.float64
BETWEEN = [Jeffreys(0.3), JensenShannon(0.4), SkewForwardKL(0.2), SkewReverseKL(0.2), Renyi(0.4), Renyi(1.7)]
FLOW = Flow(transforms=1, hidden=(16,))
SHORT = StochasticTwoSided(epochs=1, learning_rate=2e-2, batch=512, judged_on=512)
"""115 steps on fresh draws."""


class Bell(torch.nn.Module):
    """A normal law of one or more columns."""

    def __init__(self, loc=(0.0,), scale=1.0, law=Normal):
        super().__init__()
        self.law = law
        self.loc = torch.nn.Parameter(torch.tensor(loc, dtype=D))
        self.log_scale = torch.nn.Parameter(torch.full((len(loc),), math.log(scale), dtype=D))

    def forward(self):
        return Independent(self.law(self.loc, self.log_scale.exp()), 1)


class Pathless(Normal):
    """A normal law that doesn't say how its draws move with its parameters."""

    has_rsample = False

    def rsample(self, *args):
        raise AssertionError("it has none")

    def sample(self, shape=()):
        with torch.no_grad():
            return Normal(self.loc, self.scale).sample(shape)


class Bumps(torch.nn.Module):
    """A mixture of two bells, which torch can't draw with a path."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.0, 0.3], dtype=D))
        self.loc = torch.nn.Parameter(torch.tensor([-1.0, 1.0], dtype=D))
        self.log_scale = torch.nn.Parameter(torch.zeros(2, dtype=D))

    def forward(self):
        return MixtureSameFamily(Categorical(logits=self.logits), Normal(self.loc, self.log_scale.exp()))


def mean_gradient(criterion, model, rows, repeats):
    """Mean of the gradients of batches, and its standard error, a number a weight."""
    weights, found = list(model.module.parameters()), []
    for i in range(repeats):
        torch.manual_seed(1_000 + i)
        x = rows(i)
        log_p = criterion.target.log_prob(x) - criterion.log_z
        loss = criterion.loss(model, Block(x, torch.ones(len(x), dtype=D), log_p=log_p), torch.Generator())
        found.append(torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)]))
    every = torch.stack(found)
    return every.mean(0), every.std(0) / math.sqrt(repeats)


def by_sum(objective, log_p, log_q, weight):
    """The divergence over its curvature, as sums over all points: p's side and q's side each weighted by their density."""
    ratio = log_p - log_q
    at_q = torch.where(ratio.isfinite(), ratio, 0.0)
    return objective.loss(at_q, weight * log_p.exp(), at_q, weight * log_q.exp()) / objective.curvature


# ---- gradients


@pytest.mark.parametrize("law", [Normal, Pathless])
@pytest.mark.parametrize("objective", BETWEEN, ids=lambda o: o.spec)
def test_gradient_is_that_of_quadrature(objective, law):
    p, grid = bimodal(1.0), torch.linspace(-14, 14, 4_001, dtype=D)[:, None]
    step = torch.full((len(grid),), float(grid[1, 0] - grid[0, 0]), dtype=D)
    model = NetworkModel(Bell((0.4,), 1.6, law), Shape(1))
    weights = list(model.module.parameters())
    exact = by_sum(objective, p.log_prob(grid[:, 0]), model.log_prob(grid), step)
    truth = torch.cat([one.flatten() for one in torch.autograd.grad(exact, weights)])
    batch, repeats = 4_000, 40  # the log of a batch's mean is off by some thousandths of itself at most
    constant = 0.0 if objective.requires.label.count("normalized") else 5.0
    target = Target(log_prob=lambda x: p.log_prob(x[:, 0]) + constant, dim=1, normalized=constant == 0)
    log_z = constant if objective.reads_log_z else 0.0
    criterion = BothSides(objective, target, log_z, batch, 100, 0)
    found, error = mean_gradient(criterion, model, lambda i: p.sample((batch,)).reshape(-1, 1), repeats)
    assert bool(((found - truth).abs() < 4.5 * error + 2e-3 * truth.abs()).all()), (found, truth, error)
    assert float((error / truth.norm()).max()) < 0.1


@pytest.mark.parametrize("objective", BETWEEN, ids=lambda o: o.spec)
def test_gradient_is_that_of_enumeration(objective):
    states = torch.tensor(list(itertools.product(range(3), range(2))), dtype=D)
    log_p = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4, -0.9], dtype=D).log_softmax(0)

    def density(x):
        return log_p[(2 * x[:, 0] + x[:, 1]).long()]

    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = Autoregressive(hidden=(4,)).network(Shape(2, categories=(3, 2))).to(D)
    model = NetworkModel(network, Shape(2, categories=(3, 2)))
    exact = by_sum(objective, log_p, model.log_prob(states), torch.ones(6, dtype=D))
    truth = torch.cat([one.flatten() for one in torch.autograd.grad(exact, list(network.parameters()))])
    target = Target(log_prob=density, dim=2, support=["integer_interval(0, 2)", "boolean"], normalized=True)
    criterion = BothSides(objective, target, 0.0, 2_000, 100, 0)
    found, error = mean_gradient(criterion, model, lambda i: states[log_p.exp().multinomial(2_000, replacement=True)], 40)
    assert bool(((found - truth).abs() < 4.5 * error + 2e-3 * truth.norm()).all())
    assert float(error.norm()) < 0.2 * float(truth.norm())


def test_gradient_of_what_reads_draws_of_q_alone_vanishes_where_q_is_p():
    model = NetworkModel(Bell((1.0, -2.0), 0.7), Shape(2))
    target = Target(log_prob=lambda x: model.log_prob(x), dim=2, normalized=True)
    for objective in (Jeffreys(0.0), SkewReverseKL(0.3)):
        loss = BothSides(objective, target, 0.0, 50, 100, 0).loss(model, Block(torch.zeros(1, 2), torch.ones(1, dtype=D)), None)
        for one in torch.autograd.grad(loss, list(model.module.parameters())):
            assert float(one.abs().max()) < 1e-12


# ---- ends of the paths, and optima


def weights_of(solution):
    return torch.cat([one.flatten() for one in solution.best.model.module.parameters()])


def test_all_weight_on_forward_is_forward_kl_step_by_step():
    target = Target.of(bimodal(2.0))
    settings = {"epochs": 1, "learning_rate": 1e-2, "batch": 1_024}
    forward = Stochastic(**settings).solve(target, Module(Bumps()), 1)
    ours = StochasticTwoSided(**settings).toward(Jeffreys(1.0)).solve(target, Module(Bumps()), 1)
    torch.testing.assert_close(weights_of(ours), weights_of(forward), rtol=1e-6, atol=1e-6)
    fall = [one.history[0] - one.history[-1] for one in (forward, ours)]
    assert fall[0] == pytest.approx(fall[1], abs=1e-9)


@pytest.mark.parametrize("objective", [Jeffreys(0.0), JensenShannon(1 - 1e-5), SkewReverseKL(1e-5), Renyi(1e-3)], ids=str)
def test_the_other_end_is_reverse_kl(objective):
    target = Target.of(bimodal(1.5))
    reverse = NaturalGradient().solve(target, Gaussian(), 0).best.model
    model = replace(SHORT, learning_rate=5e-2).toward(objective).solve(target, Module(Bell()), 0).best.model
    assert float(model.mean) == pytest.approx(float(reverse.mean), abs=0.06)
    assert float(model.variance.sqrt()) == pytest.approx(float(reverse.variance.sqrt()), abs=0.06)


@pytest.mark.parametrize("objective", BETWEEN, ids=lambda o: o.spec)
def test_a_bell_ends_at_the_divergence_of_the_exact_optimum(objective):
    target = Target.of(bimodal(2.0))
    exact = TwoSided().toward(objective).solve(target, Gaussian(), 0).best
    solver = replace(SHORT, epochs=2, learning_rate=5e-2, judged_on=8_192)
    found = wk.fit(target, Bell((0.3,), 2.0), objective=objective, solver=solver)
    assert found.solver == "stochastic_two_sided"
    assert found.value.exact
    assert 0 <= found.value.value - exact.loss + 1e-6 < 0.01 * objective.curvature


@pytest.mark.parametrize(
    "objective",
    [one if i < 2 else pytest.param(one, marks=pytest.mark.slow) for i, one in enumerate(BETWEEN)],
    ids=lambda o: o.spec,
)
def test_a_flow_follows_both_bumps(objective):
    solver = replace(SHORT, epochs=3 if objective == Renyi(1.7) else 1)
    fit = wk.fit(bimodal(2.0), FLOW, objective=objective, solver=solver, judge=False)
    gaussian = TwoSided().toward(objective).solve(Target.of(bimodal(2.0)), Gaussian(), 0).best.loss
    assert fit.value.exact
    assert 0 <= fit.value.value < min(0.1 * objective.curvature, gaussian / 2)
    assert fit.diagnostics.history[-1] == pytest.approx(fit.value.value, abs=0.15 * objective.curvature)


@pytest.mark.parametrize("objective", [JensenShannon(), Renyi(0.5)], ids=lambda o: o.spec)
def test_a_law_without_a_path_is_fitted_by_its_scores(objective):
    fit = wk.fit(bimodal(2.0), Bumps(), objective=objective, solver=replace(SHORT, epochs=2, learning_rate=5e-2))
    assert 0 <= fit.value.value < 0.01 * objective.curvature


def test_categories_are_fitted_by_all_of_them():
    log_p = torch.tensor([2.0, 0.0, -1.0, 1.0, 0.5, -2.0], dtype=D).log_softmax(0)
    states = torch.tensor(list(itertools.product(range(3), range(2))), dtype=D)
    target = Target(
        log_prob=lambda x: log_p[(2 * x[:, 0] + x[:, 1]).long()] + 4.0,
        sampler=lambda n: states[log_p.exp().multinomial(n, replacement=True)],
        dim=2,
        support=["integer_interval(0, 2)", "boolean"],
    )
    for objective in (Jeffreys(), Renyi(0.5)):
        solver = replace(SHORT, learning_rate=5e-2).toward(objective)
        model = solver.solve(target, Autoregressive(hidden=(8,)), 0).best.model
        kl = float((log_p.exp() * (log_p - model.log_prob(states))).sum())
        assert 0 <= kl < 0.02


# ---- access


@pytest.mark.parametrize("objective", [Jeffreys(), Renyi(0.5), Renyi(1.5)], ids=lambda o: o.spec)
def test_the_normaliser_does_not_matter_where_it_need_not_be_known(objective):
    p, values = bimodal(1.5), []
    for constant in (0.0, 40.0):
        target = Target(
            sampler=lambda n: p.sample((n,)).reshape(-1, 1), log_prob=lambda x, c=constant: p.log_prob(x[:, 0]) + c, dim=1
        )
        values.append(SHORT.toward(objective).solve(target, Module(Bell()), 0))
    torch.testing.assert_close(weights_of(values[0]), weights_of(values[1]), rtol=1e-5, atol=1e-5)
    share = objective.log_z_share
    assert values[1].best.loss - values[0].best.loss == pytest.approx(40 * share, abs=1e-4)


def test_skew_reverse_kl_needs_no_draws_of_p():
    target = Target(log_prob=lambda x: bimodal(2.0).log_prob(x[:, 0]), dim=1, normalized=True)
    fit = wk.fit(target, FLOW, objective="skew_reverse_kl:0.2", solver=SHORT, judge=False)
    truth = wk.estimate(p=bimodal(2.0), q=fit.model, divergence="reverse_kl").value
    assert 0 <= truth < 0.2
    assert target.evaluations["samples"] == 0


def test_fixed_rows_are_held_out_of_the_value_and_a_support_is_kept():
    gamma = torch.distributions.Gamma(torch.tensor(3.0, dtype=D), torch.tensor(1.0, dtype=D))
    x = gamma.sample((1_000, 2))
    target = Target(samples=x, log_prob=lambda y: gamma.log_prob(y).sum(-1) + 2.0, support="positive")
    fit = wk.fit(target, FLOW, objective="jeffreys", solver=replace(SHORT, epochs=25, batch=128))
    assert "199 rows held out" in fit.value.method
    assert abs(fit.value.value) < 4 * fit.value.stderr + 0.1
    assert float(fit.model.sample((100,)).min()) > 0


def test_a_budget_ends_training():
    target = Target.of(bimodal(2.0))
    with target.evaluations.capped(60_000) as used:
        solution = StochasticTwoSided().toward(JensenShannon()).solve(target, FLOW, 0)
    assert 40_000 < sum(used.values()) <= 60_000
    assert solution.best.loss < 0.01
    assert math.isfinite(solution.best.loss)


# ---- what goes wrong, and going on


def test_it_goes_on_from_its_journal(tmp_path):
    class Killed(Exception):
        pass

    def tell(step, done):
        if "training" in step and done > 0.3:
            raise Killed

    x = bimodal(1.0).sample((300, 1))
    target = Target(samples=x, log_prob=lambda x: bimodal(1.0).log_prob(x[:, 0]), normalized=True)
    solver = StochasticTwoSided(steps=75, learning_rate=1e-2, judged_on=256)
    arguments = {"target": target, "family": Module(Bell()), "objective": "jensen_shannon", "solver": solver, "judge": False}
    whole = wk.fit(**arguments)
    with pytest.raises(Killed):
        wk.fit(**arguments, journal=tmp_path / "journal", tell=tell)
    assert any((tmp_path / "journal").rglob("*training*"))
    again = wk.fit(**arguments, journal=tmp_path / "journal")
    assert torch.equal(whole.model.module.loc, again.model.module.loc)


def test_an_infinite_divergence_is_refused_and_a_bounded_one_fitted():
    p = torch.distributions.Exponential(torch.tensor(1.0, dtype=D))
    target = Target(
        sampler=lambda n: p.sample((n, 1)),
        log_prob=lambda x: torch.where(x[:, 0] > 0, -x[:, 0], -math.inf),
        dim=1,
        normalized=True,
    )
    with pytest.raises(InputError, match=r"infinite.*bounded divergence such as jensen_shannon"):
        SHORT.toward(Jeffreys()).solve(target, Module(Bell()), 0)
    solution = SHORT.toward(JensenShannon()).solve(target, Module(Bell()), 0)
    assert 0 < solution.best.loss < math.log(2)


def test_draws_that_contradict_the_density_are_refused():
    target = Target(samples=torch.randn(200, 1, dtype=D), log_prob=lambda x: torch.where(x[:, 0] > 0, -x[:, 0], -math.inf))
    with pytest.raises(TargetError, match="where its own log density is −∞"):
        SHORT.toward(Jeffreys()).solve(target, Module(Bell()), 0)


def test_a_flat_density_is_refused():
    class Box(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.high = torch.nn.Parameter(torch.full((1,), 30.0, dtype=D))

        def forward(self):
            return Independent(torch.distributions.Uniform(-30.0, self.high, validate_args=False), 1, validate_args=False)

    with pytest.raises(InputError, match=r"smooth density"):
        SHORT.toward(JensenShannon()).solve(Target.of(bimodal(1.0)), Module(Box()), 0)


def test_other_families_are_refused_with_those_that_can():
    with pytest.raises(TargetError, match=r"Use another family \(Gaussian, Mixture, Flow, Autoregressive, Module\)"):
        wk.fit(bimodal(), Mixture(2, "tied"), objective="jeffreys")
    table = Target(sampler=lambda n: torch.ones(n, 2), log_prob=lambda x: x.sum(-1), dim=2, support="boolean")
    assert "use Autoregressive()" in wk.advise(table, Product("bernoulli")).missing["jeffreys"]
    assert wk.advise(bimodal(), FLOW).options[2].solver == "stochastic_two_sided"


@pytest.mark.parametrize("fields", [{"draws": 1}, {"judged_on": True}, {"steps": 0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match="isn't a whole number of at least"):
        StochasticTwoSided(**fields)
