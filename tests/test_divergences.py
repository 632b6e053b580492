"""Exact divergences: closed form, enumeration and quadrature against the truth and against each other."""

import math

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Cauchy,
    ContinuousBernoulli,
    Geometric,
    Laplace,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    TransformedDistribution,
    Uniform,
)
from torch.distributions.transforms import AbsTransform

from whichkl import Target, estimate
from whichkl.divergences.exact.atoms import enumerate_atoms
from whichkl.divergences.exact.closed_form import closed_form
from whichkl.divergences.exact.discrete import enumeration, rows
from whichkl.divergences.exact.quadrature import divergence
from whichkl.divergences.kinds import (
    KINDS,
    ChiSquared,
    ForwardKLDivergence,
    JensenShannonDivergence,
    RenyiDivergence,
    SkewForwardKLDivergence,
)
from whichkl.problems import named

D = torch.float64


def t(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=D)


def on_the_line(p, q, kind):
    return divergence(Target.of(p), Target.of(q), kind)


NORMALS = {
    "forward_kl": 0.443147,
    "reverse_kl": 1.306853,
    "jeffreys": 0.875,
    "jeffreys_sum": 1.75,
    "total_variation": 0.390066,
    "jensen_shannon": 0.128175,
    "hellinger": 0.149195,
    "renyi": 0.323144,
    "chi_squared": 0.744026,
}


@pytest.mark.parametrize(("name", "truth"), NORMALS.items())
def test_every_kind_agrees_with_the_test_bed(name, truth):
    estimate = on_the_line(Normal(t(0.0), t(1.0)), Normal(t(1.0), t(2.0)), KINDS[name]())
    assert abs(estimate.value - truth) < 6e-7
    assert estimate.exact
    assert estimate.finite == "certified"


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))
@pytest.mark.parametrize(
    "p", [Normal(t(0.0), t(1.0)), Laplace(t(1.0), t(2.0)), Cauchy(t(0.0), t(1.0)), Beta(t(0.5), t(0.5))], ids=str
)
def test_every_kind_is_zero_between_equal_laws(kind, p):
    assert 0 <= on_the_line(p, p, kind()).value < 1e-9


INFINITE = [
    (Cauchy(t(0.0), t(1.0)), Normal(t(0.0), t(1.0)), "forward_kl", "tail"),
    (Cauchy(t(0.0), t(1.0)), Normal(t(0.0), t(1.0)), "chi_squared", "tail"),
    (StudentT(t(2.0)), Normal(t(0.0), t(1.0)), "forward_kl", "tail"),
    (Normal(t(0.0), t(1.5)), Normal(t(0.0), t(1.0)), "chi_squared", "tail"),
    (Laplace(t(0.0), t(1.0)), Normal(t(0.0), t(1.0)), "chi_squared", "tail"),
    (Beta(t(0.5), t(0.5)), Uniform(t(0.0), t(1.0)), "chi_squared", "as x → "),
    (Normal(t(0.0), t(1.0)), Uniform(t(0.0), t(1.0)), "forward_kl", "0.6587 of the mass of p lies outside the support of q"),
    (Normal(t(0.0), t(1.0)), Uniform(t(0.0), t(1.0)), "jeffreys", "0.6587 of the mass of p lies outside the support of q"),
    (Uniform(t(0.0), t(1.0)), Normal(t(0.0), t(1.0)), "reverse_kl", "0.6587 of the mass of q lies outside the support of p"),
    (Uniform(t(0.0), t(2.0)), Uniform(t(1.0), t(3.0)), "jeffreys", "1 of the mass of each lies outside the support of the other"),
]


@pytest.mark.parametrize(("p", "q", "name", "reason"), INFINITE, ids=str)
def test_infinities_are_found_and_explained(p, q, name, reason):
    estimate = on_the_line(p, q, KINDS[name]())
    assert estimate.value == math.inf
    assert estimate.finite == "infinite"
    assert reason in estimate.notes[0]


NEARLY_INFINITE = [
    (StudentT(t(3.0)), Normal(t(0.0), t(1.0)), "forward_kl", 0.645461),
    (Normal(t(0.0), t(1.5)), Normal(t(0.0), t(1.0)), "forward_kl", 1.125 - 0.5 - math.log(1.5)),
    (Normal(t(0.0), t(1.0)), Cauchy(t(0.0), t(1.0)), "chi_squared", 0.75 * math.sqrt(math.pi) - 1),
    (Beta(t(0.5), t(0.5)), Uniform(t(0.0), t(1.0)), "forward_kl", -math.log(math.pi) + 2 * math.log(2)),
]


@pytest.mark.parametrize(("p", "q", "name", "truth"), NEARLY_INFINITE, ids=str)
def test_divergences_near_infinite_ones_are_found(p, q, name, truth):
    assert on_the_line(p, q, KINDS[name]()).value == pytest.approx(truth, abs=2e-6)


def test_disjoint_supports_reach_the_bounds():
    p, q = Uniform(t(0.0), t(1.0)), Uniform(t(2.0), t(3.0))
    values = {name: on_the_line(p, q, kind()).value for name, kind in KINDS.items()}
    assert values["forward_kl"] == values["chi_squared"] == values["renyi"] == math.inf
    assert values["jensen_shannon"] == pytest.approx(math.log(2))
    assert values["total_variation"] == pytest.approx(1)
    assert values["hellinger"] == pytest.approx(1)
    assert on_the_line(p, q, SkewForwardKLDivergence(0.25)).value == pytest.approx(math.log(4))
    assert on_the_line(p, q, JensenShannonDivergence(0.2)).value == pytest.approx(-0.2 * math.log(0.2) - 0.8 * math.log(0.8))


def test_renyi_tends_to_forward_kl_and_a_value_beyond_floats_is_refused():
    p, q = Normal(t(0.0), t(1.0)), Normal(t(1.0), t(2.0))
    assert on_the_line(p, q, RenyiDivergence(1 + 1e-6)).value == pytest.approx(0.443147, abs=1e-5)
    with pytest.raises(ValueError, match="beyond 1e308"):
        on_the_line(Normal(t(0.0), t(1.0)), Normal(t(40.0), t(1.0)), ChiSquared())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: on_the_line(Normal(t(0.0), t(1.0)), Normal(t(1.0), t(2.0)), RenyiDivergence(1.0)), "other than 1"),
        (lambda: on_the_line(Normal(t(0.0), t(1.0)), Normal(t(1.0), t(2.0)), SkewForwardKLDivergence(0.0)), "Use forward_kl"),
        (lambda: RenyiDivergence(0.0), "positive"),
        (lambda: JensenShannonDivergence(1.0), "strictly between"),
        (lambda: SkewForwardKLDivergence(1.0), "1 excluded"),
    ],
)
def test_knobs_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_torchs_wrong_entries_are_not_used():
    p, q = ContinuousBernoulli(t(0.3)), Uniform(t(0.0), t(1.0))
    for first, second in ((p, q), (q, p)):
        truth = on_the_line(first, second, ForwardKLDivergence()).value
        assert 0 < closed_form(first, second, "forward_kl").value == pytest.approx(truth, abs=1e-11)
    folded = [TransformedDistribution(Normal(t(m), t(1.0)), [AbsTransform()]) for m in (0.0, 2.0)]
    assert closed_form(*folded, "forward_kl") is None  # |x| merges what KL(N(0, 1)‖N(2, 1)) = 2 tells apart
    half = [torch.distributions.HalfCauchy(t(s)) for s in (1.0, 3.0)]
    assert closed_form(*half, "forward_kl").value == pytest.approx(math.log(4 / 3), rel=1e-14)


def test_closed_forms_agree_with_quadrature_and_know_their_limits():
    p, q = Normal(t(0.0), t(1.0)), Normal(t(1.0), t(2.0))
    for name in ("forward_kl", "reverse_kl", "jeffreys", "jeffreys_sum"):
        assert closed_form(p, q, name).value == pytest.approx(on_the_line(p, q, KINDS[name]()).value, abs=1e-9)
    assert closed_form(p, q, "hellinger") is None
    assert closed_form(StudentT(t(3.0)), p, "forward_kl") is None
    plane = MultivariateNormal(t([0.0, 0.0]), t([[1.0, 0.9], [0.9, 1.0]]))
    flat = MultivariateNormal(t([0.0, 0.0]), torch.eye(2, dtype=D))
    assert closed_form(plane, flat, "forward_kl").value == pytest.approx(0.830366, abs=6e-7)
    assert closed_form(p, Uniform(t(0.0), t(1.0)), "forward_kl").value == math.inf


def summed(p, q, kind):
    log_p, log_q, names = enumerate_atoms(p, q, kind)
    return enumeration(log_p, log_q, kind, names)


def test_enumeration_agrees_with_the_test_bed():
    p, q = Categorical(t([0.36, 0.48, 0.16])), Categorical(t([1.0, 1.0, 1.0]) / 3)
    assert summed(p, q, ForwardKLDivergence()).value == pytest.approx(0.0853, abs=6e-6)
    assert summed(q, p, ForwardKLDivergence()).value == pytest.approx(0.097455, abs=6e-7)
    assert summed(Poisson(t(3.0)), Poisson(t(5.0)), ForwardKLDivergence()).value == pytest.approx(0.467523, abs=6e-7)
    assert summed(Poisson(t(5.0)), Poisson(t(3.0)), ForwardKLDivergence()).value == pytest.approx(0.554128, abs=6e-7)
    assert summed(Bernoulli(t(0.3)), Geometric(t(0.4)), KINDS["total_variation"]()).value > 0


def test_missing_atoms_are_named():
    p, q = Categorical(t([0.25, 0.75, 0.0])), Categorical(t([0.0, 0.5, 0.5]))
    estimate = summed(p, q, ForwardKLDivergence())
    assert estimate.value == math.inf
    assert estimate.notes == ("0.25 of the mass of p lies outside the support of q, on the atoms 0",)
    assert summed(p, q, JensenShannonDivergence()).value < math.log(2)
    assert summed(Bernoulli(t(0.5)), Bernoulli(t(1.0)), ForwardKLDivergence()).value == math.inf
    assert summed(Bernoulli(t(1.0)), Bernoulli(t(0.5)), ForwardKLDivergence()).value == pytest.approx(math.log(2))
    hot = (torch.distributions.OneHotCategorical(one.probs) for one in (p, q))
    assert summed(*hot, ForwardKLDivergence()).value == math.inf


def test_rows_agree_with_enumeration_whatever_the_form_and_block():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, 700, generator=generator)
    logits[0, 3, 5] = -math.inf
    p, q = logits.softmax(-1)
    for kind in (ForwardKLDivergence(), JensenShannonDivergence(), RenyiDivergence(0.5)):
        by_probability = rows(p, q, kind)
        by_logit = rows(logits[0], logits[1], kind, "logits")
        torch.testing.assert_close(by_probability, by_logit, rtol=1e-4, atol=1e-6)
        one = enumeration(p[7].double().log(), q[7].double().log(), kind, [str(i) for i in range(700)])
        assert float(by_probability[7]) == pytest.approx(one.value, rel=1e-4)
    assert float(rows(q, p, ForwardKLDivergence())[3]) == math.inf
    assert bool((rows(p, p, ForwardKLDivergence()) == 0).all())


BAD = [
    (t([[0.5, 0.5]]), t([[0.3, 0.3]]), "row 0 of q sums to 0.6, not 1"),
    (t([[0.5, 0.5], [1.2, -0.2]]), t([[0.5, 0.5], [0.5, 0.5]]), "p is -0.2 at row 1, atom 1"),
    (t([[0.5, math.nan]]), t([[0.5, 0.5]]), "p is nan at row 0, atom 1"),
    (t([[0.5, 0.5]]), t([[1.0]]), r"p has shape \(1, 2\) and q \(1, 1\)"),
    (torch.tensor([[1, 0]]), t([[0.5, 0.5]]), "as floats"),
    (torch.empty(0, 2), torch.empty(0, 2), "shape"),
]


@pytest.mark.parametrize(("p", "q", "message"), BAD)
def test_what_is_no_probability_is_refused(p, q, message):
    with pytest.raises(ValueError, match=message):
        rows(p, q, ForwardKLDivergence())
    with pytest.raises(ValueError, match="logits of p"):
        rows(t([[-math.inf, -math.inf]]), t([[0.0, 0.0]]), ForwardKLDivergence(), "logits")


def test_named_distributions_are_read_by_a_closed_grammar():
    assert named("Normal(0, 2)").scale == 2
    assert named("StudentT(3,0,1)").df == 3
    assert named("Categorical(.36,.48,.16)").probs.tolist() == pytest.approx([0.36, 0.48, 0.16])
    assert float(named("0.7*Normal(-3,1) + 0.3*Normal(3,1)").mean) == pytest.approx(-1.2)
    for text, message in (
        ("Normal(0)", "it takes mean, sd"),
        ("Normal(0, -1)", "GreaterThan|positive"),
        ("Norm(0, 1)", "isn't a known distribution"),
        ("__import__('os')", "isn't a distribution|isn't a list"),
        ("Normal(0, x)", "isn't a list of numbers"),
        ("0.5*Normal(0,1) + 0.6*Normal(1,1)", "don't sum to 1"),
        ("Normal(0,1) Normal(0,1)", "doesn't begin with"),
        ("0.5*Normal(0,1) + 0.5*Laplace(0,1)", "of one family"),
        ("", "isn't a distribution"),
    ):
        with pytest.raises(ValueError, match=message):
            named(text)


COUNTABLE = [
    (Geometric(t(0.3)), Geometric(t(0.6)), "chi_squared", {}, math.inf),
    (Geometric(t(0.3)), Geometric(t(0.6)), "renyi", {"order": 2.0}, math.inf),
    (Geometric(t(0.3)), Geometric(t(0.5)), "chi_squared", {}, 8.0),
    (Geometric(t(0.5)), Poisson(t(1.0)), "renyi", {"order": 2.0}, math.inf),
    (Poisson(t(5.0)), Poisson(t(0.1)), "renyi", {"order": 2.0}, 4.9**2 / 0.1),
    (Poisson(t(1.0)), Poisson(t(1e4)), "renyi", {"order": 0.5}, (1e4**0.5 - 1) ** 2),
    (torch.distributions.Binomial(5, t(0.5)), torch.distributions.Binomial(5, t(0.0)), "forward_kl", {}, math.inf),
    (torch.distributions.Binomial(5, t(0.0)), torch.distributions.Binomial(4, t(0.5)), "forward_kl", {}, 4 * math.log(2)),
    (Bernoulli(t(0.5)), Bernoulli(t(1e-20)), "forward_kl", {}, -math.log(2) - 0.5 * math.log(1e-20)),
    (Bernoulli(logits=t(0.0)), Bernoulli(logits=t(-800.0)), "forward_kl", {}, 400 - math.log(2)),
    (Categorical(logits=t([0.0, 0.0])), Categorical(logits=t([0.0, -200.0])), "forward_kl", {}, 100 - math.log(2)),
    (Categorical(t([0.3, 0.7])), Categorical(t([0.3, 0.3, 0.4])), "forward_kl", {}, 0.7 * math.log(7 / 3)),
]


@pytest.mark.parametrize(("p", "q", "name", "knobs", "truth"), COUNTABLE, ids=str)
def test_rare_atoms_and_long_sums_are_counted_to_the_end(p, q, name, knobs, truth):
    e = estimate(p=p, q=q, divergence=name, **knobs)
    assert e.exact and e.finite == ("infinite" if truth == math.inf else "certified")
    assert e.value == truth or e.value == pytest.approx(truth, rel=1e-9)


SINGLE = [
    (
        lambda d: torch.distributions.Gamma(torch.tensor(1e5, dtype=d), 1.0),
        lambda d: torch.distributions.Gamma(torch.tensor(1.001e5, dtype=d), 1.0),
    ),
    (lambda d: Poisson(torch.tensor(1e4, dtype=d)), lambda d: Poisson(torch.tensor(10001.0, dtype=d))),
    (lambda d: Normal(torch.tensor(0.0, dtype=d), 1.0), lambda d: Normal(torch.tensor(2.0**-13, dtype=d), 1.0)),
    (lambda d: Normal(torch.tensor(0.0, dtype=d), 2.0**-80), lambda d: Normal(torch.tensor(0.0, dtype=d), 1.0)),
]


@pytest.mark.parametrize(("p", "q"), SINGLE)
def test_single_precision_parameters_cost_no_digits(p, q):
    narrow = estimate(p=p(torch.float32), q=q(torch.float32))
    truth = estimate(p=p(torch.float64), q=q(torch.float64)).value
    assert narrow.exact and truth > 0 and narrow.value == pytest.approx(truth, rel=1e-6)


def test_a_closed_form_that_overflows_is_not_called_infinite():
    narrow = estimate(p=Normal(t(0.0), t(1e-200)), q=Normal(t(0.0), t(1.0)))
    assert narrow.exact and narrow.value == pytest.approx(200 * math.log(10) - 0.5, rel=1e-15)
    e = estimate(p=Normal(t(1e200), t(1.0)), q=Normal(t(0.0), t(1.0)))
    assert not e.reliable and e.finite == "not certified" and "overflowed" in e.notes[0]


LINES = [
    (Uniform(t(0.0), t(1.0)), torch.distributions.Kumaraswamy(t(5.0), t(3.0)), 1.8683),
    (Uniform(t(0.0), t(1.0)), torch.distributions.InverseGamma(t(0.7), t(3.0)), math.inf),
    (torch.distributions.VonMises(t(0.0), t(1.0)), torch.distributions.VonMises(t(1.0), t(1.0)), 0.205204),
    (
        Normal(t(0.0), t(1.0)),
        torch.distributions.TransformedDistribution(
            torch.distributions.Exponential(t(1.0)), torch.distributions.transforms.AffineTransform(-1.0, 1.0)
        ),
        math.inf,
    ),
    (
        torch.distributions.LogisticNormal(t([0.0, 0.0]), t([1.0, 1.0])),
        torch.distributions.Dirichlet(t([1.0, 1.0, 1.0])),
        0.299834,
    ),
]


@pytest.mark.parametrize(("p", "q", "truth"), LINES, ids=str)
def test_laws_whose_torch_density_misleads(p, q, truth):
    e = estimate(p=p, q=q)
    assert e.exact and (e.value == truth or e.value == pytest.approx(truth, abs=5e-5))
