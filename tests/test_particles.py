"""Particles: log Z and expectations against known truths, the same numbers from the same seed, and few calls."""

import math

import pytest
import torch

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.particles import Reference, temper
from whichkl.particles.tempering import conditional_ess, next_step, systematic

D = torch.float64


def wide(dim, scale=10.0):
    return Reference(torch.zeros(dim, dtype=D), scale * torch.eye(dim, dtype=D))


def z_scores(make, truth, seeds=12, **knobs):
    runs = [temper(make(), seed=seed, **knobs) for seed in range(seeds)]
    assert all(run.finished for run in runs)
    return torch.tensor([(run.log_z - truth) / run.log_z_stderr for run in runs]), runs


def test_log_z_of_a_gaussian_lies_within_its_error():
    make = lambda: wk.Target(log_prob=lambda x: -(x - 2).square().sum(-1) / 2, dim=5)  # noqa: E731
    z, _ = z_scores(make, 2.5 * math.log(2 * math.pi), particles=2048, islands=32)
    assert float(z.abs().max()) < 4
    assert abs(float(z.mean())) < 4 / math.sqrt(len(z))


def test_log_z_of_forty_gaussians_lies_within_its_error():
    make = lambda: wk.problems.gmm40("log_prob")  # noqa: E731
    z, runs = z_scores(make, 0.0, base=wide(2, 40.0), particles=4096, islands=32, keep=0.8)
    assert float(z.abs().max()) < 4
    assert max(run.log_z_stderr for run in runs) < 0.1


def test_log_z_of_many_wells_lies_within_its_error():
    make = lambda: wk.problems.many_well(8, "log_prob")  # noqa: E731
    z, runs = z_scores(make, 4 * 10.293479707, base=wide(8, 5.0), particles=8192, islands=32, keep=0.8)
    assert float(z.abs().max()) < 4
    assert max(run.log_z_stderr for run in runs) < 0.1


def test_expectations_and_their_errors():
    run = temper(wk.Target(log_prob=lambda x: -(x - 3).square().sum(-1) / 2, dim=2), particles=4096)
    value, stderr = run.mean(torch.cat([run.x, run.x.square()], 1))
    truth = torch.tensor([3.0, 3.0, 10.0, 10.0], dtype=D)
    assert float(((value - truth) / stderr).abs().max()) < 4
    assert float(run.log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-12)
    assert float(run.log_z_islands.exp().mean().log()) == pytest.approx(run.log_z)
    assert 0.5 < run.acceptance < 1
    assert run.draws(100, seed=1).shape == (100, 2)


def test_the_same_seed_gives_the_same_particles_and_the_global_state_stays():
    before = torch.random.get_rng_state()
    a, b = (temper(wk.problems.eight_schools(), particles=256, seed=3) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(a.x, temper(wk.problems.eight_schools(), particles=256, seed=4).x)


def test_calls_are_few_counted_and_bounded():
    calls = []

    def log_prob(x):
        calls.append(len(x))
        return -x.square().sum(-1)

    target = wk.Target(log_prob=log_prob, dim=3)
    calls.clear()
    run = temper(target, particles=512)
    assert len(calls) - run.calls in (0, 1)  # one more asks how the function wants to be called
    assert run.gradients == 512 * run.calls == target.evaluations["score"]
    short = temper(wk.problems.many_well(32, "log_prob"), particles=256, max_calls=30)
    assert short.calls <= 30
    assert not short.finished
    assert short.temperatures[-1] < 1


def test_points_outside_the_support_die_and_the_search_says_nothing_against_the_target():
    def log_prob(x):
        return torch.where(x[:, 0] > 0, -x.square().sum(-1) / 2, -math.inf)

    target = wk.Target(log_prob=log_prob, dim=2)
    run = temper(target, particles=2048)
    assert bool((run.x[:, 0] > 0).all())
    assert abs(run.log_z - math.log(math.pi)) < 5 * run.log_z_stderr
    assert target.evaluations["rejected"] == 0
    with pytest.raises(TargetError, match="−∞ at all 1024 points"):
        temper(wk.Target(log_prob=lambda x: torch.full_like(x[:, 0], -math.inf), dim=2))
    with pytest.raises(InputError, match="islands=3"):
        temper(target, particles=1024, islands=3)


def test_parts():
    logw = torch.tensor([0.0, -1.0, -2.0, -400.0], dtype=D)
    w = logw.exp()
    assert conditional_ess((logw - logw.max()).numpy()) == pytest.approx(float(w.mean() ** 2 / w.square().mean()))
    rise = next_step(1e6 * torch.rand(512, dtype=D), 1.0, 0.5)
    assert 0 < rise < 1e-4
    assert next_step(torch.zeros(5, dtype=D), 0.3, 0.5) == 0.3
    chosen = systematic(logw.repeat(2, 1), torch.Generator().manual_seed(0))
    counts = torch.bincount(chosen[0], minlength=4)
    assert bool(((counts - 4 * w / w.sum()).abs() < 1).all())
