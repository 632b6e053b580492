"""Ascents: both kinds climb to the same modes, and what they say of where they end is what a fresh look finds."""

import pytest
import torch

import whichkl as wk
from whichkl.solvers.ascents import ascend, ascend_by_newton
from whichkl.solvers.nodes.ensemble import Nodes
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.nodes.natural_gradient import Gaussians
from whichkl.solvers.nodes.starts import find_modes

D = torch.float64


def climbed(f, x, climb):
    """The ends of ascents of f, and the number of calls."""
    calls = 0

    def trial(at, rows):
        nonlocal calls
        calls += 1
        at = at.detach().requires_grad_(True)
        with torch.enable_grad():
            value = f(at)
        return value.detach(), torch.autograd.grad(value.sum(), at)[0]

    return climb(trial, x), calls


def points(dim, scale=3.0):
    return scale * torch.randn(8, dim, generator=torch.Generator().manual_seed(0), dtype=D)


FUNCTIONS = {
    "a parabola of many scales": (lambda x: -((x - 1) * torch.tensor([1e-4, 1.0, 1e5], dtype=D)).square().sum(-1) / 2, 3),
    "heavy tails": (lambda x: -1.5 * torch.log1p((x - 30).square()).sum(-1), 4),
    "an exponential": (lambda x: -x.sum(-1) - torch.exp(-x).sum(-1), 5),
    "a curved valley": (lambda x: -(x[:, 0] - 1).square() / 2 - 5 * (x[:, 1] - x[:, 0].square()).square(), 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_newton_climbs_to_the_mode_in_fewer_calls(name):
    f, dim = FUNCTIONS[name]
    ends, calls = climbed(f, points(dim), ascend_by_newton)
    others, more = climbed(f, points(dim), ascend)
    assert float(ends.decrement.max()) < 1e-7
    assert float(ends.value.min()) > float(others.value.max()) - 1e-6
    assert calls < more


@pytest.mark.parametrize("climb", [ascend, ascend_by_newton])
def test_ascents_end_on_modes(climb):
    target = wk.problems.gmm40("log_prob")
    y = 40 * torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=D)
    ends = climb(lambda at, rows: target.trial(at), y)
    assert float(ends.decrement.max()) < 1e-7
    assert bool((ends.value >= target.log_prob(y)).all())
    assert float(target.trial(ends.x)[1].abs().max()) < 0.01


def test_newton_leaves_a_saddle_upwards():
    f = lambda x: -x[:, 0].square() / 2 + x[:, 1].square() / 2 - x[:, 1].pow(4) / 4  # noqa: E731
    begin = torch.tensor([[1.0, 1e-3], [-2.0, -1e-3]], dtype=D)
    ends, _ = climbed(f, begin, ascend_by_newton)
    torch.testing.assert_close(ends.x, torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=D), atol=1e-3, rtol=0)


def test_a_mode_in_units_of_eighteen_orders_has_its_laplace_approximation():
    scale = torch.tensor([1e4, 1.0, 1e-5], dtype=D)
    modes = find_modes(wk.Target(log_prob=lambda x: -((x - 1) / scale).square().sum(-1) / 2, dim=3).unconstrained(), 0)
    assert len(modes.locs) == 1
    torch.testing.assert_close(modes.trils[0].diagonal(), scale, rtol=1e-4, atol=0)


def skewed(dim=4):
    """A Gumbel law in correlated coordinates."""
    mixing = torch.eye(dim, dtype=D) + 0.4 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(2), dtype=D)
    return wk.Target(log_prob=lambda x: -(x @ mixing + torch.exp(-x @ mixing)).sum(-1), dim=dim).unconstrained()


def test_an_ascent_begins_and_ends_without_a_call():
    target, (z, w) = skewed(), gaussian_rule(4, 128, 0)
    eye = torch.eye(4, dtype=D).expand(2, -1, -1)
    state = Gaussians.at(target, Nodes(z, w), torch.tensor([[0.5] * 4, [0.0] * 4], dtype=D), torch.stack([eye[0], 0.7 * eye[1]]))
    for _ in range(3):  # some calls each: far from the end, in the middle, and near it
        before = target.evaluations["score"]
        state = state.ascended(6)
        assert target.evaluations["score"] - before <= 6 * 2 * len(z)
        fresh = Gaussians.at(target, Nodes(z, w), state.loc, state.tril)
        for name in ("elbo", "b", "a", "residual"):
            torch.testing.assert_close(getattr(state, name), getattr(fresh, name), rtol=1e-9, atol=1e-11)
    assert float(state.residual.max()) < 2e-3
