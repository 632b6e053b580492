"""Quadrature in two and three variables: against closed forms, products of lines, and what hides from a rule."""

import math

import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Dirichlet,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
    kl_divergence,
)

import whichkl as wk
from whichkl import Target
from whichkl.divergences.exact.closed_form import gaussian
from whichkl.divergences.exact.quadrature import divergence
from whichkl.divergences.kinds import (
    KINDS,
    ChiSquared,
    ForwardKLDivergence,
    Hellinger,
    JensenShannonDivergence,
    RenyiDivergence,
    ReverseKLDivergence,
    TotalVariation,
)

D = torch.float64
FORWARD = ForwardKLDivergence()


def t(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=D)


def mvn(mean, covariance):
    return MultivariateNormal(t(mean), t(covariance))


def product(kind, *parameters):
    return Independent(kind(*(t(one) for one in parameters)), 1)


def by_rule(p, q, kind=FORWARD):
    return divergence(Target.of(p), Target.of(q), kind)


TIGHT, LOOSE = mvn([0.0, 0.0], [[1.0, 0.9], [0.9, 1.0]]), mvn([1.0, -0.5], [[1.0, -0.3], [-0.3, 2.0]])
PAIRS = {
    "correlated": (TIGHT, LOOSE),
    "correlated back": (LOOSE, TIGHT),
    "ridge": (mvn([0.0, 3.0], [[1.0, 0.9995], [0.9995, 1.0]]), LOOSE),
    "far scales": (mvn([0.0, 0.0], [[1e-6, 0.0], [0.0, 1e8]]), mvn([1e-3, 0.0], [[2e-6, 0.0], [0.0, 3e8]])),
    "simplex": (Dirichlet(t(2.0, 3.0, 4.0)), Dirichlet(t(1.0, 1.0, 0.7))),
    "simplex back": (Dirichlet(t(1.0, 1.0, 0.7)), Dirichlet(t(2.0, 3.0, 4.0))),
    "corners": (product(Beta, [0.5, 2.0], [0.5, 3.0]), product(Beta, [1.5, 1.0], [2.0, 1.0])),
    "three": (
        mvn([0.0, 0.0, 0.0], [[1.0, 0.9, 0.2], [0.9, 1.0, 0.3], [0.2, 0.3, 1.0]]),
        mvn([1.0, -0.5, 0.0], [[1.0, -0.3, 0.0], [-0.3, 2.0, 0.5], [0.0, 0.5, 0.5]]),
    ),
    "simplex in three": (Dirichlet(t(2.0, 3.0, 4.0, 1.0)), Dirichlet(t(1.0, 1.0, 0.7, 2.0))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_it_agrees_with_the_closed_form(name):
    p, q = PAIRS[name]
    estimate = by_rule(p, q)
    assert estimate.exact
    assert estimate.finite == "certified"
    assert estimate.value == pytest.approx(float(kl_divergence(p, q)), rel=5e-7, abs=5e-7)


@pytest.mark.parametrize("kind", [RenyiDivergence(0.5), RenyiDivergence(1.5), Hellinger(), ChiSquared()], ids=str)
def test_other_kinds_agree_with_the_closed_form_of_gaussians(kind):
    p, q = mvn([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]]), mvn([0.5, 0.2], [[1.5, 0.4], [0.4, 1.2]])
    assert by_rule(p, q, kind).value == pytest.approx(gaussian(p, q, kind).value, rel=1e-6)


LINES = {
    "uniform in normal": ((Uniform, 0.0, 1.0), (Normal, 0.0, 1.0)),
    "normal in cauchy": ((Normal, 0.0, 1.0), (Cauchy, 0.0, 1.0)),
    "cauchy": ((Cauchy, 0.0, 1.0), (Cauchy, 1.0, 2.0)),
    "a kink that hides at a box's edge": ((Laplace, 0.0, 1.0), (Normal, 0.0, 1.0)),
    "kinks": ((Laplace, 0.3, 1.0), (Laplace, -0.2, 1.5)),
}


@pytest.mark.parametrize("name", LINES)
def test_a_product_has_the_sum_of_its_lines(name):
    (one, *a), (other, *b) = LINES[name]
    line = by_rule(one(*map(t, a)), other(*map(t, b))).value
    plane = by_rule(product(one, *([v, v] for v in a)), product(other, *([v, v] for v in b)))
    assert plane.value == pytest.approx(2 * line, abs=5e-7)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_divergence_from_itself_is_zero(kind):
    value = by_rule(TIGHT, TIGHT, kind()).value
    assert 0 <= value < 1e-9


def test_a_divergence_does_not_change_under_a_map_of_the_plane():
    def moved(p):
        shear = t([[2.0, 0.0], [3.0, 0.5]])
        return Target(
            sampler=lambda n: p.sample((n,)) @ shear.T + 7,
            log_prob=lambda x: p.log_prob(torch.linalg.solve(shear, (x - 7).T).T),
            dim=2,
        )

    mixture = MixtureSameFamily(Categorical(t(0.4, 0.6)), MultivariateNormal(t([[-2.0, 0.0], [1.0, 1.0]]), torch.eye(2, dtype=D)))
    truth = by_rule(mixture, LOOSE)
    assert truth.exact
    assert divergence(moved(mixture), moved(LOOSE), FORWARD).value == pytest.approx(truth.value, abs=1e-7)


def test_narrow_modes_are_found_by_their_draws():
    centres, scales = t([[-3.0, 5.0], [3.0, 0.0]]), torch.stack([1e-3 * torch.eye(2, dtype=D), torch.eye(2, dtype=D)])
    p = MixtureSameFamily(Categorical(t(0.3, 0.7)), MultivariateNormal(centres, scale_tril=scales))
    q = mvn([0.0, 0.0], [[10.0, 0.0], [0.0, 10.0]])
    parts = [mvn(m.tolist(), (s @ s.T).tolist()) for m, s in zip(centres, scales, strict=True)]
    # far apart, the mixture's entropy is that of its parts and of its weights
    entropy = sum(w * (part.entropy() - math.log(w)) for w, part in zip((0.3, 0.7), parts, strict=True))
    cross = sum(w * (kl_divergence(part, q) + part.entropy()) for w, part in zip((0.3, 0.7), parts, strict=True))
    assert by_rule(p, q).value == pytest.approx(float(cross - entropy), abs=1e-6)


@pytest.mark.parametrize(
    ("p", "q", "kind", "place"),
    [
        (product(Cauchy, [0.0, 0.0], [1.0, 1.0]), product(Normal, [0.0, 0.0], [1.0, 1.0]), FORWARD, "as x1 →"),
        (product(StudentT, [3.0, 3.0], [0.0, 0.0], [1.0, 1.0]), product(Normal, [0.0, 0.0], [1.0, 1.0]), ChiSquared(), "as x1 →"),
        (mvn([0.0, 0.0], [[2.05, 0.75], [0.75, 2.05]]), mvn([0.0, 0.0], [[1.0, -0.3], [-0.3, 1.0]]), ChiSquared(), "→"),
        (LOOSE, product(Uniform, [0.0, 0.0], [1.0, 1.0]), FORWARD, "x1 < 0 or x1 > 1 or x2 < 0 or x2 > 1"),
        (product(Uniform, [0.0, 0.0], [2.0, 1.0]), product(Uniform, [0.0, 0.0], [1.0, 1.0]), FORWARD, "0.5 of the mass"),
        (product(Uniform, [0.0, 0.0], [1.0, 1.0]), LOOSE, ReverseKLDivergence(), "outside the support"),
    ],
    ids=["tails", "chi squared", "a cone", "a cube in the plane", "half", "reverse"],
)
def test_infinity_is_found_and_explained(p, q, kind, place):
    estimate = by_rule(p, q, kind)
    assert estimate.value == math.inf
    assert estimate.finite == "infinite"
    assert place in estimate.notes[0]


def test_one_heavy_coordinate_beside_a_light_one_is_infinite_and_the_other_way_finite():
    def mixed(one, other):
        return Target(
            sampler=lambda n: torch.stack([one.sample((n,)), other.sample((n,))], 1),
            log_prob=lambda x: one.log_prob(x[:, 0]) + other.log_prob(x[:, 1]),
            normalized=True,
            dim=2,
        )

    normal, cauchy = Normal(t(0.0), t(1.0)), Cauchy(t(0.0), t(1.0))
    infinite = divergence(mixed(normal, cauchy), mixed(normal, normal), FORWARD)
    assert infinite.value == math.inf
    assert "x2 →" in infinite.notes[0]
    assert divergence(mixed(normal, normal), mixed(normal, cauchy), FORWARD).value == pytest.approx(0.259245, abs=1e-6)


def test_kinks_across_the_plane_are_given_with_their_error():
    plane = by_rule(TIGHT, LOOSE, TotalVariation())
    truth = wk.estimate(p=TIGHT, q=LOOSE, divergence="total_variation", method="monte_carlo", n=400_000)
    assert plane.stderr < 1e-4
    assert abs(plane.value - truth.value) < 4 * truth.stderr
    assert JensenShannonDivergence().of_integral(by_rule(TIGHT, LOOSE, JensenShannonDivergence()).value) <= math.log(2)


def test_a_wrong_claim_of_normalisation_is_refused():
    p = Target(sampler=lambda n: TIGHT.sample((n,)), log_prob=lambda x: TIGHT.log_prob(x) + 0.01, normalized=True, dim=2)
    with pytest.raises(ValueError, match=r"integrates to 1\.01005"):
        divergence(p, Target.of(LOOSE), FORWARD)


def test_a_density_without_a_finite_integral_is_refused():
    p = Target(sampler=lambda n: TIGHT.sample((n,)), log_prob=lambda x: -torch.log1p(x.square().sum(1)), dim=2)
    with pytest.raises(ValueError, match="isn't finite"):
        divergence(p, Target.of(LOOSE), FORWARD)


def test_a_surface_in_space_has_no_density_there():
    with pytest.raises(ValueError, match="without volume"):
        wk.estimate(p=Dirichlet(t(1.0, 2.0, 3.0)), q=mvn([0.0, 0.0, 0.0], torch.eye(3).tolist()))


def test_the_automatic_choice_takes_it_up_to_three_variables_and_never_one_point_at_a_time():
    q = product(Normal, [0.0, 0.0], [1.0, 1.0])
    p = MixtureSameFamily(Categorical(t(0.5, 0.5)), MultivariateNormal(t([[-3.0, 0.0], [3.0, 0.0]]), torch.eye(2, dtype=D)))
    estimate = wk.estimate(p=p, q=q)
    assert estimate.method == "quadrature"
    single = Target(sampler=lambda n: p.sample((n,)), log_prob=lambda x: p.log_prob(x), normalized=True, dim=2, batched=False)
    sampled = wk.estimate(p=single, q=q, n=2_000)
    assert "Monte Carlo" in sampled.method
    assert abs(sampled.value - estimate.value) < 4 * sampled.stderr


SOUGHT = {
    "narrow and far": (lambda x: -((x[:, 0] - 57) / 1e-3).square() / 2, 1, None, Normal(t(57.0), t(1e-3))),
    "positive": (lambda x: 2 * x[:, 0].log() - 3 * x[:, 0], 1, "positive", torch.distributions.Gamma(t(3.0), t(3.0))),
    "correlated": (lambda x: LOOSE.log_prob(x) - 40, 2, None, LOOSE),
    "simplex": (lambda x: (x.log() * t(1.0, 2.0, 3.0)).sum(1), 3, "simplex", Dirichlet(t(2.0, 3.0, 4.0))),
}


@pytest.mark.parametrize("name", SOUGHT)
def test_a_density_that_can_only_be_evaluated_is_searched_for(name):
    f, dim, support, known = SOUGHT[name]
    p = Target(log_prob=f, dim=dim, support=support)
    q = {"simplex": Dirichlet(t(1.0, 1.0, 1.0)), "positive": torch.distributions.LogNormal(t(0.0), t(1.0))}.get(
        name, Normal(t(0.0), t(1e2)) if dim == 1 else TIGHT
    )
    for kind in (FORWARD, ReverseKLDivergence()):
        truth = by_rule(known, q, kind).value
        estimate = divergence(p, Target.of(q), kind)
        assert estimate.value == pytest.approx(truth, rel=1e-7)
        assert "searched for" in estimate.notes[-1]


def test_two_far_modes_are_both_found_and_an_improper_density_is_not_taken():
    modes = MixtureSameFamily(Categorical(t(0.3, 0.7)), Normal(t(-30.0, 30.0), t(0.1, 0.1)))
    p = Target(log_prob=lambda x: modes.log_prob(x[:, 0]) + 3.0, dim=1)
    q = Normal(t(0.0), t(1.0))
    assert divergence(p, Target.of(q), FORWARD).value == pytest.approx(by_rule(modes, q).value, rel=1e-9)
    flat = Target(log_prob=lambda x: torch.zeros(len(x), dtype=D), dim=1)
    with pytest.raises(ValueError, match="Cannot integrate this density"):
        divergence(flat, Target.of(q), FORWARD)
    with pytest.raises(ValueError, match="zero at"):
        divergence(Target(log_prob=lambda x: torch.full((len(x),), -math.inf, dtype=D), dim=1), Target.of(q), FORWARD)


def test_the_automatic_choice_is_absolute_where_p_is_unnormalised_and_cannot_be_drawn_from():
    estimate = wk.estimate(p=Target(log_prob=lambda x: LOOSE.log_prob(x) - 40, dim=2), q=TIGHT, divergence="reverse_kl")
    assert estimate.method == "quadrature"
    assert estimate.up_to is None
    assert estimate.value == pytest.approx(float(kl_divergence(TIGHT, LOOSE)), abs=1e-6)
