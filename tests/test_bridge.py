"""Bridge sampling: log Z and absolute KLs of unnormalised densities, with errors that cover, or a word that they don't."""

import math

import pytest
import torch
from torch.distributions import HalfNormal, MultivariateNormal, Normal, kl_divergence

import whichkl as wk
from whichkl import Target
from whichkl._checks import TargetError
from whichkl.divergences.draws import bridge

D = torch.float64
SHIFT = 5.0


def mvn(dim, shift=0.0, variance=1.0):
    return MultivariateNormal(torch.full((dim,), shift, dtype=D), variance * torch.eye(dim, dtype=D))


def unnormalised(p, dim, constant=SHIFT):
    return Target(sampler=lambda n: p.sample((n,)), log_prob=lambda x: p.log_prob(x) + constant, dim=dim)


ASKED = {
    "log_z": (bridge.log_z, lambda p, q: SHIFT),
    "forward_kl": (bridge.forward_kl, lambda p, q: float(kl_divergence(p, q))),
    "reverse_kl": (bridge.reverse_kl, lambda p, q: float(kl_divergence(q, p))),
}
PAIRS = [
    (mvn(2), mvn(2, 0.3, 1.5), 2),
    (mvn(10), mvn(10, 0.0, 3.0), 10),  # KL 2.2 and 4.5
    (mvn(1, 0.0), mvn(1, 3.0), 1),  # KL 4.5
    (HalfNormal(torch.ones(1, dtype=D)), mvn(1, 0.5), 1),  # q has mass where p has none
]


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_right_on_average_and_the_error_covers(name, pair):
    p, q, dim = PAIRS[pair]
    if pair == 3 and name == "reverse_kl":
        assert bridge.reverse_kl(_positive(p), Target.of(q), 1000).value == math.inf
        return
    estimator, truth = ASKED[name]
    expected = truth(p, q) if pair != 3 or name == "log_z" else math.log(2) - math.sqrt(1 / (2 * math.pi)) + 0.125
    target = unnormalised(p, dim) if pair != 3 else _positive(p)
    repeats = [estimator(target, Target.of(q), 1000, seed) for seed in range(200)]
    values = torch.tensor([one.value for one in repeats], dtype=D)
    assert all(one.up_to is None for one in repeats) and sum(one.reliable for one in repeats) > 190
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(200)
    assert 180 <= sum(one.interval[0] <= expected <= one.interval[1] for one in repeats) <= 199


def _positive(p):
    return Target(sampler=lambda n: p.sample((n,)), log_prob=lambda x: p.log_prob(x)[:, 0] + SHIFT, dim=1, support="positive")


def test_little_overlap_is_called_so_and_error_bars_cover_where_it_is_not():
    """N(0, I) and N(m, I) in 20 dimensions, from 10 to 40 nats apart: what is called reliable covers."""
    trusted, covered, refused = 0, 0, 0
    for shift in (1.0, 1.2, 1.4, 2.0):
        for seed in range(40):
            p, q = mvn(20), mvn(20, shift)
            e = bridge.forward_kl(unnormalised(p, 20), Target.of(q), 1000, seed)
            truth = float(kl_divergence(p, q))
            trusted, refused = trusted + e.reliable, refused + (not e.reliable)
            covered += e.reliable and e.interval[0] <= truth <= e.interval[1]
    assert refused >= 115 and "overlap too little" in e.notes[0]
    assert trusted > 20 and covered >= 0.88 * trusted
    with pytest.raises(TargetError, match="hundreds of nats apart"):
        bridge.log_z(unnormalised(mvn(1), 1), Target.of(mvn(1, 90.0)), 1000)


def test_estimate_gives_the_absolute_number_where_it_can():
    p, q = mvn(4), mvn(4, 0.2, 1.5)
    held = Target(samples=Target.of(p).draws(5000, 9), log_prob=lambda x: p.log_prob(x) - 7.0)
    for name, truth in (("forward_kl", kl_divergence(p, q)), ("reverse_kl", kl_divergence(q, p))):
        e = wk.estimate(p=held, q=q, divergence=name)
        assert e.method == "bridge sampling, 5,000 samples of p and 20,000 fresh draws of q" and e.up_to is None
        assert e.reliable and abs(e.value - float(truth)) < 4 * e.stderr
        back = wk.estimate(p=q, q=held, divergence=name)  # the unnormalised one may be q
        assert back.method.startswith("bridge") and back.quantity == name and back.reliable
    both = wk.estimate(p=unnormalised(p, 4), q=unnormalised(q, 4, -3.0))
    assert both.method.startswith("bridge") and abs(both.value - float(kl_divergence(p, q))) < 4 * both.stderr


def test_estimate_falls_back_to_the_number_up_to_log_z_and_says_why():
    p, q = unnormalised(mvn(40), 40), mvn(40, 1.5)
    e = wk.estimate(p=p, q=q)
    assert e.up_to == "log_z" and e.method.startswith("Monte Carlo") and "bridge gives" in e.notes[-1]
    assert abs(e.value - (45.0 + SHIFT)) < 4 * e.stderr
    asked = wk.estimate(p=p, q=q, method="bridge")
    assert asked.up_to is None and not asked.reliable
    back = wk.estimate(p=p, q=q, divergence="reverse_kl")  # KL + log Z, and KL − log Z: they aren't to be mixed
    assert (e.constant, back.constant) == (", log Z included", ", log Z subtracted")
    with pytest.raises(wk._checks.InputError, match=r"one is up to \+ log Z in nats, the other up to − log Z"):
        _ = e - back
    apart = wk.estimate(p=p, q=mvn(40, 30.0))
    assert apart.up_to == "log_z" and "bridge was refused: Cannot bridge p and q: their draws lie" in apart.notes[-1]


def test_weighted_or_missing_draws_are_refused():
    p, q = mvn(2), Target.of(mvn(2))
    x = q.draws(500, 0)
    weighted = Target(samples=x, weights=torch.ones(500), log_prob=p.log_prob)
    for one, message in ((weighted, "weighted"), (Target(log_prob=p.log_prob, dim=2), "p has log_prob")):
        with pytest.raises(TargetError, match=message):
            bridge.forward_kl(one, q)
    normals = Normal(torch.zeros((), dtype=D), 1.0)
    with pytest.raises(TargetError, match="at least one of the densities unnormalised"):
        wk.estimate(p=normals, q=normals, method="bridge")
