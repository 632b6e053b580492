"""Correlated draws: effective numbers as ArviZ has them, error bars that cover, and thinning where independence is needed."""

import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from scipy.stats import chi2
from torch.distributions import MultivariateNormal, kl_divergence

import whichkl as wk
from programs import whichkl
from whichkl import Target
from whichkl.chains import chain_ids, disagreement, effective_draws, folds_in_time, standard_error, stretches, thinning
from whichkl.diagnostics import cross_fitted_losses
from whichkl.divergences.draws import monte_carlo
from whichkl.families import Flow, Gaussian, Mixture
from whichkl.solvers import ClosedForm
from whichkl.solvers.draws.batches import data_of
from whichkl.solvers.work import QUIET

D = torch.float64


def autoregressive(n, rho, seed, dim=1):
    """A stationary AR(1) chain with standard normal margins, (n, dim)."""
    noise = np.random.default_rng(seed).normal(size=(n, dim)) * math.sqrt(1 - rho**2)
    noise[0] /= math.sqrt(1 - rho**2)
    return torch.from_numpy(lfilter([1.0], [1.0, -rho], noise, axis=0))


def standard(dim, constant=0.0):
    return lambda x: -x.square().sum(-1) / 2 - dim / 2 * math.log(2 * math.pi) + constant


def chained(n, seed, dim=2, rho=0.9, chains=2, **more):
    """Two chains of a standard normal, stacked, with its density."""
    x = torch.cat([autoregressive(n // 2, rho, 2 * seed + one, dim) for one in range(2)])
    more = {"log_prob": standard(dim), "normalized": True, **more}
    return Target(samples=x, chains=chains, **more)


@pytest.mark.parametrize(("count", "length"), [(1, 500), (1, 501), (4, 1000), (3, 37), (2, 40)])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95, -0.5])
def test_effective_draws_agree_with_arviz(count, length, rho):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        az = pytest.importorskip("arviz")
    x = torch.stack([autoregressive(length, rho, seed)[:, 0] for seed in range(count)])
    for values in (x, x.square(), x + torch.arange(count)[:, None]):
        theirs = float(az.ess(values.numpy(), method="mean"))
        assert effective_draws(values.flatten(), chain_ids(count, count * length)) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_draws_of_an_autoregression(rho):
    n = 100_000
    found = effective_draws(autoregressive(n, rho, 3)[:, 0], chain_ids(1, n))
    assert found == pytest.approx(n * (1 - rho) / (1 + rho), rel=0.1)


def test_unequal_chains_weigh_by_their_rows():
    x = autoregressive(60_000, 0.8, 1)[:, 0]
    ids = torch.cat([torch.full((10_000,), 7), torch.full((50_000,), -2)])
    assert effective_draws(x, chain_ids(ids, 60_000)) == pytest.approx(60_000 / 9, rel=0.15)
    mixed = torch.randperm(60_000, generator=torch.Generator().manual_seed(0)).sort()[1]  # rows of chains needn't be neighbours
    assert effective_draws(x[mixed], chain_ids(1, 60_000)) > 40_000


def test_thinned_rows_are_nearly_independent():
    x = torch.cat([autoregressive(20_000, 0.9, 0), autoregressive(20_000, 0.5, 1)], dim=1)
    ids = chain_ids(4, 20_000)
    rows, step = thinning(x, ids)
    assert 15 <= step <= 25 and len(rows) == pytest.approx(20_000 / step, abs=4)
    few = x[rows]
    assert effective_draws(few[:, 0], ids[rows]) > 0.6 * len(rows)
    assert standard_error(few[:, 0], None)[1] is None and standard_error(few[:, 0], ids[rows])[1] <= len(rows)


BAD = [
    (3, "10 rows aren't 3 equally long chains"),
    (0, "there must be at least one"),
    (5, "the shortest chain has 2 rows"),
    ([0] * 9, "they aren't 10 whole numbers"),
    ([0.5] * 10, "they aren't 10 whole numbers"),
    ([math.nan] * 10, "they aren't 10 whole numbers"),
    (["a"] * 10, "not numbers"),
    (True, "they aren't 10 whole numbers"),
    ([0] * 8 + [1] * 2, "the shortest chain has 2 rows"),
]


@pytest.mark.parametrize(("chains", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_no_chain_is_refused(chains, message):
    with pytest.raises(ValueError, match=message):
        chain_ids(chains, 10)


def mvn(dim, shift=0.0, variance=1.0):
    return MultivariateNormal(torch.full((dim,), shift, dtype=D), variance * torch.eye(dim, dtype=D))


P, NEAR, FAR = mvn(2), mvn(2, 0.1), mvn(2, 0.5, 1.5)
FORWARD, REVERSE = (float(kl_divergence(*pair)) for pair in ((P, FAR), (FAR, P)))
UNNORMALISED = {"log_prob": standard(2, 4.0), "normalized": False}
SILENT = Target(log_prob=FAR.log_prob, normalized=True, dim=2)
ASKED = {
    "mean": ({}, FAR, "forward_kl", FORWARD, "monte_carlo", "Monte Carlo"),
    "control variate": ({}, NEAR, "forward_kl", 0.01, "monte_carlo", "control variate"),
    "jeffreys": (UNNORMALISED, FAR, "jeffreys", (FORWARD + REVERSE) / 2, "monte_carlo", "normalisers cancel"),
    "bridge": (UNNORMALISED, FAR, "forward_kl", FORWARD, "bridge", "bridge"),
    "bridge back": (UNNORMALISED, FAR, "reverse_kl", REVERSE, "bridge", "bridge"),
    "any kind": ({}, mvn(2, 1.0), "skew_forward_kl", None, "monte_carlo", "Monte Carlo"),
    "other side": ({}, None, "reverse_kl", float(kl_divergence(mvn(2, 0.3, 0.8), P)), "importance", "importance sampling"),
}


LONG = ("mean", "jeffreys", "bridge", "bridge back", "control variate", "any kind")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in ASKED])
def test_intervals_cover_with_chains_and_are_far_too_narrow_without(name):
    """AR(1), ρ = 0.9: 6,000 draws are worth some 315 independent ones; without `chains` the error is a fourth of that."""
    more, q, divergence, truth, method, words = ASKED[name]
    q = q or Target(log_prob=mvn(2, 0.3, 0.8).log_prob, normalized=True, dim=2)
    if truth is None:
        truth = wk.estimate(p=P, q=q, divergence=divergence, method="quadrature").value
    inside = {2: 0, None: 0}
    for seed in range(200):
        for chains in inside:
            p = chained(6000, seed, chains=chains, **more)
            e = wk.estimate(p=p, q=q, divergence=divergence, method=method, n=6000, seed=seed)
            assert words in e.method
            assert (e.ess is not None and e.ess < 9000) or chains is None
            inside[chains] += e.interval[0] <= truth <= e.interval[1]
    assert 180 <= inside[2] <= 199
    assert inside[None] < 150


def test_short_chains_are_called_unreliable():
    e = wk.estimate(p=chained(600, 0), q=FAR, method="monte_carlo")
    assert not e.reliable and e.notes[-1].startswith("the chains are worth ") and "error bars need 100" in e.notes[-1]
    assert e.method.startswith("Monte Carlo, 600 samples of p in 2 chains, worth ")


def test_methods_that_take_rows_as_independent_thin_the_chains():
    p = chained(40_000, 1, log_prob=None)
    y = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=D) * math.sqrt(1.5) + 0.5
    for name, method in (("forward_kl", None), ("forward_kl", "bound"), ("total_variation", None), ("energy", None)):
        e = wk.estimate(p=p, q=y, divergence=name, method=method)
        assert e.notes[-1].startswith("the chains of p were thinned to every ") and e.notes[-1].endswith(" of 40,000")
        assert e.n < 8000
    squared = {2: 0.0, None: 0.0}
    for seed in range(20):
        for chains in squared:
            e = wk.estimate(p=chained(6000, seed, chains=chains, log_prob=None), q=FAR, method="knn")
            squared[chains] += ((e.value - FORWARD) / e.stderr) ** 2 / 20
    assert squared[2] < 2.2 and squared[None] > 4


def test_a_held_out_value_counts_effective_draws_and_holds_out_stretches_of_time():
    inside = {2: 0, None: 0}
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    for seed in range(100):
        for chains in inside:
            target = chained(3000, seed, dim=1, log_prob=None, chains=chains)
            order, loss, how = cross_fitted_losses(target, Gaussian(), ClosedForm(), seed)
            e = monte_carlo.cross_entropy(loss, how, None, None if chains is None else target.chains[order])
            truth = entropy + float(kl_divergence(mvn(1), ClosedForm().solve(target, Gaussian(), seed).best.model))
            inside[chains] += e.interval[0] <= truth <= e.interval[1]
            assert chains is None or torch.equal(order, torch.arange(3000))
    assert 90 <= inside[2] <= 99 and inside[None] < 85
    value = wk.fit(target := chained(3000, 0, dim=1, log_prob=None), Gaussian(), seed=0).value
    assert value.up_to == "entropy_p" and value.ess < 1000 and target.chains is not None


def test_chains_survive_a_change_of_coordinates_and_a_large_fold():
    x = chained(24_000, 0, dim=1).samples.exp()
    target = Target(samples=x, support="positive", chains=2)
    assert torch.equal(target.unconstrained().chains, target.chains)
    fit = wk.fit(target, Gaussian(), seed=0)
    assert fit.value.n == 4800 and fit.value.ess < 2000 and "4,800 rows held out" in fit.value.method


def test_chains_need_equally_weighted_samples():
    for more in ({"log_prob": standard(1), "dim": 1}, {"samples": torch.randn(10, 1), "weights": torch.ones(10)}):
        with pytest.raises(ValueError, match="Cannot use `chains=`"):
            Target(chains=2, **more)


def test_the_command_takes_the_count_of_chains(tmp_path):
    np.savetxt(tmp_path / "p.csv", chained(6000, 0, dim=1).samples.numpy(), header="x1", comments="")
    start = ["estimate", "--p", tmp_path / "p.csv", "--q", "Normal(0.5,1)", "--json"]
    done = whichkl(*start, "--p-chains", "2")
    assert "of p were thinned to every" in json.loads(done.stdout)["notes"][-1]
    for more, message in ((["--p-chains", "7"], "6000 rows aren't 7"), (["--q-chains", "2"], "it isn't a file of samples")):
        done = whichkl(*start, *more)
        assert done.returncode == 2 and message in done.stderr


# ---- what is chosen on held-out rows


def chosen(target, family=None):
    fit = wk.fit(target, family or Mixture("auto"), judge=False)
    return fit.family.count, dict(fit.diagnostics.curve)


@pytest.mark.parametrize(
    ("rho", "count", "family"),
    [
        (0.95, 4, Mixture("auto")),
        (0.95, 1, Mixture("auto", "tied")),
        (0.8, 3, Mixture("auto", "diagonal")),
        pytest.param(0.95, 4, Mixture("auto", law="student_t"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_component_of_correlated_draws_of_a_gaussian(rho, count, family):
    for seed in range(1 + (count == 4)):
        x = torch.cat([autoregressive(900, rho, 10 * seed + one, dim=2) for one in range(count)])
        assert chosen(Target(samples=x, chains=count), family)[0] == 1


def test_two_components_of_correlated_draws_of_two():
    x = torch.cat([autoregressive(1_000, 0.9, one, dim=2) for one in range(4)])
    side = (autoregressive(4_000, 0.9, 9)[:, 0] > 0).to(D)
    x[:, 0] += 8 * side
    assert chosen(Target(samples=x, chains=4))[0] == 2


def test_interleaved_chains_are_the_stacked_ones():
    x = torch.cat([autoregressive(500, 0.9, one, dim=2) for one in range(3)])
    ids = chain_ids(3, 1_500)
    mixed = torch.randperm(3, generator=torch.Generator().manual_seed(0)).repeat(500)
    place = torch.stack([mixed, torch.zeros_like(mixed)], 1)[:, 0].argsort(stable=True)
    again = torch.empty_like(x)
    again[place] = x
    stacked, other = (chosen(Target(samples=rows, chains=of)) for rows, of in ((x, ids), (again, mixed)))
    assert stacked[0] == other[0]
    assert stacked[1][1].value == pytest.approx(other[1][1].value, abs=1e-6)
    assert stacked[1][1].stderr == pytest.approx(other[1][1].stderr, rel=1e-6)


@pytest.mark.slow
def test_the_errors_of_the_curve_cover():
    """The mean of −log q is that of N(0, I) up to O(1/ESS); its standardised errors have mean square 1."""
    z = []
    for seed in range(24):
        x = torch.cat([autoregressive(750, 0.9, 100 * seed + one, dim=1) for one in range(4)])
        one = chosen(Target(samples=x, chains=4))[1][1]
        assert one.ess < 1_000
        z.append((one.value - 0.5 * (1 + math.log(2 * math.pi))) / one.stderr)
    assert sum(value**2 for value in z) / len(z) < chi2.ppf(0.9999, len(z)) / len(z)


def test_folds_are_stretches_of_time():
    ids = chain_ids(torch.arange(1_003) % 2, 1_003)
    folds = folds_in_time(stretches(ids), 5)
    assert torch.cat(folds).sort().values.tolist() == list(range(1_003))
    for fold in folds:
        for one in range(2):
            own = fold[ids[fold] == one] // 2
            assert own.tolist() == list(range(int(own[0]), int(own[-1]) + 1)) and 98 <= len(own) <= 102
    assert [len(fold) for fold in folds_in_time(stretches(chain_ids(1, 4)), 10)] == [1, 1, 1, 1]


def test_networks_stop_by_stretches_of_time():
    x = torch.cat([autoregressive(500, 0.9, one, dim=2) for one in range(2)])
    data = data_of(Target(samples=x, chains=2), Flow(), 0, QUIET, 0, None)
    aside = {tuple(row) for row in data.validation.x.tolist()}
    rows = torch.tensor([tuple(row) in aside for row in x.tolist()]).view(-1, 50)
    assert set(rows.double().mean(1).tolist()) == {0.0, 1.0}
    assert int(rows[:, 0].sum()) == 2  # a tenth


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("n", [250, 500])
def test_slow_chains_of_one_law_agree(rho, n):
    found = [disagreement(autoregressive(4 * n, rho, seed), chain_ids(4, 4 * n), ["x"]) for seed in range(20)]
    assert sum(map(bool, found)) <= 1


@pytest.mark.parametrize(("chains", "stuck", "said"), [(4, [2], "1.0. without chain 2"), (3, [0], "1.0. without chain 0")])
def test_a_chain_that_disagrees_is_named(chains, stuck, said):
    x = np.random.default_rng(0).normal(size=(chains, 250, 2))
    x[stuck, :, 1] += 1.5
    p = Target(samples=x.reshape(-1, 2), chains=chains)
    fit = wk.fit(p, Gaussian())
    assert "chains_disagree" in fit.findings and not fit.value.reliable and fit.trust.startswith("Use neither")
    assert re.search(rf"the chains disagree: R̂ of `x2` is 1\.\d\d, and {said}", str(fit.value))
    found = wk.estimate(p=p, q=np.random.default_rng(1).normal(size=(500, 2)))
    assert not found.reliable and any(f"without chain {stuck[0]}" in note and note.endswith("in p") for note in found.notes)


def test_halves_of_the_chains_that_disagree_have_no_single_cause():
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) + 2 * (torch.arange(1000) < 500)[:, None]
    assert "no single chain is the cause" in disagreement(x, chain_ids(4, 1000), ["x"])
    assert disagreement(x, chain_ids(2, 1000), ["x"]).endswith("above 1.05")
    assert disagreement(x[:500] * 0, chain_ids(2, 500), ["x"]) == ""
