"""Log densities that nobody should write, and everybody does: a right answer with honest findings, or an error that says why."""

import math

import numpy as np
import pytest
import torch

import whichkl as wk
from whichkl._checks import TargetError
from whichkl.diagnostics.consistency import jumps
from whichkl.families import Gaussian, Mixture

D = torch.float64
EIGHT_SCHOOLS = wk.problems.eight_schools()


def bell(x):
    return -x.square().sum(-1) / 2


def cut(x, where):
    return torch.where(where, bell(x), torch.full_like(x[:, 0], -math.inf))


def step(x):
    return bell(x) + 5 * (x[:, 0] > 0.5).to(x)


def fit(f, family=None, dim=2, **kwargs):
    return wk.fit(wk.Target(log_prob=f, dim=dim, **kwargs), family)


FAMILIES = {"full": Gaussian(), "diagonal": Gaussian("diagonal"), "low rank": Gaussian("low_rank", rank=1), "mixture": Mixture(2)}

REFUSED = {
    "NaN": (lambda x: torch.where(x[:, 0] > 1.5, math.nan, bell(x)), {}, r"NaN at 1\d of 256 points, first at.*pass `support=`"),
    "+inf": (lambda x: torch.where(x[:, 0] > 1.5, x[:, 0] * math.inf, bell(x)), {}, r"\+inf at 49 of 256 points"),
    "NaN in the gradient": (
        lambda x: bell(x) + 0 * torch.where(x[:, 0] < 1.5, (1.5 - x[:, 0]).sqrt(), 0),
        {},
        "gradient of `log_prob` is not finite",
    ),
    "one number": (lambda x: bell(x).sum(), {}, r"shape \(\) for 256 points"),
    "one point, (d,)": (lambda x: -x.square(), {"batched": False}, r"shape \(2,\) for one point"),
    "one point, unsaid": (lambda x: -(x[0] ** 2) - torch.square(x[1]), {}, r"gets an \(n, d\) tensor of float64"),
    "single precision": (lambda x: bell(x @ torch.eye(2)), {}, "which `dtype=` changes"),
    "flat": (lambda x: 0 * x.sum(-1), {}, "is constant"),
    "flat along x2": (lambda x: -x[:, 0].square(), {}, "spreads without bound along x2"),
    "negated": (lambda x: -bell(x), {}, "spreads without bound"),
    "a huge constant": (lambda x: bell(x) + 1e15, {}, r"ELBO is 1e\+15 nats.*subtract the constant"),
    "too wide": (lambda x: bell(x / 1e13), {}, "needs other units"),
    "a box": (
        lambda x: cut(x, (x.abs() < 1).all(-1)),
        {},
        r"-inf inside the support of every start.*Pass `support=`.*forward_kl",
    ),
    "nowhere": (lambda x: x[:, 0] * 0 - math.inf, {}, "-inf at all 256 start points"),
    "a density": (lambda x: bell(x).exp(), {}, "a density, not its log"),
    "noise": (lambda x: bell(x) + 0.1 * torch.randn(len(x)), {}, "isn't a function.*two calls at one point"),
    "nothing returned": (lambda x: None, {}, "returned None"),
    "rows mixed": (lambda x: bell(x - x.mean(0)), {}, "depends on the batch"),
    "detached": (lambda x: bell(x.detach()) + 0 * x.sum(-1), {}, "not the gradient of its values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_fitted_is_refused_with_the_reason(name):
    f, kwargs, message = REFUSED[name]
    with pytest.raises(TargetError, match=f"^Cannot .*{message}"):
        fit(f, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_far_from_the_mass_is_found_and_said(family):
    found = fit(lambda x: torch.where(x.abs().amax(-1) > 7, math.nan, bell(x)), FAMILIES[family])  # an integrator blows up
    assert found.status == "converged"
    assert "not_a_number_met" in found.findings
    assert found.diagnostics.elbo.value == pytest.approx(math.log(2 * math.pi), abs=1e-3)


@pytest.mark.parametrize("family", ["full", "diagonal", "mixture"])
def test_a_pole_of_infinite_mass_is_refused_and_one_of_finite_mass_is_not(family):
    def log_prob(power):
        return lambda x: bell(x) - power * x.square().sum(-1).log() / 2

    with pytest.raises(TargetError, match=r"the model shrinks to a point along x[12].*∫p may be infinite"):
        fit(log_prob(3.0), FAMILIES[family])
    assert fit(log_prob(0.9), FAMILIES[family]).model.variance.sqrt().tolist() == pytest.approx([0.742, 0.742], rel=0.05)
    assert fit(lambda x: bell(x / 1e-13), FAMILIES[family]).status == "converged"


def test_no_number_on_a_support_is_said_in_its_coordinates():
    near = wk.Target(log_prob=lambda x: torch.where(x.amax(-1) > 0.5, math.nan, -x.sum(-1)), dim=2, support="positive")
    with pytest.raises(TargetError, match="NaN at .* points, first at") as caught:
        wk.fit(near)
    first = [float(one) for one in str(caught.value).split("first at (")[1].split(")")[0].split(", ")]
    assert min(first) > 0 and max(first) > 0.5
    gamma = lambda x: torch.where(x.amax(-1) > 60, math.nan, (3 * x.log() - x).sum(-1))  # noqa: E731
    assert "not_a_number_met" in wk.fit(wk.Target(log_prob=gamma, dim=2, support="positive")).findings


def test_an_optimum_without_mass_is_no_finding():
    def log_prob(x):  # skew, so that the weights aren't even, and a bump of e⁻¹⁸ of the mass
        return torch.logaddexp((3 * (x - x.exp())).sum(-1), bell(x - 8) - 25)

    found = wk.fit(wk.Target(log_prob=log_prob, dim=2), seed=1)
    assert len(found.diagnostics.optima) == 2
    assert found.diagnostics.ess < 9_900
    assert not {"other_modes_exist", "weights_unreliable"} & found.findings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["flat along x2", "a huge constant", "a box"])
def test_every_family_says_the_same(name, family):
    f, kwargs, message = REFUSED[name]
    with pytest.raises(TargetError, match=message):
        fit(f, FAMILIES[family], **kwargs)


S = torch.tensor([1e-8, 1e8], dtype=D)
GAUSSIANS = {
    "standard": (bell, 0.0, 1.0, 2, {}),
    "on the line": (bell, 0.0, 1.0, 1, {}),
    "far": (lambda x: bell(x - 1e6), 1e6, 1.0, 2, {}),
    "farther": (lambda x: bell((x - 1e9) / 10), 1e9, 10.0, 2, {}),
    "far and narrow": (lambda x: bell((x - 1e6) / 1e-3), 1e6, 1e-3, 2, {}),
    "16 decades": (lambda x: bell(x / S), 0.0, S, 2, {}),
    "narrow": (lambda x: bell((x - 1) / 1e-8), 1.0, 1e-8, 2, {}),
    "wide": (lambda x: bell(x / 1e8), 0.0, 1e8, 2, {}),
    "arrays": (lambda x: -np.square(np.asarray(x) / S.numpy()).sum(-1) / 2, 0.0, S, 2, {}),
    "points": (lambda x: float(-(x**2).sum() / 2), 0.0, 1.0, 2, {"batched": False}),
    "a constant": (lambda x: bell(x) - 1e9, 0.0, 1.0, 2, {}),
    "single precision": (lambda x: bell(x @ torch.eye(2) - 3), 3.0, 1.0, 2, {"dtype": torch.float32}),
    "single precision, score": (
        lambda x: bell(x @ torch.eye(2)),
        0.0,
        1.0,
        2,
        {"dtype": torch.float32, "score": lambda x: -x @ torch.eye(2)},
    ),
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_gaussian_is_found_wherever_it_is_and_however_it_is_written(name):
    f, mean, sd, dim, kwargs = GAUSSIANS[name]
    found = fit(f, dim=dim, **kwargs)
    assert found.status == "converged"
    assert not found.findings
    assert float(((found.model.mean - mean) / sd).abs().max()) < 1e-5
    torch.testing.assert_close(found.model.variance.sqrt().to(D) / sd, torch.ones(dim, dtype=D), rtol=0, atol=1e-5)


def test_a_score_in_single_precision_has_its_integrals_in_double():
    found = wk.fit(wk.Target(score=lambda x: 2 - x @ torch.eye(2), dim=2, dtype=torch.float32))
    torch.testing.assert_close(found.model.mean.to(D), torch.full((2,), 2.0, dtype=D), rtol=0, atol=1e-5)


def test_two_hundred_correlated_columns():
    a = torch.randn(200, 200, dtype=D, generator=torch.Generator().manual_seed(0))
    precision = a @ a.T / 200 + torch.eye(200, dtype=D)
    found = fit(lambda x: -((x @ precision) * x).sum(-1) / 2, dim=200)
    torch.testing.assert_close(found.model.covariance_matrix, torch.linalg.inv(precision), rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_outside_the_support_make_reverse_kl_infinite_and_it_is_said(family):
    found = fit(lambda x: cut(x, x[:, 0] > -3.4), FAMILIES[family])
    assert found.value.value == math.inf
    assert "outside_support" in found.findings
    assert "nodes_too_few" not in found.findings
    assert "Pass `support=`" in str(found)


@pytest.mark.parametrize("dim", [1, 10])
def test_heavy_tails_are_fitted_and_said_to_be_too_heavy(dim):
    found = fit(lambda x: -torch.log1p(x.square()).sum(-1), dim=dim)
    # on the line argmin over s of −log s + E log(1 + s² z²) is where E[s² z² / (1 + s² z²)] = ½
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=D)
    ratio = (found.model.variance[0] * z.square()) / (1 + found.model.variance[0] * z.square())
    assert float((ratio.mean() - 0.5).abs()) < 4 * float(ratio.std()) / math.sqrt(len(z)) + 0.01 * (dim > 1)
    assert {"family_too_small", "weights_unreliable"} <= found.findings


@pytest.mark.parametrize("apart", [50, 500, 5000])
def test_a_mixture_of_two_far_modes_is_exact_and_nothing_is_left_out(apart):
    found = fit(lambda x: torch.logaddexp(bell(x - apart), bell(x + apart)), Mixture(2))
    assert found.status == "converged"
    assert found.value.value == pytest.approx(-math.log(2) - math.log(2 * math.pi), abs=1e-6)
    assert found.findings <= {"other_modes_exist"}


JUMPS = {
    "a threshold": step,
    "steps": lambda x: -x.round().square().sum(-1) / 2,
    "a table": lambda x: bell(x) + torch.linspace(-3, 0, 100, dtype=D)[(x[:, 0] * 10 + 50).clamp(0, 99).long()],
    "an array with a threshold": lambda x: -np.square(np.asarray(x)).sum(-1) / 2 + (np.asarray(x)[:, 0] > 0.5),
}


@pytest.mark.parametrize("name", JUMPS)
def test_jumps_that_no_gradient_sees_are_found(name):
    found = fit(JUMPS[name])
    assert "log_density_jumps" in found.findings
    assert found.diagnostics.jump > 0.05


CONTINUOUS = {
    "a steep sigmoid": lambda x: bell(x) + 5 * torch.sigmoid(40 * (x[:, 0] - 0.5)),
    "kinks": lambda x: -x.abs().sum(-1),
    "hinges": lambda x: bell(x) - 20 * (x[:, 0] - 0.3).clamp(min=0),
    "a narrow ridge": lambda x: bell(x) - 5_000 * (x[:, 1] - x[:, 0] ** 2) ** 2,
    "a funnel": lambda x: -x[:, 0].square() / 18 - x[:, 0] - x[:, 1].square() * (-2 * x[:, 0]).exp() / 2,
    "heavy tails": lambda x: -torch.log1p((10 * x).square()).sum(-1),
    "waves": lambda x: torch.sin(20 * x).sum(-1),
    "eight schools": lambda x: EIGHT_SCHOOLS.log_prob(x.repeat(1, 5)),
}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_what_is_continuous_has_no_jumps(name, scale):
    x = scale * torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=D)
    assert jumps(wk.Target(log_prob=CONTINUOUS[name], dim=2), x) == 0


def test_a_jump_is_measured():
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=D)
    crossed = ((x[:32, 0] > 0.5) != (x[32:, 0] > 0.5)).double().mean()
    assert jumps(wk.Target(log_prob=step, dim=2), x) == pytest.approx(5 * float(crossed), rel=1e-6)
    assert jumps(wk.Target(log_prob=lambda x: cut(x, x[:, 0] > 3), dim=2), x) is None


def _in_place(x):
    values = np.asarray(x.detach())
    np.abs(values, out=values)
    return -((values - 1) ** 2).sum(-1) / 2


def _of_absolute_values(x):
    return -((np.abs(np.asarray(x.detach())) - 1) ** 2).sum(-1) / 2


def _in_place_of_tensors(x):
    with torch.no_grad():
        x.abs_()
    return -(x - 1).square().sum(-1) / 2


def test_a_log_density_that_changes_its_argument_changes_no_fit():
    fits = [wk.fit(wk.Target(log_prob=one, dim=1)) for one in (_in_place, _of_absolute_values)]
    assert fits[0].value == fits[1].value
    with pytest.raises(TargetError, match="changes its argument in place"):
        wk.fit(wk.Target(log_prob=_in_place_of_tensors, dim=1))


def test_complex_log_densities_are_refused():
    with pytest.raises(TargetError, match="complex"):
        wk.fit(wk.Target(log_prob=lambda x: torch.complex(-x.square().sum(-1), x.sum(-1)), dim=1))


@pytest.mark.parametrize(
    "product",
    [
        lambda x: torch.matmul(input=x, other=torch.eye(2, dtype=x.dtype)),
        lambda x: torch.nn.functional.linear(input=x, weight=torch.eye(2, dtype=x.dtype)),
        lambda x: torch.einsum("ij,jk->ik", x, torch.eye(2, dtype=x.dtype)),
        torch.func.vmap(lambda row: torch.eye(2, dtype=row.dtype) @ row),
    ],
    ids=["matmul by keywords", "linear by keywords", "einsum", "vmap"],
)
def test_a_product_is_called_in_any_way(product):
    fit = wk.fit(wk.Target(log_prob=lambda x: -product(x).square().sum(-1), dim=2))
    torch.testing.assert_close(fit.model.covariance_matrix, torch.eye(2, dtype=torch.float64) / 2)
