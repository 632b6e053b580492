"""A light part far from the rest: where a mixture shows it, it's found; where mass is missing, nothing is certified."""

import json
import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.distributions.transforms import AffineTransform, ExpTransform

import whichkl as wk
from programs import whichkl
from whichkl import Target
from whichkl.problems import named
from whichkl.targets.light_parts import light_parts


def t(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def mixture(weight, distance):
    return MixtureSameFamily(Categorical(t(1 - weight, weight)), Normal(t(0.0, distance), t(1.0, 1.0)))


def apart(weight, distance):
    """KL of the mixture from N(0, 1), whose parts don't overlap: Σ w (log w + KL of the part)."""
    return (1 - weight) * math.log1p(-weight) + weight * (math.log(weight) + distance**2 / 2)


NORMAL = Normal(t(0.0), t(1.0))
FAR = [(1e-4, 30.0), (1e-3, 100.0), (1e-5, 300.0), (1e-6, 1000.0), (1e-6, -1000.0), (1e-7, 3000.0), (1e-9, 1e5)]


@pytest.mark.parametrize(("weight", "distance"), FAR)
def test_a_light_far_component_counts(weight, distance):
    e = wk.estimate(p=mixture(weight, distance), q=NORMAL)
    assert e.exact and e.reliable and e.finite == "certified"
    assert e.value == pytest.approx(apart(weight, distance), rel=1e-6)
    back = wk.estimate(p=NORMAL, q=mixture(weight, distance))
    assert back.value == pytest.approx(-math.log1p(-weight), abs=1e-9)


def in_plane(weight, distance):
    means = torch.zeros(2, 2, dtype=torch.float64)
    means[1, 1] = distance
    return MixtureSameFamily(Categorical(t(1 - weight, weight)), MultivariateNormal(means, torch.eye(2, dtype=torch.float64)))


def columns(weight, distance, d):
    weights, means = t([0.5, 0.5]).expand(d, 2).clone(), t([0.0, 1.0]).expand(d, 2).clone()
    weights[0], means[0] = t(1 - weight, weight), t(0.0, distance)
    return Independent(MixtureSameFamily(Categorical(weights), Normal(means, torch.ones(d, 2, dtype=torch.float64))), 1)


def two_bumps(d):
    """KL of d − 1 columns ½ N(0, 1) + ½ N(1, 1) from N(0, 1), by a sum over a grid."""
    x = torch.linspace(-12, 13, 200_001, dtype=torch.float64)
    p = (NORMAL.log_prob(x).exp() + NORMAL.log_prob(x - 1).exp()) / 2
    return (d - 1) * float((p * (p.log() - NORMAL.log_prob(x))).sum() * (x[1] - x[0]))


def standard(d):
    return MultivariateNormal(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))


def standard_columns(d):
    return Independent(Normal(torch.zeros(d, dtype=torch.float64), t(1.0)), 1)


def moved(p, step):
    return TransformedDistribution(p, [step])


FOUND = apart(1e-6, 1000)
NESTED = {
    "an expression": (named("0.999999*Normal(0,1)+0.000001*Normal(1000,1)"), NORMAL, FOUND),
    "shifted": (moved(mixture(1e-6, 1000.0), AffineTransform(5.0, -2.0)), Normal(t(5.0), t(2.0)), FOUND),
    "exponentiated": (moved(mixture(1e-6, 100.0), ExpTransform()), LogNormal(t(0.0), t(1.0)), apart(1e-6, 100)),
    "in the plane": (in_plane(1e-6, 1000.0), standard(2), FOUND),
    "two columns": (columns(1e-6, 1000.0, 2), standard_columns(2), FOUND + two_bumps(2)),
    "six columns": (columns(1e-6, 1000.0, 6), standard_columns(6), FOUND + two_bumps(6)),
}


@pytest.mark.parametrize("name", NESTED)
def test_it_is_found_inside_other_laws(name):
    p, q, truth = NESTED[name]
    e = wk.estimate(p=p, q=q)
    assert e.exact and e.finite == "certified" and e.value == pytest.approx(truth, rel=2e-6)


def test_several_light_parts_of_other_families():
    weights = t(1 - 3e-6, 1e-6, 1e-6, 1e-6)
    p = MixtureSameFamily(Categorical(weights), Laplace(t(0.0, 500.0, -700.0, 900.0), torch.ones(4, dtype=torch.float64)))
    # Far out log p/q is log w − |x − m| + |x|, with the mean log w − 1 + |m|.
    truth = sum(w * (math.log(w) + m) for w, m in zip(weights.tolist(), (0, 499, 699, 899), strict=True))
    assert wk.estimate(p=p, q=Laplace(t(0.0), t(1.0))).value == pytest.approx(truth, rel=1e-6)
    heavy = MixtureSameFamily(Categorical(t(1 - 1e-6, 1e-6)), Gamma(t(2.0, 1e6), t(1.0, 1.0)))
    truth = 1e-6 * (math.log(1e-6) - math.lgamma(1e6) + float((1e6 - 2) * torch.digamma(t(1e6)))) - 1e-6
    assert wk.estimate(p=heavy, q=Gamma(t(2.0), t(1.0))).value == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("weight", "scale"), [(1e-3, 1e-9), (0.05, 1e-9), (0.2, 1e-8)])
def test_a_narrow_component_counts(weight, scale):
    p = MixtureSameFamily(Categorical(t(1 - weight, weight)), Normal(t(0.0, 0.5), t(1.0, scale)))
    # Under the spike the wide part adds nothing: log p/q is log(w / s) − z²/2 + x²/2 there.
    truth = (1 - weight) * math.log1p(-weight) + weight * (math.log(weight / scale) - 0.5 + 0.125)
    e = wk.estimate(p=p, q=NORMAL)
    assert e.finite == "certified" and e.value == pytest.approx(truth, abs=2e-6)


def density_of(p, **how):
    return Target(log_prob=lambda x: p.log_prob(x[:, 0]), dim=1, **how)


HIDDEN = mixture(1e-6, 1000.0)


@pytest.mark.parametrize(
    "p",
    [density_of(HIDDEN, normalized=True), density_of(HIDDEN, normalized=True, sampler=lambda n: HIDDEN.sample((n,)))],
    ids=["bare", "sampled"],
)
def test_missing_mass_of_a_normalised_density_is_evidence(p):
    for q, kind in ((NORMAL, "forward_kl"), (NORMAL, "jensen_shannon"), (Normal(t(0.5), t(1.0)), "forward_kl")):
        e = wk.estimate(p=p, q=q, divergence=kind)
        assert not e.reliable and not e.exact and e.finite == "not certified"
        assert any("integrates to 1 − 1e-06" in note for note in e.notes)


def test_without_a_normaliser_nothing_tells_and_nothing_is_certified():
    for how in ({}, {"sampler": lambda n: HIDDEN.sample((n,))}):
        e = wk.estimate(p=density_of(HIDDEN, **how), q=NORMAL)
        assert e.finite == "not certified" and any("would be missed" in note for note in e.notes)


def test_the_owner_of_a_log_density_is_asked():
    class Plane(MixtureSameFamily):
        def log_prob(self, x):
            return super().log_prob(x[..., 0] if x.ndim > 1 else x)

    own = Plane(HIDDEN.mixture_distribution, HIDDEN.component_distribution)
    p = Target(log_prob=own.log_prob, normalized=True, dim=1, sampler=lambda n: own.sample((n,)))
    assert wk.estimate(p=p, q=NORMAL).value == pytest.approx(apart(1e-6, 1000), rel=1e-6)


def test_a_part_too_narrow_for_its_distance_is_named():
    e = wk.estimate(p=mixture(1e-15, 1e8), q=NORMAL)
    assert not e.reliable and e.finite == "not certified" and not e.exact
    assert any("too narrow for its distance" in note or "quadrature was refused" in note for note in e.notes)


def test_draws_that_hardly_show_a_component_are_not_trusted():
    means = torch.zeros(2, 6, dtype=torch.float64)
    means[1, 2] = 1000.0
    p = MixtureSameFamily(Categorical(t(1 - 1e-6, 1e-6)), MultivariateNormal(means, torch.eye(6, dtype=torch.float64)))
    e = wk.estimate(p=p, q=MultivariateNormal(means[0], 1.2 * torch.eye(6, dtype=torch.float64)))
    assert not e.reliable and "components of less than" in e.notes[0]
    near = wk.estimate(p=p, q=p, method="monte_carlo")
    assert near.reliable and near.value == 0


def test_a_fit_on_the_line_sees_it():
    fit = wk.fit(mixture(1e-6, 1000.0))
    assert float(fit.model.mean) == pytest.approx(1e-3, rel=1e-6) and float(fit.model.variance) == pytest.approx(
        2 - 1e-6, rel=1e-6
    )


def test_draws_of_light_parts_leave_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    parts = light_parts(mixture(1e-6, 1000.0), 1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [part.weight for part in parts] == [1e-6]
    assert light_parts(mixture(0.5, 1000.0), 1) == [] and light_parts(NORMAL, 1) == []
    assert light_parts(mixture(1e-6, 1000.0), 2) == []


def test_on_the_command_line():
    done = whichkl("estimate", "--p", "0.999999*Normal(0,1)+0.000001*Normal(1000,1)", "--q", "Normal(0,1)", "--json")
    assert json.loads(done.stdout)["value"] == pytest.approx(apart(1e-6, 1000), rel=1e-6)
