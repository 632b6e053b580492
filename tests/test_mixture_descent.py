"""Mixtures by reverse KL descend with few gradients: on an expansion of log p, and with more nodes for log q alone."""

import math
from dataclasses import replace

import pytest
import torch

import whichkl as wk
from whichkl.families import Mixture
from whichkl.objectives import ReverseKL
from whichkl.solvers.nodes.ensemble import Ensemble
from whichkl.solvers.nodes.mixture_descent import with_more_entropy
from whichkl.solvers.nodes.points import Nodes, Points

D = torch.float64
TRIL = torch.tensor([[1.0, 0, 0], [0.6, 0.9, 0], [-0.3, 0.2, 0.7]], dtype=D)


def gaussian(x):
    return -torch.linalg.solve_triangular(TRIL, x.T, upper=False).square().sum(0) / 2


def banana(x):
    return -x[:, 0].square() / 8 - 2 * (x[:, 1] - x[:, 0].square() / 4).square() - x[:, 2].square() / 2


CENTRES = torch.tensor([[-2.0, 0, 0], [2, 0, 1]], dtype=D)


def two(x):
    return torch.logsumexp(-(x[:, None] - CENTRES).square().sum(-1) / 2, 1) - math.log(2) - 1.5 * math.log(2 * math.pi)


def logistic():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=D)
    sign = torch.where(x @ torch.tensor([1.0, -1, 0.5, 0, 2], dtype=D) > 0, 1.0, -1.0)
    return lambda b: -b.square().sum(-1) / 8 - torch.nn.functional.softplus(-sign * (b @ x.T)).sum(-1)


def ensemble(log_prob, loc, tril, count=256):
    target = wk.Target(log_prob=log_prob, dim=3).unconstrained()
    parts = (torch.zeros(1, len(loc), dtype=D), loc[None], tril.expand(1, len(loc), 3, 3))
    return Ensemble.at(ReverseKL(), Mixture(len(loc)), target, Points.none(target), Nodes.of(target, count, 0), parts)


APART = torch.tensor([[-1.0, 0.3, 0], [1, 0.2, 0.1]], dtype=D)


@pytest.mark.parametrize("log_prob", [gaussian, banana, two])
def test_expansion_is_the_log_density_at_its_nodes_and_at_no_tether_its_gradient_is_that_of_the_loss(log_prob):
    expanded = ensemble(log_prob, APART, TRIL)
    assert expanded.target.evaluations["score"] == 512  # nothing is evaluated twice
    plain, rows = replace(expanded, expansion=None), torch.zeros(1, dtype=torch.long)
    for one, other in zip(expanded.trial(plain.origin(), rows), plain.trial(plain.origin(), rows), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("log_prob", [banana, two])
def test_an_expansion_that_recalls_has_the_gradients_of_the_nodes_before_where_the_curvature_allows_it(log_prob):
    before, here = (ensemble(log_prob, APART + shift, TRIL) for shift in (0.02, 0.0))
    recalling, rows = here.recalling(before).expansion, torch.zeros(1, dtype=torch.long)
    assert torch.equal(recalling.at(here.expansion.x, rows)[1], here.expansion.score)
    error, without = (
        torch.linalg.vector_norm(one.at(before.expansion.x, rows)[1] - before.expansion.score, dim=-1)
        for one in (recalling, here.expansion)
    )
    assert float((error < 1e-9 * without.max()).double().mean()) > 0.5
    assert float(error.mean()) < float(without.mean())


def test_expansion_of_a_gaussian_holds_everywhere():
    expanded = ensemble(gaussian, APART, TRIL).expansion
    x = torch.randn(1, 512, 3, dtype=D, generator=torch.Generator().manual_seed(1))
    value, score = expanded.at(x, torch.zeros(1, dtype=torch.long))
    assert torch.allclose(value[0], gaussian(x[0]), atol=1e-9)
    y = x[0].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(gaussian(y).sum(), y)
    assert torch.allclose(score[0], slope, atol=1e-9)


def test_more_nodes_for_log_q_where_p_is_quadratic_and_none_where_q_is_p():
    more = Nodes.of(wk.Target(log_prob=gaussian, dim=3), 4096, 3)
    assert with_more_entropy(ensemble(gaussian, APART, TRIL), more).entropy.share == pytest.approx(1.0, abs=1e-9)
    exact = ensemble(two, CENTRES, torch.eye(3, dtype=D))
    assert with_more_entropy(exact, more).entropy.share == pytest.approx(0.0, abs=1e-9)
    assert float(with_more_entropy(exact, more).loss) == pytest.approx(0.0, abs=1e-9)


CASES = {"gaussian": (gaussian, 3), "banana": (banana, 3), "two": (two, 3), "logistic": (logistic(), 5)}


@pytest.mark.parametrize(("log_prob", "dim"), CASES.values(), ids=CASES)
def test_mixture_takes_at_most_four_times_the_gradients_of_the_gaussian_and_is_no_worse(log_prob, dim):
    fits = [wk.fit(wk.Target(log_prob=log_prob, dim=dim), family, judge=False) for family in ("gaussian", "mixture:2")]
    single, double = (one.target.evaluations["score"] for one in fits)
    assert double <= 4 * single
    elbo = []
    for one in fits:
        x = one.draws(20_000, seed=3)
        ratio = log_prob(x) - one.model.log_prob(x)
        elbo.append((float(ratio.mean()), float(ratio.std()) / math.sqrt(len(x))))
    (lower, error), (higher, other) = elbo
    assert higher >= lower - 4 * math.hypot(error, other) - 0.004  # what the nodes may cost
    assert fits[1].status == "converged"
