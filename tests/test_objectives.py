"""Objectives between the directions: what they declare, their laws, the paths that they make, and fits by them."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import whichkl as wk
from laws import FREE
from oracle import between_loss, model_of, random_model, vector_of
from whichkl import Access, Target
from whichkl._checks import InputError, TargetError
from whichkl.diagnostics.between import between_value
from whichkl.families import Gaussian, Mixture
from whichkl.objectives import (
    OBJECTIVES,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    Renyi,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    objective_of,
)
from whichkl.problems import bimodal
from whichkl.solvers import Optimum, Solution, TwoSided, solver_for
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule

D = torch.float64
BETWEEN = [Jeffreys(0.3), JensenShannon(0.4), SkewForwardKL(0.2), SkewReverseKL(0.2), Renyi(0.4), Renyi(1.7)]


def t(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=D)


CORRELATED = MultivariateNormal(t([1.0, -2.0]), t([[1.0, 0.7], [0.7, 1.0]]))


def skewed(x):
    return -0.5 * x.square().sum(-1) - 0.1 * x.pow(4).sum(-1) + x[:, 0] * x[:, 1]


# ---- laws of the losses


@pytest.mark.parametrize("family", [Gaussian(), Mixture(2, "diagonal")], ids=str)
@pytest.mark.parametrize("objective", BETWEEN, ids=lambda o: o.spec)
def test_gradient_equals_finite_differences(objective, family):
    target = Target(log_prob=skewed, dim=2)
    points = torch.randn(20, 2, dtype=D, generator=torch.Generator().manual_seed(1)), torch.full((20,), 0.05, dtype=D)
    rule = gaussian_rule(2, 32, seed=0)
    theta = vector_of(family, random_model(family, 2)).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda v: between_loss(objective, family, model_of(family, v, 2), target, points, rule), theta, atol=1e-6
    )


@pytest.mark.parametrize("family", FREE, ids=str)
@pytest.mark.parametrize("objective", BETWEEN, ids=lambda o: o.spec)
def test_loss_is_zero_at_q_equal_to_p_on_any_points(objective, family):
    model = random_model(family, 2)
    target = Target(log_prob=model.log_prob, dim=2)
    for count in (16, 64):
        points = torch.randn(count, 2, dtype=D), torch.full((count,), 1 / count, dtype=D)
        assert abs(float(between_loss(objective, family, model, target, points, gaussian_rule(2, count, 0)))) < 1e-12


@pytest.mark.parametrize("objective", [Jeffreys(0.3), Jeffreys(0.5), Jeffreys(1.0), Renyi(1.7)], ids=lambda o: o.spec)
def test_an_unnormalised_density_shifts_the_loss_by_its_share_of_log_z_and_leaves_the_gradient(objective):
    family, losses, gradients = Gaussian(), [], []
    points, rule = (torch.randn(30, 2, dtype=D), torch.full((30,), 1 / 30, dtype=D)), gaussian_rule(2, 32, 0)
    theta = vector_of(family, random_model(family, 2)).detach().requires_grad_(True)
    for constant in (0.0, 30.0):
        target = Target(log_prob=lambda x, c=constant: skewed(x) + c, dim=2)
        losses.append(between_loss(objective, family, model_of(family, theta, 2), target, points, rule))
        gradients.append(torch.autograd.grad(losses[-1], theta)[0])
    assert float(losses[1].detach() - losses[0].detach()) == pytest.approx(30 * objective.log_z_share, abs=1e-9)
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("objective", [*BETWEEN, JensenShannon(0.01), Renyi(3.0), SkewReverseKL(0.9)], ids=lambda o: o.spec)
def test_near_q_equal_to_p_the_loss_is_the_curvature_times_a_kl(objective):
    p, q = Target.of(bimodal(1.5)), Target.of(bimodal(1.502))
    value = sum(w * wk.estimate(p=p, q=q, divergence=kind).value for w, kind in objective.kinds)
    kl = wk.estimate(p=p, q=q).value
    assert value / (objective.curvature * kl) == pytest.approx(1, abs=0.02)


def divergence(objective, p, q):
    """The divergence by quadrature."""
    return sum(w * wk.estimate(p=p, q=q, divergence=kind, method="quadrature").value for w, kind in objective.kinds)


def target_of(objective, p, constant=3.0):
    """A target with a sampler, its log density unnormalised where the objective allows that."""
    needs = not objective.requires.met_by(Access.SAMPLER | Access.LOG_PROB)
    shift = 0.0 if needs else constant
    return Target(
        sampler=lambda n: p.sample((n,)), log_prob=lambda x: p.log_prob(x) + shift, dim=p.event_shape[0], normalized=needs
    )


@pytest.mark.parametrize("objective", BETWEEN, ids=lambda o: o.spec)
def test_value_agrees_with_quadrature_and_its_errors_cover(objective):
    q = MultivariateNormal(t([0.5, -1.5]), t([[1.2, 0.6], [0.6, 0.9]]))
    truth = divergence(objective, CORRELATED, q)
    solution = Solution((Optimum(q, 0.0, True, True),), 0, 0.0)
    values = [between_value(target_of(objective, CORRELATED), objective, q, solution, 0, seed) for seed in range(0, 90, 3)]
    z = t([(one.value - truth) / one.stderr for one in values])
    assert abs(float(z.mean())) < 4 / math.sqrt(len(z))
    assert 0.6 < float(z.std()) < 1.4
    assert all(one.up_to is None and one.quantity == objective.quantity for one in values)
    assert sum(one.reliable for one in values) >= 0.9 * len(values)  # whether a tail is heavy is estimated, too


def test_value_of_jeffreys_is_infinite_where_q_has_mass_and_p_none_and_that_of_jensen_shannon_is_not():
    def half(x):
        return torch.where(x[:, 0] > 0, -x[:, 0], -math.inf)

    p = torch.distributions.Exponential(t(1.0))
    target = Target(sampler=lambda n: p.sample((n, 1)), log_prob=half, dim=1, normalized=True)
    fit = wk.fit(target, objective="jensen_shannon")
    truth = wk.estimate(p=p, q=fit.model, divergence="jensen_shannon").value
    assert fit.value.value == pytest.approx(truth, abs=1e-6)
    assert 0 < truth < math.log(2)
    with pytest.raises(TargetError, match="bounded divergence such as jensen_shannon"):
        wk.fit(target, objective="jeffreys")


# ---- paths: their ends are the directions


def optima(objective, target, family=None):
    solution = TwoSided().toward(objective).solve(target, family or Gaussian(), 0)
    assert solution.best.converged
    return sorted((float(o.model.mean), float(o.model.variance.sqrt())) for o in solution.optima)


@pytest.mark.parametrize(
    ("objective", "direction", "close"),
    [
        (Jeffreys(1.0), ForwardKL(), 1e-6),
        (Jeffreys(0.0), ReverseKL(), 1e-6),
        (JensenShannon(1e-4), ForwardKL(), 1e-3),
        (JensenShannon(1 - 1e-6), ReverseKL(), 0.02),
        (SkewReverseKL(1e-6), ReverseKL(), 0.02),
        (Renyi(1 - 1e-4), ForwardKL(), 1e-3),
        (Renyi(1 + 1e-4), ForwardKL(), 1e-3),
        (Renyi(1e-4), ReverseKL(), 1e-3),
    ],
    ids=str,
)
def test_ends_of_a_path_are_the_directions(objective, direction, close):
    target = Target.of(bimodal(2.7))
    ends = solver_for(direction, Gaussian(), target.access).solve(target, Gaussian(), 0).optima
    truth = sorted((float(o.model.mean), float(o.model.variance.sqrt())) for o in ends)
    found = [one for one in optima(objective, target) if any(math.dist(one, other) < 10 * close for other in truth)]
    assert len(found) == len(truth)
    for one, other in zip(found, truth, strict=True):
        assert one == pytest.approx(other, abs=close)


@pytest.mark.parametrize("family", [Gaussian("diagonal"), Gaussian()], ids=str)
@pytest.mark.parametrize(("weight", "name"), [(1.0, "forward_kl"), (0.0, "reverse_kl")])
def test_ends_of_jeffreys_are_the_fits_of_both_directions_in_two_dimensions(weight, name, family):
    p = Target.of(CORRELATED)
    one = TwoSided().toward(Jeffreys(weight)).solve(p, family, 0)
    other = solver_for(OBJECTIVES[name], family, p.access).solve(p, family, 0)
    torch.testing.assert_close(one.best.model.mean, other.best.model.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.best.model.variance, other.best.model.variance, atol=1e-5, rtol=1e-5)


def by_grid(half_distance, weight):
    """Local minima of w KL(p‖q) + (1 − w) KL(q‖p) over a grid of means and scales, by sums over another of x."""
    x = torch.linspace(-16, 16, 1201, dtype=D)
    log_p = bimodal(half_distance).log_prob(x)
    mean, log_sd = torch.meshgrid(torch.linspace(-4, 4, 121, dtype=D), torch.linspace(-0.4, 1.5, 90, dtype=D), indexing="ij")
    log_q = -0.5 * ((x - mean[..., None]) / log_sd.exp()[..., None]).square() - log_sd[..., None] - 0.5 * math.log(2 * math.pi)
    terms = (weight * log_p.exp() - (1 - weight) * log_q.exp()) * (log_p - log_q)
    loss = terms.sum(-1) * (x[1] - x[0])
    inner = loss[1:-1, 1:-1]
    least = torch.stack([loss[1 + i : 120 + i, 1 + j : 89 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]).amin(0)
    at = (inner <= least).nonzero()
    return sorted((float(mean[i + 1, 0]), float(log_sd[0, j + 1].exp()), float(inner[i, j])) for i, j in at.tolist())


@pytest.mark.parametrize(
    ("half_distance", "weight", "count"),
    [(2.35, 0.0, 1), (2.45, 0.0, 3), (2.6, 0.01, 3), (2.5, 0.02, 1), (3.0, 0.05, 3), (3.0, 0.1, 1), (3.0, 1.0, 1)],
)
def test_every_optimum_along_the_path_is_found(half_distance, weight, count):
    truth = by_grid(half_distance, weight)
    solution = TwoSided().toward(Jeffreys(weight)).solve(Target.of(bimodal(half_distance)), Gaussian(), 0)
    found = sorted((float(o.model.mean), float(o.model.variance.sqrt()), o.loss) for o in solution.optima)
    assert len(found) == len(truth) == count
    for one, other in zip(found, truth, strict=True):
        assert one[:2] == pytest.approx(other[:2], abs=0.15)
        assert one[2] == pytest.approx(other[2], abs=2e-3)


def test_along_the_path_the_covering_optimum_takes_over():
    """At M = 3 reverse KL prefers one bump, forward KL both; at M = 2.75 both directions cover."""
    for half_distance, weight, centred in ((3.0, 0.0, False), (3.0, 0.01, False), (3.0, 0.04, True), (2.75, 0.0, True)):
        solution = TwoSided().toward(Jeffreys(weight)).solve(Target.of(bimodal(half_distance)), Gaussian(), 0)
        assert (abs(float(solution.best.model.mean)) < 0.1) is centred


# ---- fits


@pytest.mark.parametrize("objective", [*BETWEEN, Jeffreys()], ids=lambda o: o.spec)
def test_a_fit_on_the_line_has_the_value_of_its_divergence(objective):
    fit = wk.fit(bimodal(2.0), objective=objective)
    assert (fit.status, fit.solver) == ("converged", "two_sided")
    assert fit.value.exact
    assert fit.value.value == pytest.approx(divergence(objective, bimodal(2.0), fit.model), abs=1e-6)
    assert fit.diagnostics.optima[0].loss == pytest.approx(fit.value.value, abs=1e-5)
    assert fit.diagnostics.ess > 100
    assert objective.spec in str(fit)


@pytest.mark.parametrize("objective", BETWEEN, ids=lambda o: o.spec)
def test_a_fit_in_the_plane_has_the_value_of_its_divergence_within_errors(objective):
    family = Gaussian("diagonal")
    fit = wk.fit(target_of(objective, CORRELATED), family, objective=objective)
    q = MultivariateNormal(fit.model.mean, torch.diag(fit.model.variance))
    assert abs(fit.value.value - divergence(objective, CORRELATED, q)) < 4 * fit.value.stderr < 0.2
    assert "family_too_small" in fit.findings
    # no diagonal Gaussian near it is better: a step of either scale or mean raises the divergence
    here = divergence(objective, CORRELATED, q)
    for shift, scale in ((t([0.1, 0.0]), 1.0), (t([0.0, 0.0]), 1.1), (t([0.0, 0.0]), 0.9)):
        moved = MultivariateNormal(fit.model.mean + shift, scale * torch.diag(fit.model.variance))
        assert divergence(objective, CORRELATED, moved) > here


@pytest.mark.parametrize("objective", [Jeffreys(0.3), Renyi(0.4), Renyi(1.7)], ids=lambda o: o.spec)
def test_fit_and_value_ignore_the_normaliser(objective):
    fits = [wk.fit(target_of(objective, CORRELATED, c), Gaussian("diagonal"), objective=objective) for c in (0.0, 40.0)]
    torch.testing.assert_close(fits[0].model.mean, fits[1].model.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(fits[0].model.variance, fits[1].model.variance, atol=1e-5, rtol=0)
    assert fits[0].value.value == pytest.approx(fits[1].value.value, abs=1e-6)


def test_fixed_rows_are_held_out_of_the_value_and_the_model_has_seen_them_all():
    x = CORRELATED.sample((600,))
    target = Target(samples=x, log_prob=lambda y: CORRELATED.log_prob(y) + 2, names=["a", "b"])
    fit = wk.fit(target, objective="jeffreys:0.7")
    assert "120 rows held out" in fit.value.method
    assert abs(fit.value.value) < 4 * fit.value.stderr + 0.03
    whole = TwoSided().toward(Jeffreys(0.7)).solve(target, Gaussian(), 0).best.model
    torch.testing.assert_close(fit.model.mean, whole.mean)
    assert fit.diagnostics.two_sample is not None
    unjudged = wk.fit(target, objective="jeffreys:0.7", judge=False)
    assert not unjudged.value.reliable
    assert "no rows were held out" in unjudged.value.notes[0]
    one = wk.fit(target, objective="jeffreys:0.7")
    assert torch.equal(one.model.mean, fit.model.mean)
    assert one.value == fit.value


def test_weights_chains_supports_and_scores_are_respected():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, dtype=D, generator=generator)
    weighted = Target(samples=torch.cat([x, x + 9]), weights=torch.arange(800) < 400, score=lambda y: -y)
    fit = wk.fit(weighted, objective="jeffreys")
    assert abs(float(fit.model.mean)) < 0.2
    assert abs(fit.value.value) < 4 * fit.value.stderr + 0.05
    chain = torch.zeros(2000, 1, dtype=D)
    for i in range(1, 2000):
        chain[i] = 0.9 * chain[i - 1] + math.sqrt(1 - 0.81) * torch.randn(1, dtype=D, generator=generator)
    correlated = Target(samples=chain, log_prob=lambda y: -0.5 * y.square().sum(-1), chains=2)
    independent = Target(samples=chain, log_prob=correlated.log_prob)
    values = [wk.fit(one, objective="jeffreys").value for one in (correlated, independent)]
    assert "400 rows held out" in values[0].method
    assert values[0].stderr > 1.5 * values[1].stderr
    p = torch.distributions.Gamma(t(3.0), t(1.0))
    positive = wk.fit(p, objective="renyi:0.5")
    assert bool((positive.model.sample((100,)) > 0).all())
    assert positive.value.exact
    assert 0 < positive.value.value < wk.fit(p, objective="forward_kl").value.value


def test_more_components_end_the_difference_between_all_of_them():
    for objective in ("jeffreys:0.5", "jensen_shannon", "renyi:0.5"):
        fit = wk.fit(bimodal(3.0), Mixture(2), objective=objective)
        assert fit.value.value < 1e-6


def test_a_fit_is_saved_with_its_parameter_and_reported(tmp_path):
    fit = wk.fit(bimodal(2.0), objective=Renyi(0.7))
    fit.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    assert again.objective == Renyi(0.7)
    assert again.value == fit.value
    assert "Rényi over a full Gaussian" in wk.report(fit, tmp_path / "report.html").read_text()


# ---- names, declarations, refusals


def test_a_text_names_an_objective_and_its_parameter():
    for objective in BETWEEN:
        assert objective_of(objective.spec) == objective
    assert objective_of("jensen_shannon") == JensenShannon()
    assert objective_of("reverse_kl").spec == "reverse_kl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jeffreys:2", r"weight_on_forward=2.0`: it must lie between 0 and 1"),
        ("jeffreys:x", r"it is written jeffreys\[:WEIGHT_ON_FORWARD\]"),
        ("forward_kl:1", r"it is written forward_kl"),
        ("jensen_shannon:1", "strictly between 0 and 1"),
        ("skew_reverse_kl:0", "strictly between 0 and 1"),
        ("renyi:1", "positive and other than 1"),
        ("renyi:nan", "positive and other than 1"),
        ("alpha", r"this version minimises forward_kl, reverse_kl, jeffreys\[:WEIGHT_ON_FORWARD\], jensen_shannon\[:WEIGHT\]"),
    ],
)
def test_a_wrong_text_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        objective_of(text)


@pytest.mark.parametrize(
    ("target", "objective", "instead"),
    [
        (lambda: Target(samples=torch.randn(50, 2)), "jeffreys", r"pass `log_prob=` or `score=`\."),
        (lambda: Target(log_prob=skewed, dim=2), "jeffreys", r"pass `sampler=` or `samples=`\."),
        (lambda: Target(samples=torch.randn(50, 2), log_prob=skewed), "jensen_shannon", r"pass `normalized=True`\."),
        (lambda: Target(log_prob=skewed, dim=2), "skew_reverse_kl", r"pass `normalized=True`\."),
    ],
)
def test_what_is_missing_is_named(target, objective, instead):
    with pytest.raises(TargetError, match=instead):
        wk.fit(target(), objective=objective)


def test_one_access_is_advised_as_ever_and_both_are_shown_what_lies_between():
    for access in (Access.SAMPLES, Access.LOG_PROB | Access.NORMALIZED, Access(0)):
        advice = wk.advise(access)
        assert {*advice.missing, *(option.objective.name for option in advice.options)} == {"forward_kl", "reverse_kl"}
    names = [option.objective.name for option in wk.advise(bimodal()).options]
    assert names == list(OBJECTIVES)
    assert wk.advise(bimodal()).best.objective.name == "forward_kl"


def test_skew_reverse_kl_needs_no_draws_of_p():
    target = Target(log_prob=CORRELATED.log_prob, dim=2, normalized=True)
    fit = wk.fit(target, Gaussian("diagonal"), objective="skew_reverse_kl:0.3")
    assert fit.status == "converged"
    assert fit.diagnostics.missing_modes is not None
    reverse = wk.fit(target, Gaussian("diagonal")).model
    assert bool((fit.model.variance > reverse.variance).all())


def test_known_gaussians_are_found_by_every_objective():
    for objective in BETWEEN:
        solution = TwoSided().toward(objective).solve(Target.of(CORRELATED), Gaussian(), 0)
        assert float(kl_divergence(CORRELATED, solution.best.model)) < 2e-4
        assert len(solution.optima) == 1


def test_what_a_solver_does_not_take_is_said():
    assert "no solver minimises it over" in wk.advise(bimodal(), Gaussian("low_rank", rank=1)).missing["jeffreys"]
