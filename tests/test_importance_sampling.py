"""Importance sampling: divergences from one side's draws cover the truth, or say that they can't be trusted."""

import math

import pytest
import torch
from torch.distributions import MixtureSameFamily, MultivariateNormal, Normal, Uniform, kl_divergence

import whichkl as wk
from whichkl import Target
from whichkl.divergences.draws import importance_sampling
from whichkl.divergences.kinds import KINDS

D = torch.float64


def mvn(dim, shift=0.0, variance=1.0):
    return MultivariateNormal(torch.full((dim,), shift, dtype=D), variance * torch.eye(dim, dtype=D))


def known(p, dim, **more):
    return Target(log_prob=p.log_prob, normalized=True, dim=dim, **more)


def held(p, n, seed):
    return Target(samples=Target.of(p).draws(n, seed), log_prob=Target.of(p).log_prob, normalized=True)


TRUTH = {
    "forward_kl": lambda p, q: float(kl_divergence(p, q)),
    "reverse_kl": lambda p, q: float(kl_divergence(q, p)),
    "jeffreys": lambda p, q: float(kl_divergence(p, q) + kl_divergence(q, p)) / 2,
    "jeffreys_sum": lambda p, q: float(kl_divergence(p, q) + kl_divergence(q, p)),
}


@pytest.mark.parametrize("name", TRUTH)
def test_self_normalised_answers_are_absolute_and_cover(name):
    p, q = mvn(2), mvn(2, 0.3, 1.5)
    target = Target(log_prob=lambda x: p.log_prob(x) + 4.0, dim=2)
    repeats = [wk.estimate(p=target, q=q, divergence=name, method="self_normalised", n=2000, seed=s) for s in range(200)]
    truth = TRUTH[name](p, q)
    assert all(e.up_to is None and e.reliable and "biased low" in e.notes[0] for e in repeats)
    assert 180 <= sum(e.interval[0] <= truth <= e.interval[1] for e in repeats) <= 199


@pytest.mark.parametrize("name", TRUTH)
def test_self_normalised_answers_are_low_and_say_so_where_p_is_out_of_reach(name):
    p, q = mvn(10), mvn(10, 1.2)
    repeats = [importance_sampling.self_normalised(known(p, 10), Target.of(q), KINDS[name](), 300, seed) for seed in range(100)]
    assert sum(e.value for e in repeats) / 100 < TRUTH[name](p, q) - 0.05
    assert sum(e.reliable for e in repeats) < 20


def test_they_are_chosen_only_where_nothing_else_is_possible():
    target, q = Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=4), mvn(4, 0.3, 1.5)
    assert wk.estimate(p=target, q=q, divergence="reverse_kl").up_to == "log_z"
    assert wk.estimate(p=target, q=q, divergence="jeffreys").method.startswith("self-normalised")
    assert wk.estimate(p=mvn(4), q=q, divergence="jeffreys", method="self_normalised").reliable
    outside = Target(log_prob=lambda x: -x[:, 0], dim=1, support="positive")
    for name in ("reverse_kl", "jeffreys"):
        e = wk.estimate(p=outside, q=Normal(0.0, 1.0), divergence=name, method="self_normalised")
        assert e.value == math.inf and e.finite == "infinite"


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_draws_of_the_other_side_are_enough_where_both_are_normalised(name):
    p, q = mvn(4), mvn(4, 0.3, 0.8)
    covered, values = 0, []
    truth = TRUTH[name](p, q) if name == "reverse_kl" else float(kl_divergence(q, p))
    for seed in range(200):
        here, there = held(p, 1000, seed), known(q, 4)
        e = wk.estimate(p=here, q=there, divergence=name) if name == "reverse_kl" else wk.estimate(p=there, q=here)
        assert e.method.startswith("importance sampling, 1,000 samples of") and e.up_to is None
        covered += e.interval[0] <= truth <= e.interval[1]
        values.append(e.value)
    values = torch.tensor(values)
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(200)
    assert 180 <= covered <= 199


FAR = [
    (Normal(torch.tensor(0.0, dtype=D), 1.0), Normal(torch.tensor(3.0, dtype=D), 1.0), "heavy tail"),
    (Normal(torch.tensor(0.0, dtype=D), 1.0), Normal(torch.tensor(0.0, dtype=D), 2.0), "heavy tail"),
    (Uniform(torch.tensor(0.0, dtype=D), 1.0), Uniform(torch.tensor(0.0, dtype=D), 2.0), "averages to 0.5 over"),  # truth: ∞
    (Normal(torch.tensor(0.0, dtype=D), 1.0), Normal(torch.tensor(30.0, dtype=D), 1.0), "heavy tail"),
]


@pytest.mark.parametrize(("p", "q", "why"), FAR, ids=str)
def test_where_the_draws_do_not_reach_it_is_said(p, q, why):
    for seed in range(10):
        e = wk.estimate(p=held(p, 5000, seed), q=known(Target.of(q), 1), divergence="reverse_kl", method="importance")
        assert not e.reliable and any(why in note for note in e.notes[1:]), e


def test_a_far_lump_shows_in_the_mean_of_the_weights():
    lump = MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.999, 0.001], dtype=D)),
        Normal(torch.tensor([0.0, 30.0], dtype=D), torch.tensor([1.0, 1.0], dtype=D)),
    )
    p, q = held(Normal(torch.tensor(0.0, dtype=D), 1.0), 2000, 0), known(Target.of(lump), 1)
    e = wk.estimate(p=p, q=q, divergence="reverse_kl", method="importance")
    assert not e.reliable and "averages to 0.999 over these draws, not 1" in e.notes[-1]


def test_unnormalised_densities_are_refused():
    with pytest.raises(ValueError, match="requires normalised densities of both"):
        importance_sampling.from_other_side(Target(log_prob=mvn(1).log_prob, dim=1), held(mvn(1), 100, 0))
