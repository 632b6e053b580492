"""Reverse KL to flows and to modules of a user: the gradient, the start, the end, and the report of both."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.families import Flow, Gaussian, Module
from whichkl.families.layers import Shape
from whichkl.solvers import StickingTheLanding
from whichkl.solvers.draws.sticking_the_landing import FlowRows, _Path
from whichkl.solvers.work import QUIET

D = torch.float64
SMALL = {"transforms": 2, "hidden": (16,)}
SHORT = StickingTheLanding(steps=150, cycles=2, draws=64, judged_on=1_000, starts=2)
GAUSSIAN = MultivariateNormal(torch.tensor([3.0, -2.0], dtype=D), torch.tensor([[2.0, 0.9], [0.9, 0.7]], dtype=D))


def banana(x):
    """Normalised: x₁ ~ N(0, 1), x₂ ~ N(x₁² − 1, ½)."""
    return -x[:, 0].square() / 2 - 2 * (x[:, 1] - x[:, 0].square() + 1).square() - math.log(math.pi)


def flows(kind, dim=3, count=2, moved=0.1):
    """Flows off their start, within Gaussians of their own."""
    family, generator = Flow(kind, **SMALL), torch.Generator().manual_seed(0)
    trils = torch.randn(count, dim, dim, generator=generator, dtype=D).tril()
    trils.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
    locs = torch.randn(count, dim, generator=generator, dtype=D)
    rows = FlowRows(lambda: family.network(Shape(dim)).double(), range(count), locs, trils, 3.0)
    return family, rows, rows.starts + moved * torch.randn(rows.starts.shape, generator=generator, dtype=D)


class Bell(torch.nn.Module):
    def __init__(self, dtype=D, law=Normal):
        super().__init__()
        self.law = law
        self.centre = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        self.log_scale = torch.nn.Parameter(torch.zeros(2, dtype=dtype))

    def forward(self):
        return Independent(self.law(self.centre, self.log_scale.exp()), 1)


@pytest.mark.parametrize("kind", ["spline", "coupling", "maf"])
def test_flows_of_one_batch_are_the_models_that_are_returned(kind):
    family, rows, theta = flows(kind)
    u, log_q = rows.sample(theta, 40, 3)
    moved, pull = rows.path(theta.requires_grad_(True), 40, 3)
    for i in range(2):
        model = family.finished(rows.module(theta[i].detach(), i), Shape(3))
        x, _, volume = rows.place([i], u[i : i + 1])
        torch.testing.assert_close(model.log_prob(x[0]) + volume, log_q[i])
        at, matrix, _ = rows.place([i], moved[i : i + 1].detach())
        at = at[0].requires_grad_(True)
        (score,) = torch.autograd.grad(model.log_prob(at).sum(), at)
        torch.testing.assert_close(score @ matrix[0], pull[i])
        again = family.model(family.parameters(model))
        torch.testing.assert_close(again.log_prob(x[0]), model.log_prob(x[0]), rtol=0, atol=0)


def test_flow_starts_as_its_gaussian():
    _, rows, _ = flows("spline", moved=0.0)
    u, log_q = rows.sample(rows.starts, 40, 3)
    torch.testing.assert_close(log_q, Independent(Normal(torch.zeros(3, dtype=D), 1.0), 1).log_prob(u))


def test_gradient_is_right_on_average():
    _, rows, theta = flows("spline", dim=2, count=1)
    target = wk.Target(log_prob=lambda x: -x.square().sum(-1) - 0.1 * x.pow(4).sum(-1), dim=2)
    path = _Path(target, rows, 64, 200_000)
    repeats = torch.stack([path.gradient(theta, [0], seed)[0] for seed in range(100)])
    along = torch.randn(theta.shape[1], generator=torch.Generator().manual_seed(1), dtype=D)
    along = along / along.norm()
    losses = [path.losses(theta + step * along, [0], 5) for step in (1e-3, -1e-3)]  # common noise
    slope = (losses[0] - losses[1])[0] / 2e-3
    found = repeats @ along
    error = math.hypot(float(found.std()) / 10, float(slope.std()) / math.sqrt(slope.numel()))
    assert abs(float(found.mean() - slope.mean())) < 4 * error


def test_gradient_vanishes_where_q_is_p():
    family, rows, theta = flows("maf", dim=2, count=1)
    model = family.finished(rows.module(theta[0], 0), Shape(2))
    path = _Path(wk.Target(log_prob=model.log_prob, dim=2), rows, 64, 64)
    assert float(path.gradient(theta, [0], 0).abs().max()) < 1e-10
    assert float(path.losses(theta, [0], 0).abs().max()) < 1e-10


def test_gaussian_target_leaves_the_flow_at_rest():
    target = wk.Target(log_prob=GAUSSIAN.log_prob, dim=2, normalized=True)
    fit = wk.fit(target, Flow(**SMALL), solver=SHORT)
    assert fit.status == "converged"
    assert abs(fit.value.value) < 1e-6
    assert "family_too_small" not in fit.findings


def test_flow_gains_on_the_gaussian_and_is_saved(tmp_path):
    target = wk.Target(log_prob=banana, dim=2, normalized=True)
    gaussian, fit = wk.fit(target, Gaussian()), wk.fit(target, Flow(**SMALL), solver=SHORT)
    assert fit.solver == "sticking_the_landing"
    assert fit.value.up_to is None
    assert 0 < fit.value.value < 0.15 < 0.4 < gaussian.value.value
    assert fit.diagnostics.elbo.value - gaussian.diagnostics.elbo.value > 8 * fit.diagnostics.elbo.stderr
    assert fit.diagnostics.missing_modes.count == 0
    again = wk.fit(target, Flow(**SMALL), solver=SHORT)
    x = fit.model.sample((20,))
    torch.testing.assert_close(again.model.log_prob(x), fit.model.log_prob(x), rtol=0, atol=0)
    fit.save(tmp_path / "flow")
    torch.testing.assert_close(wk.Fit.load(tmp_path / "flow").model.log_prob(x), fit.model.log_prob(x), rtol=0, atol=0)


def test_flow_of_one_column_starts_as_its_gaussian_and_gains_on_it():
    _, rows, _ = flows("spline", dim=1, count=1, moved=0.0)
    u, log_q = rows.sample(rows.starts, 40, 3)
    torch.testing.assert_close(log_q, Normal(0.0, 1.0).log_prob(u[..., 0]))
    two = wk.problems.bimodal(1.5)
    target = wk.Target(log_prob=lambda x: two.log_prob(x[:, 0]), dim=1, normalized=True)
    fit = wk.fit(target, Flow(**SMALL), solver=SHORT, judge=False)
    assert fit.value.value < 0.02 < wk.fit(target, Gaussian(), judge=False).value.value


def test_flow_is_carried_into_a_support():
    gamma = torch.distributions.Gamma(torch.tensor(2.0, dtype=D), 1.0)
    target = wk.Target(log_prob=lambda x: gamma.log_prob(x).sum(-1), dim=2, support="positive", normalized=True)
    fit = wk.fit(target, Flow(**SMALL), solver=SHORT, judge=False)
    assert float(fit.model.sample((100,)).min()) > 0
    assert -4 * fit.value.stderr < fit.value.value < 0.02


def test_descent_goes_on_from_its_journal(tmp_path):
    target, seen = wk.Target(log_prob=banana, dim=2), []

    class Killed(Exception):
        pass

    def tell(step, done):
        seen.append(step)
        if len(seen) == 4:
            raise Killed

    arguments = {"family": Flow(**SMALL), "solver": replace(SHORT, steps=60), "judge": False}
    whole = wk.fit(target, **arguments)
    with pytest.raises(Killed):
        wk.fit(target, **arguments, journal=tmp_path / "journal", tell=tell)
    resumed = wk.fit(target, **arguments, journal=tmp_path / "journal")
    x = whole.model.sample((20,))
    torch.testing.assert_close(resumed.model.log_prob(x), whole.model.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_module_of_a_user_finds_the_mean_field_fit(dtype):
    target, bell = wk.Target(log_prob=GAUSSIAN.log_prob, dim=2), Bell(dtype)
    fit = wk.fit(target, bell, solver=StickingTheLanding(steps=400, cycles=2), judge=False)
    exact = wk.fit(target, Gaussian("diagonal"), judge=False).model
    torch.testing.assert_close(fit.model.mean.double(), exact.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(fit.model.variance.double(), exact.variance, rtol=0.05, atol=0)
    assert float(bell.centre.detach().abs().max()) == 0


def test_module_without_a_path_is_refused():
    class Coin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(2, dtype=D))

        def forward(self):
            return Independent(torch.distributions.Bernoulli(logits=self.logits), 1)

    with pytest.raises(InputError, match=r"has no `rsample`.*Return a law that has one"):
        wk.fit(wk.Target(log_prob=banana, dim=2), Coin())
    with pytest.raises(InputError, match="event shape"):
        wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=3), Bell())


def test_module_that_begins_where_p_has_no_mass_is_refused():
    target = wk.Target(log_prob=lambda x: torch.where((x > 1e3).all(-1), -x.square().sum(-1), -math.inf), dim=2)
    with pytest.raises(TargetError, match="ELBO isn't finite"):
        wk.fit(target, Bell(), solver=StickingTheLanding(steps=60, cycles=1))


def test_gradients_that_are_no_numbers_are_skipped_and_counted():
    calls = []

    def gradient(theta, which, seed):
        calls.append(which)
        g = 2 * theta
        return torch.where(torch.tensor(len(calls) % 10 == 0), math.nan, g)

    def losses(theta, which, seed):
        return theta.square().sum(-1, keepdim=True).expand(-1, 8)

    solver, start = StickingTheLanding(steps=100, cycles=3, tolerance=1e-4), torch.ones(2, 3, dtype=D)
    state = solver.descend(SimpleNamespace(gradient=gradient, losses=losses), start, 0.1, 0, QUIET)
    assert state.skipped.tolist() == [len(calls) // 10] * 2
    assert float(state.loss.max()) < 1e-3
    broken = SimpleNamespace(gradient=lambda theta, which, seed: theta * math.nan, losses=losses)
    state = replace(solver, skips=20).descend(broken, start, 0.1, 0, QUIET)
    assert not bool(state.active.any())
    assert float((state.best - 1).abs().max()) == 0


def test_advice_names_the_solver():
    advice = wk.advise(wk.Target(log_prob=banana, dim=2), Flow())
    assert advice.best.solver == "sticking_the_landing"
    assert wk.advise(wk.Target(log_prob=banana, dim=2), Module(Bell())).best.objective.name == "reverse_kl"
    assert "reverse_kl" in wk.advise(wk.Target(log_prob=banana, dim=2), wk.families.MixtureDensityNetwork()).missing


@pytest.mark.parametrize("fields", [{"steps": 0}, {"draws": 2.5}, {"clip": -1.0}, {"learning_rate": math.inf}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match="StickingTheLanding"):
        StickingTheLanding(**fields)
