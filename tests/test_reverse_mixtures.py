"""Mixtures by reverse KL: the ELBO's gradient, components put where mass is lacking, and what is gained by them."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import whichkl as wk
from oracle import reverse_loss
from whichkl.families import Gaussian, Mixture
from whichkl.families.mixture import mixture, mixture_parts
from whichkl.objectives import ReverseKL
from whichkl.solvers import SampleAverage
from whichkl.solvers.nodes.ensemble import Ensemble, Nodes, Points
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.nodes.sample_average import add_components, find_missing_mass

D = torch.float64


def far_apart(count=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    loc = 30 * torch.rand(count, 2, generator=generator, dtype=D) - 15
    tril = torch.eye(2, dtype=D) * (0.5 + torch.rand(count, 1, 1, generator=generator, dtype=D))
    weights = torch.rand(count, generator=generator, dtype=D) + 0.2
    return mixture(weights / weights.sum(), loc, tril, "full")


def log_prob_of(p, **known):
    return wk.Target(log_prob=p.log_prob, dim=2, **known)


def state_of(family, target, logits, loc, tril, count=64):
    nodes = Nodes(*gaussian_rule(target.dim, count, seed=0))
    return Ensemble.at(ReverseKL(), family, target, Points.none(target), nodes, (logits, loc, tril))


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_elbo_and_its_gradient_are_those_of_the_objective_on_the_same_nodes(covariance):
    generator = torch.Generator().manual_seed(1)
    family, target = Mixture(3, covariance), wk.problems.eight_schools()
    loc = torch.randn(2, 3, 10, generator=generator, dtype=D)
    tril = torch.diag_embed(0.5 + torch.rand(2, 3, 10, generator=generator, dtype=D))
    state = state_of(family, target, torch.randn(2, 3, generator=generator, dtype=D), loc, tril)
    rule = (state.nodes.z, state.nodes.w)
    for model, found in zip(state.models(), state.loss, strict=True):
        loss = reverse_loss(family, model, target.value_and_score, *rule)
        assert float(found) == pytest.approx(float(loss), abs=1e-10)
    origin, rows = state.origin(), torch.arange(2)
    slope = state.trial(origin, rows)[1]
    for _ in range(4):
        step = torch.randn(origin.shape, generator=generator, dtype=D)
        ahead, behind = (state.trial(origin + sign * 1e-5 * step, rows)[0] for sign in (1, -1))
        torch.testing.assert_close((ahead - behind) / 2e-5, (slope * step).sum(-1), rtol=1e-6, atol=1e-6)


def test_components_are_put_where_mass_is_lacking():
    p = far_apart()
    _, loc, tril, _ = mixture_parts(p)
    target = log_prob_of(p)
    state = state_of(Mixture(5), target, torch.zeros(1, 2, dtype=D), loc[None, :2], tril[None, :2])
    mass, found, factors = find_missing_mass(target, state, torch.zeros(0, 2, dtype=D), most=3, seed=0)
    assert len(found) >= 1
    nearest = torch.cdist(found, loc[2:]).min(1)
    assert float(nearest.values.max()) < 0.05
    assert bool((mass[:-1] >= mass[1:]).all())
    more = add_components(state, mass, found, factors)
    assert more.loc.shape[1] == 2 + len(found)
    assert float(more.loss) < float(state.loss)


@pytest.mark.parametrize("count", [3, 5])
def test_modes_far_apart_are_found_from_the_log_density_alone(count):
    p = far_apart(count)
    fit = wk.fit(log_prob_of(p, normalized=True), Mixture(count))
    assert fit.value.value == pytest.approx(0, abs=1e-3 + 4 * fit.value.stderr)
    probs, loc, _, _ = mixture_parts(fit.model)
    truth, where, _, _ = mixture_parts(p)
    order = torch.cdist(where, loc).argmin(1)
    torch.testing.assert_close(probs[order], truth, rtol=0.02, atol=0.005)
    assert "modes_missing" not in fit.findings


def test_more_components_never_lose():
    target = wk.problems.eight_schools()
    losses = [wk.fit(target, family).diagnostics.elbo for family in (Gaussian(), Mixture(2), Mixture(3))]
    for fewer, more in zip(losses, losses[1:], strict=False):
        assert more.value > fewer.value - 3 * math.hypot(fewer.stderr, more.stderr)
    assert losses[2].value > losses[0].value + 0.1


def test_a_mixture_that_a_start_already_matches_stays():
    p = MultivariateNormal(torch.tensor([3.0, -1.0], dtype=D), torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=D))
    solution = SampleAverage().solve(log_prob_of(p), Mixture(2), seed=0)
    assert solution.best.converged
    x = solution.best.model.sample((20_000,))
    gap = solution.best.model.log_prob(x) - p.log_prob(x)
    # Nodes of a split Gaussian miss a little of its KL; fresh draws say how little.
    assert float(gap.mean()) <= SampleAverage().node_loss + 4 * float(gap.std()) / math.sqrt(len(x))
