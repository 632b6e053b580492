"""Monte Carlo: the control variate pays where it's used, and the mean and its error stay right where k3 isn't."""

import math

import pytest
import torch
from torch.distributions import Categorical, Exponential, MixtureSameFamily, MultivariateNormal, Normal, Uniform, kl_divergence

import whichkl as wk
from whichkl import Target
from whichkl.divergences.draws import monte_carlo
from whichkl.divergences.exact import quadrature

D = torch.float64
USED = "log-ratio mean with control variate"


def t(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=D)


def normal(mean, sd=1.0):
    return Normal(t(mean), t(sd))


def plain_error(p, q, n, seed):
    x = Target.of(p).draws(n, seed)[:, 0]
    return float((p.log_prob(x) - q.log_prob(x)).std()) / math.sqrt(n)


def test_near_pairs_lose_nine_tenths_of_their_error_in_both_directions():
    p, q = normal(0.0), normal(0.1)
    for name in ("forward_kl", "reverse_kl"):
        e = wk.estimate(p=p, q=q, divergence=name, method="monte_carlo")
        assert USED in e.method and abs(e.value - 0.005) < 4 * e.stderr
        assert e.stderr < plain_error(p, q, 20_000, 0) / 9


SAME = [
    (normal(0.0), normal(0.1)),
    (normal(0.0), normal(1.0)),
    (normal(0.0, 1.4), normal(0.0)),
    (normal(0.0), MixtureSameFamily(Categorical(t([0.998, 0.002])), Normal(t([0.1, 30.0]), t([1.0, 1.0])))),  # a far lump of q
    (Uniform(t(-3.0), t(3.0)), normal(0.0)),  # q has mass where p has none: E_p[q/p] = 0.9973
    (Uniform(t(-1.5), t(1.5)), normal(0.0)),  # … 0.87
]


@pytest.mark.parametrize(("p", "q"), SAME, ids=str)
def test_the_control_variate_leaves_the_mean_right_and_its_error_covers(p, q):
    truth = quadrature.kl(Target.of(p), Target.of(q)).value
    repeats = [monte_carlo.forward_kl(Target.of(p), Target.of(q), 1000, seed) for seed in range(200)]
    values = t([one.value for one in repeats])
    assert sum(USED in one.method for one in repeats) > 150
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(len(values))
    assert sum(one.interval[0] <= truth <= one.interval[1] for one in repeats) >= 180
    assert sum(one.stderr for one in repeats) / 200 < 0.8 * plain_error(p, q, 20_000, 0) * math.sqrt(20)


NOT_USED = [
    (normal(0.0), normal(3.0)),
    (normal(0.0), normal(0.0, 2.0)),  # E_p[(q/p)²] is infinite
    (normal(0.0), normal(0.0, 3.0)),
    (Uniform(t(0.0), t(1.0)), Uniform(t(0.0), t(2.0))),  # E_p[q/p] is ½, and q/p is constant
]


@pytest.mark.parametrize(("p", "q"), NOT_USED, ids=str)
def test_it_is_left_out_where_it_does_not_pay(p, q):
    for seed in range(10):
        e = monte_carlo.forward_kl(Target.of(p), Target.of(q), 20_000, seed)
        assert USED not in e.method
        assert abs(e.value - float(kl_divergence(p, q))) < 5 * e.stderr + 1e-6


def test_it_needs_two_normalised_densities_and_draws_of_the_other():
    p, q = normal(0.0), normal(0.1)
    unnormalised = Target(sampler=lambda n: p.sample((n,))[:, None], log_prob=lambda x: p.log_prob(x[:, 0]) + 1, dim=1)
    silent = Target(log_prob=lambda x: q.log_prob(x[:, 0]), normalized=True, dim=1)
    for first, second in ((unnormalised, Target.of(q)), (Target.of(p), silent)):
        assert USED not in monte_carlo.forward_kl(first, second).method


def test_it_is_left_out_where_p_is_not_a_number_at_draws_of_q():
    """Density 2x/3 on [1, 2], written so that it's NaN below 0."""
    p = Target(
        sampler=lambda n: (1 + 3 * torch.rand(n, 1, dtype=D)).sqrt(),
        log_prob=lambda x: torch.log(x[:, 0] * 2 / 3),
        dim=1,
        normalized=True,
    )
    e = monte_carlo.forward_kl(p, Target.of(normal(1.5, 0.5)), 2000)
    assert USED not in e.method and math.isfinite(e.value)


def test_fixed_samples_of_q_give_reverse_kl():
    p = MultivariateNormal(torch.zeros(4, dtype=D), torch.eye(4, dtype=D))
    q = MultivariateNormal(t([0.5, 0.0, 0.0, 0.0]), 1.5 * torch.eye(4, dtype=D))
    held = Target(samples=Target.of(q).draws(4000, 5), log_prob=q.log_prob, normalized=True)
    e = wk.estimate(p=Target(log_prob=p.log_prob, normalized=True, dim=4), q=held, divergence="reverse_kl")
    assert e.method == "Monte Carlo, 4,000 samples of q" and abs(e.value - float(kl_divergence(q, p))) < 4 * e.stderr


def test_draws_outside_of_their_own_density_are_refused():
    p = Target(samples=torch.linspace(-1, 1, 500, dtype=D), log_prob=lambda x: Exponential(t(1.0)).log_prob(x.abs()[:, 0]))
    cut = Target(samples=p.samples, log_prob=lambda x: torch.where(x[:, 0] > 0, -x[:, 0], -math.inf), normalized=True)
    with pytest.raises(ValueError, match="250 of its 500 draws fell where its own log density"):
        monte_carlo.forward_kl(cut, Target.of(normal(0.0)))


def test_a_heavy_tail_is_found_whether_or_not_the_rows_have_weights():
    even = (torch.arange(2_000, dtype=D) + 0.5) / 2_000
    for loss, is_heavy in ((even.pow(-0.8), True), (-even.log(), False)):
        plain = monte_carlo.cross_entropy(loss, "rows")
        same = monte_carlo.cross_entropy(loss, "rows", torch.full_like(even, 3.0))
        assert same.khat == pytest.approx(plain.khat) and (same.reliable, same.notes) == (plain.reliable, plain.notes)
        assert same.value == pytest.approx(plain.value) and same.stderr == pytest.approx(plain.stderr, rel=1e-3)
        assert plain.reliable is not is_heavy
    # weights in inverse proportion to the losses leave no tail
    assert monte_carlo.cross_entropy(even.pow(-0.8), "rows", even.pow(0.8)).reliable
