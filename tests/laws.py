"""The laws, over every implementation: a new family, objective or solver is covered by adding a row."""

import math
from itertools import product as _product
from unittest.mock import patch

import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Exponential,
    Gamma,
    Gumbel,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
    kl_divergence,
)

from golden import banana, correlated
from oracle import (
    between_loss,
    density,
    forward_loss,
    log_volume,
    model_of,
    moments_of,
    moved,
    nodes_of,
    random_model,
    reverse_loss,
    vector_of,
)
from whichkl import Access, ForwardKL, ReverseKL, Target, advise
from whichkl.divergences.draws import monte_carlo
from whichkl.divergences.exact import quadrature
from whichkl.divergences.kinds import JeffreysDivergence, JeffreysSum
from whichkl.families import Gaussian, Mixture, family_from_config, richer
from whichkl.families.student_t import MultivariateStudentT
from whichkl.objectives import OBJECTIVES, objective_of
from whichkl.problems import bimodal, eight_schools, petals
from whichkl.solvers import (
    SOLVERS,
    ClosedForm,
    ExpectationMaximization,
    MeanField,
    NaturalGradient,
    Population,
    SampleAverage,
    TwoSided,
)
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.particles import rounds

D = torch.float64


def grid(*axes):
    return list(_product(*axes))


def t(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=D)


FAMILIES = [
    Gaussian(),
    Gaussian("diagonal"),
    Mixture(1),
    Mixture(3),
    Mixture(2, "diagonal"),
    Mixture(2, "tied"),
    Mixture(2, law="student_t"),
]
NORMAL = [family for family in FAMILIES if getattr(family, "law", "gaussian") == "gaussian"]
FREE = [family for family in NORMAL if family.covariance != "tied"]
"""Those that deterministic solvers of reverse KL take."""
LINE = {
    "normal": Normal(t(0.5), t(2.0)),
    "mixture": bimodal(2.0, 0.3),
    "laplace": Laplace(t(0.0), t(1.0)),
    "cauchy": Cauchy(t(1.0), t(2.0)),
    "student": StudentT(t(3.0), t(0.0), t(1.0)),
    "gumbel": Gumbel(t(0.0), t(1.0)),
    "exponential": Exponential(t(0.7)),
    "gamma": Gamma(t(2.5), t(1.0)),
    "lognormal": LogNormal(t(0.0), t(0.5)),
    "uniform": Uniform(t(0.0), t(1.0)),
    "beta": Beta(t(2.0), t(3.0)),
}
KNOWN = [
    (Normal(t(0.0), t(1.0)), Normal(t(1.0), t(2.0)), 0.443147),
    (Normal(t(1.0), t(2.0)), Normal(t(0.0), t(1.0)), 1.306853),
    (Exponential(t(0.2)), Exponential(t(0.4)), 0.306853),
    (Uniform(t(0.0), t(1.0)), Normal(t(0.0), t(1.0)), 1.085605),
    (Normal(t(0.0), t(1.0)), Uniform(t(0.0), t(1.0)), math.inf),
    (Uniform(t(0.0), t(1.0)), Beta(t(1.0), t(1.0)), 0.0),
    (Uniform(t(0.0), t(1.0)), Uniform(t(0.0), t(2.0)), 0.693147),
    (Uniform(t(0.0), t(2.0)), Uniform(t(0.0), t(1.0)), math.inf),
    (Cauchy(t(0.0), t(1.0)), Cauchy(t(1.0), t(1.0)), 0.223144),
    (Laplace(t(0.0), t(1.0)), Normal(t(0.0), t(1.0)), 0.225791),
    (Normal(t(0.0), t(1.0)), Laplace(t(0.0), t(1.0)), 0.072093),
    (Normal(t(0.0), t(1.0)), Cauchy(t(0.0), t(1.0)), 0.259245),
    (Cauchy(t(0.0), t(1.0)), Normal(t(0.0), t(1.0)), math.inf),
]


def _heavy(family, model):
    """A proposal with tails no lighter than those of any component."""
    loc, tril = moments_of(family, model)
    return MultivariateStudentT(family.parameters(model)["df"].min(), loc, 2 * tril)


# ---- families: a set of models, written in three ways, with nothing lost between them


@pytest.mark.parametrize(("family", "dim"), grid(FAMILIES, (1, 2, 4)), ids=str)
def test_family_vector_and_parameters_describe_the_same_density(family, dim):
    model = random_model(family, dim)
    x = torch.randn(20, dim, dtype=D)
    torch.testing.assert_close(model.log_prob(x).exp(), density(family, model, x))
    again = model_of(family, vector_of(family, model), dim)
    named = family.model(family.parameters(model))
    torch.testing.assert_close(again.log_prob(x), model.log_prob(x))
    torch.testing.assert_close(named.log_prob(x), model.log_prob(x))
    assert family_from_config(family.config()) == family


@pytest.mark.parametrize(("family", "dim"), grid(FAMILIES, (1, 2, 4)), ids=str)
def test_family_is_a_normalised_distribution(family, dim):
    model = random_model(family, dim)
    wide = MultivariateNormal(model.mean, torch.diag(4 * model.variance)) if family in NORMAL else _heavy(family, model)
    x = wide.sample((40_000,))
    ratio = torch.exp(model.log_prob(x) - wide.log_prob(x))
    stderr = float(ratio.std()) / math.sqrt(len(x))
    assert abs(float(ratio.mean()) - 1) < 4 * stderr


@pytest.mark.parametrize(("family", "dim"), grid(NORMAL, (1, 2, 4)), ids=str)
def test_family_nodes_carry_the_first_two_moments(family, dim):
    model = random_model(family, dim)
    x, w = nodes_of(family, model, *gaussian_rule(dim, 256, seed=1))
    assert float(w.sum()) == pytest.approx(1)
    torch.testing.assert_close(w @ x, model.mean)
    torch.testing.assert_close(w @ (x - model.mean).square(), model.variance)


@pytest.mark.parametrize(("family", "dim"), grid(FAMILIES, (1, 2, 4)), ids=str)
def test_family_is_closed_under_affine_maps(family, dim):
    model = random_model(family, dim)
    shift, scale = moments_of(family, random_model(family, dim, seed=1))
    image = moved(family, model, shift, scale)
    x = torch.randn(20, dim, dtype=D)
    torch.testing.assert_close(image.log_prob(shift + x @ scale.T) + log_volume(scale), model.log_prob(x))


@pytest.mark.parametrize(("family", "dim"), grid(FREE, (1, 2, 4)), ids=str)
def test_family_whitened_has_mean_zero_and_unit_variances(family, dim):
    model = random_model(family, dim)
    shift, scale = moments_of(family, model)
    inverse = torch.linalg.inv(scale).tril()
    white = moved(family, model, -inverse @ shift, inverse)
    torch.testing.assert_close(white.mean, torch.zeros(dim, dtype=D), atol=1e-12, rtol=0)
    torch.testing.assert_close(white.variance, torch.ones(dim, dtype=D))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_family_richer_one_needs_more_rows(family):
    assert richer(family).minimum_rows(3) > family.minimum_rows(3)
    assert family.label


# ---- objectives: gradients, normalisers, and the point q = p


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_forward_loss_gradient_equals_finite_differences(family):
    x, w = torch.randn(30, 2, dtype=D), torch.rand(30, dtype=D)
    theta = vector_of(family, random_model(family, 2)).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: forward_loss(model_of(family, v, 2), x, w / w.sum()), theta)


@pytest.mark.parametrize("family", NORMAL, ids=str)
def test_reverse_loss_gradient_equals_finite_differences(family):
    target = Target(log_prob=lambda x: -x.square().sum(-1) - 0.1 * x.pow(4).sum(-1) + x[:, 0] * x[:, 1], dim=2)
    rule = gaussian_rule(2, 64, seed=0)
    theta = vector_of(family, random_model(family, 2)).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda v: reverse_loss(family, model_of(family, v, 2), target.value_and_score, *rule), theta, atol=1e-6
    )


@pytest.mark.parametrize("family", NORMAL, ids=str)
def test_reverse_loss_gradient_ignores_the_normaliser(family):
    rule = gaussian_rule(2, 64, seed=0)
    theta = vector_of(family, random_model(family, 2)).detach().requires_grad_(True)
    gradients = []
    for constant in (0.0, 123.0):
        target = Target(log_prob=lambda x, c=constant: -x.square().sum(-1) + c, dim=2)
        loss = reverse_loss(family, model_of(family, theta, 2), target.value_and_score, *rule)
        gradients.append(torch.autograd.grad(loss, theta)[0])
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("family", "landing"), grid(NORMAL, (False, True)), ids=str)
def test_reverse_loss_and_landing_gradient_vanish_where_q_is_p(family, landing):
    model = random_model(family, 2)
    target = Target(log_prob=model.log_prob, dim=2, normalized=True)
    for count in (16, 64):
        theta = vector_of(family, model).detach().requires_grad_(True)
        loss = reverse_loss(
            family,
            model_of(family, theta, 2),
            target.value_and_score,
            *gaussian_rule(2, count, seed=count),
            sticking_the_landing=landing,
        )
        assert abs(loss.item()) < 1e-12
        if landing:
            (gradient,) = torch.autograd.grad(loss, theta)
            within = gradient[family.components :] if isinstance(family, Mixture) else gradient
            assert float(within.abs().max()) < 1e-12


@pytest.mark.parametrize("p", [bimodal(3.0), bimodal(2.0), Gamma(t(3.0), t(2.0))], ids=str)
def test_forward_kl_is_cross_entropy_minus_entropy(p):
    target, model = Target.of(p), Gaussian().model({"loc": t([1.0]), "scale_tril": t([[2.0]])})
    x, w = quadrature.expectation_rule(target)
    cross_entropy = float(forward_loss(model, x, w))
    entropy = -float(w @ target.log_prob(x))
    divergence = quadrature.kl(target, Target.of(model)).value
    assert divergence == pytest.approx(cross_entropy - entropy, abs=1e-8)
    assert abs(divergence - cross_entropy) > 0.1


@pytest.mark.parametrize("family", NORMAL, ids=str)
def test_the_losses_of_both_kls_are_those_of_the_formulas(family):
    model, target = random_model(family, 2), Target(log_prob=lambda x: -x.square().sum(-1), dim=2)
    x, w, none = torch.randn(30, 2, dtype=D), torch.full((30,), 1 / 30, dtype=D), torch.zeros(0, dtype=D)
    forward = ForwardKL().loss(-model.log_prob(x), w, none, none)
    torch.testing.assert_close(forward, forward_loss(model, x, w))
    rule = gaussian_rule(2, 64, seed=0)
    y, v = nodes_of(family, model, *rule)
    reverse = ReverseKL().loss(none, none, target.log_prob(y) - model.log_prob(y), v)
    torch.testing.assert_close(reverse, reverse_loss(family, model, target.value_and_score, *rule))


@pytest.mark.parametrize("objective", list(OBJECTIVES.values()), ids=str)
def test_objective_declares_what_it_requires(objective):
    assert objective_of(objective.spec) == objective and objective.name == objective.spec.partition(":")[0]
    for access in objective.requires.alternatives:
        assert access.can_sample == objective.reads_p or objective.name == "forward_kl"  # whose draws can be made from log p
        assert access.can_evaluate or not objective.reads_q
        for part in Access:
            left = access & ~part
            assert objective.requires.met_by(left) == (part not in access), f"{access} without {part}"
            if left.cell == "both" or not objective.is_between:  # advice on those between the two needs both
                assert (objective in [option.objective for option in advise(left).options]) == (part not in access)


# ---- exact divergences


@pytest.mark.parametrize("p", list(LINE.values()), ids=list(LINE))
def test_exact_divergence_of_a_law_from_itself_is_zero(p):
    estimate = quadrature.kl(Target.of(p), Target.of(p))
    assert 0 <= estimate.value < 1e-14
    assert estimate.exact
    assert estimate.finite == "certified"


@pytest.mark.parametrize(("p", "q"), [(p, q) for p, q in grid(LINE, LINE) if p != q])
def test_exact_divergence_is_positive_and_agrees_with_the_closed_form(p, q):
    target, model = Target.of(LINE[p]), Target.of(LINE[q])
    value = quadrature.kl(target, model).value
    assert value > 0
    try:
        truth = float(kl_divergence(LINE[p], LINE[q]))
    except NotImplementedError:
        return
    assert value == pytest.approx(truth, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("p", "q", "truth"), KNOWN, ids=lambda v: str(v)[:24])
def test_exact_divergence_agrees_with_the_test_bed(p, q, truth):
    value = quadrature.kl(Target.of(p), Target.of(q)).value
    assert value == truth if math.isinf(truth) else abs(value - truth) < 6e-7


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (1e4, -3e5), (1.0, 1e6)])
def test_exact_divergence_is_invariant_under_affine_maps(scale, shift):
    def moved(p):
        return Target(
            sampler=lambda n: shift + scale * p.sample((n,))[:, None],
            log_prob=lambda x: p.log_prob((x[:, 0] - shift) / scale) - math.log(scale),
            normalized=True,
            dim=1,
        )

    p, q = bimodal(2.0, 0.3), Normal(t(0.5), t(2.0))
    truth = quadrature.kl(Target.of(p), Target.of(q)).value
    assert quadrature.kl(moved(p), moved(q)).value == pytest.approx(truth, rel=1e-6)


def test_exact_divergence_is_invariant_under_the_exponential():
    p, q = Normal(t(0.0), t(0.5)), Normal(t(0.3), t(0.8))
    truth = float(kl_divergence(p, q))
    moved = [Target.of(LogNormal(one.loc, one.scale)) for one in (p, q)]
    assert quadrature.kl(*moved).value == pytest.approx(truth, abs=1e-9)


def test_exact_divergence_needs_no_normaliser():
    p, q = bimodal(2.0), Normal(t(0.0), t(3.0))
    scaled = [
        Target(sampler=lambda n, o=o: o.sample((n,))[:, None], log_prob=lambda x, o=o, c=c: o.log_prob(x[:, 0]) + c, dim=1)
        for o, c in ((p, 40.0), (q, -500.0))
    ]
    truth = quadrature.kl(Target.of(p), Target.of(q)).value
    assert quadrature.kl(*scaled).value == pytest.approx(truth, abs=1e-9)


# ---- unbiased estimators: right on average, and honest about their error

UNBIASED = {
    "forward_kl": (monte_carlo.forward_kl, lambda p, q: float(kl_divergence(p, q))),
    "reverse_kl": (monte_carlo.reverse_kl, lambda p, q: float(kl_divergence(q, p))),
    "jeffreys_sum": (
        lambda p, q, n, seed: monte_carlo.weighted_kls(p, q, JeffreysSum(), n, seed),
        lambda p, q: float(kl_divergence(p, q) + kl_divergence(q, p)),
    ),
    "jeffreys, weighted": (
        lambda p, q, n, seed: monte_carlo.weighted_kls(p, q, JeffreysDivergence(0.3), n, seed),
        lambda p, q: float(0.3 * kl_divergence(p, q) + 0.7 * kl_divergence(q, p)),
    ),
}
PAIRS = [
    (Normal(t(0.0), t(1.0)), Normal(t(0.7), t(1.4))),
    (
        MultivariateNormal(t([0.0, 1.0]), t([[1.0, 0.5], [0.5, 1.0]])),
        MultivariateNormal(t([0.5, 0.5]), 2 * torch.eye(2, dtype=D)),
    ),
    (Gamma(t(3.0), t(1.0)), Gamma(t(3.5), t(1.3))),
]


@pytest.mark.parametrize(("name", "pair"), grid(UNBIASED, range(len(PAIRS))))
def test_unbiased_estimator_is_right_on_average_and_covers(name, pair):
    estimator, truth = UNBIASED[name]
    p, q = PAIRS[pair]
    repeats = [estimator(Target.of(p), Target.of(q), 1000, seed) for seed in range(200)]
    values = torch.tensor([one.value for one in repeats])
    assert abs(float(values.mean()) - truth(p, q)) < 4 * float(values.std()) / math.sqrt(len(values))
    inside = sum(one.interval[0] <= truth(p, q) <= one.interval[1] for one in repeats)
    assert 180 <= inside <= 199


@pytest.mark.parametrize("constant", [-30.0, 7.0])
def test_jeffreys_ignores_the_normaliser(constant):
    p, q = PAIRS[0]
    plain = monte_carlo.weighted_kls(Target.of(p), Target.of(q), JeffreysSum(), 1000)
    scaled = Target(sampler=lambda n: p.sample((n,))[:, None], log_prob=lambda x: p.log_prob(x[:, 0]) + constant, dim=1)
    assert monte_carlo.weighted_kls(scaled, Target.of(q), JeffreysSum(), 1000).value == pytest.approx(plain.value, abs=1e-9)


# ---- solvers: every solver on every family and target that it solves


TARGETS = {
    "samples": lambda: Target(samples=correlated()),
    "petals": petals,
    "bimodal": lambda: Target.of(bimodal(3.0)),
    "unequal": lambda: Target.of(bimodal(3.0, 0.7)),
    "banana": lambda: Target(log_prob=banana, dim=2),
    "schools": eight_schools,
}
MINIMISED = {kind: next(o for o in OBJECTIVES.values() if o.direction == kind.direction) for kind in SOLVERS}
SOLVED = [
    (kind, family, name)
    for kind, family, name in grid(SOLVERS, FAMILIES, TARGETS)
    if kind.solves(MINIMISED[kind], family, TARGETS[name]().access)
    and MINIMISED[kind].requires.met_by(TARGETS[name]().access)
    and not (kind is SampleAverage and name == "schools")
    and not (kind is TwoSided and family == Mixture(3))
    and not (kind is Population and family not in (Gaussian(), Mixture(3)))
]
IDS = [f"{kind.name}-{family}-{name}" for kind, family, name in SOLVED]


@pytest.mark.parametrize(("kind", "family", "name"), SOLVED, ids=IDS)
def test_solver_is_deterministic_ends_at_an_optimum_and_lists_the_best_first(kind, family, name):
    rows = []
    with patch.object(rounds, "weighted_rows", lambda *one: rows.append(one[1:]) or Target(samples=one[1], weights=one[2])):
        first, again = (kind().solve(TARGETS[name]().unconstrained(), family, seed=5) for _ in range(2))
    parameters = family.parameters(first.best.model)
    for key, value in family.parameters(again.best.model).items():
        assert torch.equal(value, parameters[key])
    assert first.best.converged
    assert first.best.is_global
    losses = [round(one.loss, 9) for one in first.optima]  # ties are put in the order of their means
    assert losses == sorted(losses)
    _assert_local_minimum(first, kind, family, TARGETS[name](), rows[-1] if rows else None)


def _assert_local_minimum(solution, kind, family, target, weighted):
    """No small step in parameters lowers the loss on the very points or nodes that were minimised on."""
    from whichkl.solvers.rows.rows import points_of

    if kind.direction == "forward":
        x, w = weighted or points_of(target, seed=5)

        def loss(theta):
            return forward_loss(model_of(family, theta, target.dim), x, w)

        has_em = kind is ExpectationMaximization or (kind is Population and isinstance(family, Mixture))
        # EM stops a tenth of a nat, over all rows, or 1e-5 nats from the top
        slack = 1e-5 + (0.1 / len(x) if target.samples is not None else 0) if has_em else 1e-9
    elif kind.direction == "between":
        x, w = points_of(target, seed=5)
        rule = gaussian_rule(target.dim, solution.nodes, seed=5)

        def loss(theta):
            return between_loss(MINIMISED[kind], family, model_of(family, theta, target.dim), target, (x, w), rule)

        slack = 1e-7
    else:
        has_new_nodes = kind in (NaturalGradient, SampleAverage)
        rule = gaussian_rule(target.dim, solution.nodes, seed=5 + solution.nodes * has_new_nodes)

        def loss(theta):
            return reverse_loss(family, model_of(family, theta, target.dim), target.value_and_score, *rule)

        # mixtures stop at a gradient of 0.01, where ½ g² is left
        slack = 5e-5 if kind is SampleAverage and target.dim > 1 else 1e-7
    theta = vector_of(family, solution.best.model)
    here = float(loss(theta))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = torch.randn(len(theta), generator=generator, dtype=D)
        for size in (1e-2, -1e-2):
            assert float(loss(theta + size * step)) >= here - slack


@pytest.mark.parametrize(("kind", "family", "name"), [row for row in SOLVED if row[0].direction == "reverse"][::2], ids=str)
def test_reverse_solver_ignores_the_normaliser(kind, family, name):
    target = TARGETS[name]()
    shifted = Target(log_prob=lambda x: target.log_prob(x) + 50.0, dim=target.dim)
    plain = Target(log_prob=target.log_prob, dim=target.dim)
    a, b = (kind().solve(one, family, seed=2).best for one in (plain, shifted))
    assert a.loss - b.loss == pytest.approx(50.0, abs=1e-5)
    torch.testing.assert_close(a.model.variance, b.model.variance, rtol=1e-3, atol=1e-8)


# ---- Gaussian targets: the answer is known, and one step finds it


@pytest.mark.parametrize("dim", (1, 2, 7, 40))
def test_natural_gradient_is_exact_in_one_step_on_a_gaussian(dim):
    generator = torch.Generator().manual_seed(dim)
    root = torch.randn(dim, dim, generator=generator, dtype=D)
    truth = MultivariateNormal(
        100 * torch.randn(dim, generator=generator, dtype=D), root @ root.T + 0.1 * torch.eye(dim, dtype=D)
    )
    solution = NaturalGradient().solve(Target(log_prob=truth.log_prob, dim=dim), Gaussian(), seed=0)
    assert solution.iterations <= 1
    assert len(solution.optima) == 1
    torch.testing.assert_close(solution.best.model.mean, truth.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solution.best.model.variance, truth.variance, rtol=1e-6, atol=0)


def test_projections_of_a_correlated_gaussian_on_a_product_agree_with_the_test_bed():
    p = MultivariateNormal(t([0.0, 0.0]), t([[1.0, 0.9], [0.9, 1.0]]))
    reverse = MeanField().solve(Target.of(p), Gaussian("diagonal"), seed=0).best.model
    forward = Gaussian("diagonal").model({"loc": t([0.0, 0.0]), "scale": t([1.0, 1.0])})
    torch.testing.assert_close(reverse.variance, t([0.19, 0.19]))
    truth = 0.830366
    for first, second in ((p, forward), (reverse, p)):
        first, second = (MultivariateNormal(o.mean, torch.diag(o.variance)) if o is not p else p for o in (first, second))
        assert float(kl_divergence(first, second)) == pytest.approx(truth, abs=6e-7)


def test_laplace_on_a_gaussian_agrees_with_the_test_bed():
    target = Target.of(Laplace(t(0.0), t(1.0)))
    forward = ClosedForm().solve(target, Gaussian(), seed=0).best.model
    assert float(forward.variance) == pytest.approx(2.0, abs=1e-8)
    assert quadrature.kl(target, Target.of(forward)).value == pytest.approx(0.072365, abs=6e-7)
    reverse = NaturalGradient().solve(target, Gaussian(), seed=0).best.model
    assert float(reverse.variance.sqrt()) == pytest.approx(1.253314, rel=2e-3)
    assert quadrature.kl(Target.of(reverse), target).value == pytest.approx(0.048417, abs=2e-6)


OPTIMA = {
    (3.0, 0.5): [(-2.98431, 1.02337, 0.688769), (2.98431, 1.02337, 0.688769), (0.0, 2.74377, 0.840621)],
    (2.0, 0.5): [(0.0, 2.04701, 0.226508)],
    (3.0, 0.7): [(-2.99054, 1.01467, 0.354034), (2.97337, 1.03793, 1.196682)],
}


@pytest.mark.parametrize(("kind", "case", "seed"), grid((NaturalGradient, MeanField), OPTIMA, range(4)))
def test_every_reverse_optimum_of_the_textbook_picture_is_found(kind, case, seed):
    family = Gaussian("full" if kind is NaturalGradient else "diagonal")
    optima = kind().solve(Target.of(bimodal(*case)), family, seed).optima
    found = sorted((float(o.model.mean), float(o.model.variance.sqrt()), o.loss) for o in optima)
    for (mean, sd, loss), truth in zip(found, sorted(OPTIMA[case]), strict=True):
        assert mean == pytest.approx(truth[0], abs=6e-6)
        assert sd == pytest.approx(truth[1], abs=6e-6)
        assert loss == pytest.approx(truth[2], abs=6e-7)


def test_mixture_of_two_dissolves_the_difference_between_the_directions():
    target = Target.of(bimodal(3.0))
    for kind in (ExpectationMaximization, SampleAverage):
        q = Target.of(kind().solve(target, Mixture(2), seed=0).best.model)
        assert quadrature.kl(target, q).value < 1e-6
        assert quadrature.kl(q, target).value < 1e-6


def test_categorical_is_refused_by_families_with_densities():
    with pytest.raises(ValueError, match="discrete"):
        Target.of(Categorical(t([0.3, 0.7])))
    with pytest.raises(ValueError, match="batch shape"):
        Target.of(MixtureSameFamily(Categorical(torch.ones(3, 2)), Normal(torch.zeros(3, 2), 1.0)))
