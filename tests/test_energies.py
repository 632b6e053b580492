"""Energies of continuous targets, functions and networks, and planar densities whose log Z is known."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.families import Gaussian
from whichkl.problems import RestrictedBoltzmann
from whichkl.problems.synthetic import TWO_MOONS_LOG_Z
from whichkl.targets.conversion import NegativeEnergy

D = torch.float64


class Bowl(nn.Module):
    """A small network inside a bowl that makes it integrable; dropout shows whether it is in training."""

    def __init__(self, dtype=torch.float32, column=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).to(dtype)
        for one in self.net.parameters():
            nn.init.normal_(one, std=0.5, generator=generator)
        self.column = column

    def forward(self, x):
        value = self.net(x) + x.square().sum(-1, keepdim=True) / 2
        return value if self.column else value[:, 0]


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("column", [True, False])
def test_network_energy_is_a_log_density_up_to_log_z(dtype, column):
    module = Bowl(dtype, column)
    target = wk.Target(energy=module, dim=2)
    assert target.access.label == "log_prob, differentiable"
    x = torch.randn(20, 2, dtype=D)
    value, score = target.value_and_score(x)
    assert value.dtype == score.dtype == D
    module.eval()
    at = x.to(dtype).requires_grad_(True)
    energy = module(at).reshape(-1)
    (slope,) = torch.autograd.grad(energy.sum(), at)
    torch.testing.assert_close(value, -energy.detach().double())
    torch.testing.assert_close(score, -slope.double())


def test_fit_leaves_the_users_module_as_it_was_and_owns_a_copy():
    module = Bowl()
    module.net[0].weight.requires_grad_(False)
    before, flags = state(module), [one.requires_grad for one in module.parameters()]
    target = wk.Target(energy=module, dim=2)
    fit = wk.fit(target)
    assert module.training
    assert [one.requires_grad for one in module.parameters()] == flags
    assert all(one.grad is None for one in module.parameters())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    x = torch.randn(5, 2, dtype=D)
    known = target.log_prob(x)
    with torch.no_grad():
        for one in module.parameters():
            one.add_(1.0)
    torch.testing.assert_close(target.log_prob(x), known, rtol=0, atol=0)
    assert fit.status == "converged"


def test_fit_to_an_energy_is_the_fit_to_its_log_density():
    module = Bowl(D).eval()
    by_energy = wk.fit(wk.Target(energy=module, dim=2), judge=False)
    by_function = wk.fit(wk.Target(log_prob=lambda x: -module(x)[:, 0], dim=2), judge=False)
    torch.testing.assert_close(by_energy.model.mean, by_function.model.mean, rtol=0, atol=0)
    assert by_energy.value == by_function.value
    assert by_energy.value.up_to == "log_z"


def test_elbo_of_a_float32_network_is_below_log_z():
    target = wk.Target(energy=Bowl(), dim=2)
    fit = wk.fit(target)
    step = torch.arange(-8, 8, 0.02, dtype=D)
    grid = torch.stack(torch.meshgrid(step, step, indexing="ij"), -1).reshape(-1, 2)
    log_z = float(target.log_prob(grid).detach().logsumexp(0)) + 2 * math.log(0.02)
    elbo = fit.diagnostics.elbo
    assert elbo.value - 4 * elbo.stderr < log_z < elbo.value + 0.1  # a bowl is nearly normal


def test_energy_in_a_support():
    target = wk.Target(energy=lambda x: x.sum(-1) - x.log().sum(-1), dim=2, support="positive")  # two Gamma(2, 1)
    fit = wk.fit(target, Gaussian("diagonal"))
    assert float(fit.model.sample((100,)).min()) > 0
    assert -4 * fit.diagnostics.elbo.stderr < -fit.diagnostics.elbo.value < 0.2  # log Z = 0


@pytest.mark.parametrize(
    ("energy", "match"),
    [(3.0, "it is a `float`"), (None, "it is a `NoneType`"), ("bowl", "it is a `str`")],
    ids=str,
)
def test_what_cannot_be_called_is_refused(energy, match):
    with pytest.raises(InputError, match=f"Cannot use `energy=`: {match}"):
        NegativeEnergy(energy)


def test_module_that_cannot_be_copied_is_refused():
    module = Bowl()
    module.kept = module.net(torch.zeros(1, 2))  # a tensor in a graph can't be copied
    with pytest.raises(InputError, match=r"the module can't be copied .*Compute what it derives"):
        wk.Target(energy=module, dim=2)


def test_energy_of_a_wrong_shape_or_that_is_no_number_is_refused():
    with pytest.raises(TargetError, match="returned shape"):
        wk.fit(wk.Target(energy=nn.Linear(2, 2).double(), dim=2))
    with pytest.raises(TargetError, match=r"^Cannot "):
        wk.fit(wk.Target(energy=lambda x: x.sum(-1) * math.nan, dim=2))


def test_boltzmann_machine_is_copied_too():
    machine = RestrictedBoltzmann(5, 3)
    before = copy.deepcopy(state(machine))
    wk.fit(wk.Target(energy=machine, dim=5, support="boolean"))
    assert all(one.requires_grad for one in machine.parameters())
    for name, value in machine.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def grid(step, *ends):
    axes = [torch.arange(low, high, step, dtype=D) for low, high in ends]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(ends))


def test_planar_problems_have_the_log_z_that_they_say():
    x = grid(0.02, (-6, 6), (-6, 6))
    assert float(wk.problems.two_moons().log_prob(x).logsumexp(0)) + 2 * math.log(0.02) == pytest.approx(
        TWO_MOONS_LOG_Z, abs=5e-8
    )
    u, t = x[:, 0], x[:, 1]  # x₂ = u² − 1 + t has the area of (u, t)
    banana = wk.problems.banana().log_prob(torch.stack([u, u.square() - 1 + t], 1))
    assert float(banana.logsumexp(0)) + 2 * math.log(0.02) == pytest.approx(0, abs=1e-7)
    x = grid(0.05, (-24, 24), (-8, 8))  # and x₂ = exp(x₁/2) t has exp(x₁/2) of it
    funnel = wk.problems.funnel().log_prob(torch.stack([x[:, 0], (x[:, 0] / 2).exp() * x[:, 1]], 1)) + x[:, 0] / 2
    assert float(funnel.logsumexp(0)) + 2 * math.log(0.05) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("dim", [2, 10])
def test_funnel_is_its_conditionals(dim):
    x = torch.randn(50, dim, dtype=D)
    rest = Normal(torch.zeros(1, dtype=D), (x[:, :1] / 2).exp()).log_prob(x[:, 1:]).sum(-1)
    first = Normal(torch.tensor(0.0, dtype=D), 3.0).log_prob(x[:, 0])
    torch.testing.assert_close(wk.problems.funnel(dim).log_prob(x), first + rest)


def test_banana_is_its_conditionals():
    x = torch.randn(50, 2, dtype=D)
    bent = Normal(x[:, 0].square() - 1, 0.5).log_prob(x[:, 1])
    torch.testing.assert_close(wk.problems.banana().log_prob(x), Normal(0.0, 1.0).log_prob(x[:, 0]) + bent)


@pytest.mark.parametrize("dim", [1, 2.0, True])
def test_funnel_without_a_neck_is_refused(dim):
    with pytest.raises(InputError, match=r"Cannot make a funnel.*Use at least 2"):
        wk.problems.funnel(dim)
