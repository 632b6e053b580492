"""What no method sees of itself: contradictions between draws and densities, samples that share rows, shapes beyond Gaussians."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, StudentT

import whichkl as wk
from whichkl import Target
from whichkl._checks import InputError
from whichkl.divergences.draws import bridge

D = torch.float64


def mvn(dim, shift=0.0, variance=1.0):
    return MultivariateNormal(torch.full((dim,), shift, dtype=D), variance * torch.eye(dim, dtype=D))


def held(dim, log_prob, seed=0, n=2000, **more):
    return Target(samples=Target.of(mvn(dim)).draws(n, seed), log_prob=log_prob, **more)


MISTAKES = {
    "sign": lambda x: 0.5 * x.square().sum(-1),
    "density for its log": lambda x: torch.exp(-0.5 * x.square().sum(-1)),
    "twice as wide": lambda x: -0.125 * x.square().sum(-1),
    "shifted": lambda x: -0.5 * (x - 1).square().sum(-1),
}


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_log_density_that_the_draws_contradict_gives_nothing_reliable(mistake, divergence, dim):
    e = wk.estimate(p=held(dim, MISTAKES[mistake]), q=mvn(dim, 0.0, 2.0), divergence=divergence)
    assert not e.reliable and not e.exact and e.finite != "certified"
    right = wk.estimate(p=held(dim, lambda x: -0.5 * x.square().sum(-1)), q=mvn(dim, 0.0, 2.0), divergence=divergence)
    assert right.reliable


def test_a_normaliser_that_is_off_is_seen():
    wrong = held(5, lambda x: mvn(5).log_prob(x) + 3, normalized=True)
    for name in ("forward_kl", "total_variation"):
        e = wk.estimate(p=wrong, q=mvn(5, 0.0, 2.0), divergence=name)
        log_z = re.search(r"given as normalised, and log Z is \+(\S+) ± (\S+)", e.notes[0]).groups()
        assert not e.reliable and abs(float(log_z[0]) - 3) < 4 * float(log_z[1])


@pytest.mark.parametrize(("dim", "shift", "variance"), [(2, 0.3, 1.5), (2, 0.0, 1.0), (20, 1.0, 1.0), (5, 0.3, 0.5)])
def test_draws_of_the_density_itself_are_not_accused(dim, shift, variance):
    for seed in range(40):
        p = held(dim, lambda x: mvn(dim).log_prob(x) + 3, seed, 1500)
        assert bridge.contradiction(p, Target.of(mvn(dim, shift, variance)), 2000, seed + 1000) is None


def test_a_mean_without_variance_is_not_trusted():
    p = torch.distributions.Independent(StudentT(torch.full((4,), 2.05, dtype=D)), 1)
    assert not any(wk.estimate(p=p, q=mvn(4), seed=seed).reliable for seed in range(5))
    line = wk.estimate(p=StudentT(torch.tensor(2.05, dtype=D)), q=Normal(torch.tensor(0.0, dtype=D), 1.0))
    assert not line.reliable and "quadrature was refused" in line.notes[0]


def test_samples_that_share_rows_and_atoms_against_a_density_are_seen():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 2)), rng.normal(size=(500, 2))
    for other in (x, np.concatenate([x[:50], y])):
        e = wk.estimate(p=x, q=other)
        assert not e.reliable and any("rows are in both samples" in note for note in e.notes)
    e = wk.estimate(p=rng.poisson(3, 1000).astype(float), q=rng.normal(3, 2, 1000))
    assert not e.reliable and "repeat as those of atoms do" in e.notes[0]


def test_columns_are_matched_by_name_where_they_have_names():
    x, y = np.random.default_rng(0).normal(size=(2, 300, 2))
    with pytest.raises(InputError, match="columns of p are a, b and those of q b, c"):
        wk.estimate(p=pd.DataFrame(x, columns=["a", "b"]), q=pd.DataFrame(y, columns=["b", "c"]))
    e = wk.estimate(p=pd.DataFrame(x, columns=["a", "b"]), q=pd.DataFrame(y, columns=["c", "d"]))
    assert "the columns a, b of p were compared with c, d of q, in this order" in e.notes
    rows = pd.DataFrame({"a": [0.1], "b": [0.9]})
    with pytest.raises(InputError, match="atoms of p are a, b and those of q b, a"):
        wk.estimate(p=rows, q=rows[["b", "a"]], form="probabilities")


def two_bumps(n, dim, rng):
    """Two bumps against one Gaussian with the same variance: 1.113 nats, in the first column alone."""
    x, y = rng.normal(size=(2, n, dim))
    x[:, 0] = np.where(rng.random(n) < 0.5, -3, 3) + 0.5 * x[:, 0]
    return x, y * np.r_[3, np.ones(dim - 1)]


def parity(n, dim, rng):
    """Only octants with an even number of negative signs: ln 2 nats, and no pair of columns shows any."""
    x, y = rng.normal(size=(2, n, dim))
    x[:, 0] *= np.sign(x[:, 0] * x[:, 1] * x[:, 2])
    return x, y


def banana(n, dim, rng):
    z = rng.normal(size=(2, n, 2))
    return tuple(np.column_stack([a[:, 0], 0.3 * a[:, 1] + b * a[:, 0] ** 2]) for a, b in zip(z, (1.0, 1.2), strict=True))


SHAPES = [
    pytest.param(two_bumps, 1000, 5, 1.113, marks=pytest.mark.slow),
    pytest.param(two_bumps, 1000, 10, 1.113, marks=pytest.mark.slow),
    (parity, 1000, 3, math.log(2)),
    (banana, 2000, 2, 0.667),
]


@pytest.mark.parametrize(("law", "rows", "dim", "truth"), SHAPES)
def test_shapes_that_no_gaussian_twin_has_are_not_answered_with_confidence(law, rows, dim, truth):
    for seed in range(6):
        x, y = law(rows, dim, np.random.default_rng(seed))
        e = wk.estimate(p=x, q=y, seed=seed)
        assert not e.reliable or e.interval[0] <= truth <= e.interval[1]
