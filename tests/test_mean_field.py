"""Mean field and low rank by reverse KL: known optima, many dimensions in little memory, and linear response."""

import math

import pytest
import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, kl_divergence

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.families import Gaussian
from whichkl.solvers import LowRank, MeanField
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.nodes.vector_elbo import DiagonalAverage, LowRankAverage
from whichkl.solvers.trust_region import minimize

D = torch.float64
DIAGONAL = Gaussian("diagonal")


def correlated(dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=D)
    return MultivariateNormal(
        10 * torch.randn(dim, generator=generator, dtype=D), root @ root.T / dim + torch.eye(dim, dtype=D) / 10
    )


def chain(dim, rho=0.9):
    """x₁ ~ N(1, 1/(1 − ρ²)), xᵢ₊₁ − 1 ~ N(ρ (xᵢ − 1), 1); with its precision's diagonal."""

    def log_prob(x):
        y = x - 1.0
        return -((1 - rho**2) * y[:, 0] ** 2 + (y[:, 1:] - rho * y[:, :-1]).square().sum(-1)) / 2

    diagonal = torch.full((dim,), 1 + rho**2, dtype=D)
    diagonal[0] = diagonal[-1] = 1.0
    return wk.Target(log_prob=log_prob, dim=dim), diagonal


# ---- nodes fewer than dimensions


@pytest.mark.parametrize(("dim", "count", "apart"), [(100, 64, 0), (1000, 64, 0), (1000, 256, 3), (70, 128, 5)])
def test_few_nodes_have_unit_variances_and_neighbours_that_are_uncorrelated(dim, count, apart):
    z, w = gaussian_rule(dim, count, seed=1, apart=apart)
    second = z.T @ (w[:, None] * z)
    torch.testing.assert_close(second.diagonal(), torch.ones(dim, dtype=D))
    near = (count // 2 - apart) // 4
    band = torch.triu(torch.ones(dim, dim, dtype=torch.bool), 1) & torch.tril(torch.ones(dim, dim, dtype=torch.bool), near)
    band[:apart, apart:] = True
    assert float(second[band].abs().max()) < 1e-10
    assert float((w @ z).abs().max()) < 1e-12
    assert 2.5 < float(z.pow(4).mean()) < 3.2


@pytest.mark.parametrize("count", [3, 64])
def test_averages_have_the_gradients_that_they_say(count):
    dim, rank = 4, 2
    target = wk.Target(log_prob=lambda x: -x.square().sum(-1) - x.pow(4).sum(-1) / 9 + x[:, 0] * x[:, 1], dim=dim)
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(count, dim + rank, generator=generator, dtype=D), torch.rand(count, generator=generator, dtype=D)
    for average, size in (
        (DiagonalAverage(target, z[:, :dim], w / w.sum()), 2 * dim),
        (LowRankAverage(target, rank, z[:, :rank], z[:, rank:], w / w.sum()), (2 + rank) * dim),
    ):
        theta = torch.randn(3, size, generator=generator, dtype=D) / 2
        _, gradient = average(theta)
        for step in torch.randn(5, 3, size, generator=generator, dtype=D):
            (ahead, _), (behind, _) = average(theta + 1e-5 * step), average(theta - 1e-5 * step)
            torch.testing.assert_close((ahead - behind) / 2e-5, (gradient * step).sum(-1), rtol=1e-6, atol=1e-8)


def test_trust_region_finds_the_valley_from_every_start_and_leaves_saddles():
    def rosenbrock(theta):
        with torch.enable_grad():
            point = theta.detach().requires_grad_(True)
            value = (1 - point[:, 0]) ** 2 + 100 * (point[:, 1] - point[:, 0] ** 2) ** 2
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    starts = torch.tensor([[-1.2, 1.0], [2.0, -1.0], [0.0, 0.0], [1.0, 1.0]], dtype=D)
    end = minimize(rosenbrock, torch.ones_like, starts, 1e-9)
    torch.testing.assert_close(end.theta, torch.ones_like(starts), rtol=0, atol=1e-7)
    assert bool((end.residual <= 1e-9).all())

    def saddle(theta):
        x, y = theta.unbind(-1)
        return x**2 + (y**2 - 1) ** 2, torch.stack([2 * x, 4 * y * (y**2 - 1)], -1)

    end = minimize(saddle, torch.ones_like, torch.tensor([[0.5, 1e-3]], dtype=D), 1e-9)
    torch.testing.assert_close(end.theta, torch.tensor([[0.0, 1.0]], dtype=D), rtol=0, atol=1e-7)


# ---- mean field


@pytest.mark.parametrize("dim", [1, 2, 7, 40])
def test_mean_field_is_exact_on_a_gaussian(dim):
    truth = correlated(dim)
    solution = MeanField().solve(wk.Target(log_prob=truth.log_prob, dim=dim), DIAGONAL, seed=0)
    assert len(solution.optima) == 1
    assert solution.best.converged
    torch.testing.assert_close(solution.best.model.mean, truth.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(solution.best.model.variance, 1 / truth.precision_matrix.diagonal(), rtol=1e-6, atol=0)
    one = MultivariateNormal(solution.best.model.mean, torch.diag(solution.best.model.variance))
    assert solution.best.loss == pytest.approx(float(kl_divergence(one, truth)), abs=1e-8)


def test_a_thousand_correlated_columns_have_the_known_optimum():
    target, diagonal = chain(1000)
    fit = wk.fit(target, DIAGONAL)
    assert fit.solver == "mean_field"
    assert fit.status == "converged"
    torch.testing.assert_close(fit.model.mean, torch.ones(1000, dtype=D), rtol=0, atol=1e-3)
    torch.testing.assert_close(fit.model.variance, 1 / diagonal, rtol=1e-5, atol=0)
    truth = float(diagonal.log().sum()) / 2 - 500 * math.log(2 * math.pi)  # KL − log Z; KL = ½ (log|diag Λ| − log|Λ|)
    assert fit.diagnostics.optima[0].loss == pytest.approx(truth, abs=1e-4)
    assert abs(fit.value.value - truth) < 5 * fit.value.stderr
    assert target.evaluations["score"] < 20_000
    assert "family_too_small" in fit.findings
    assert "low_rank" in " ".join(fit.explanations)


def test_ten_thousand_columns_are_fitted_saved_and_loaded_without_a_square_matrix(tmp_path):
    target, diagonal = chain(10_000)
    seen = []
    free = target.density.function
    target.density.function = lambda x: seen.append(x.numel()) or free(x)
    fit = wk.fit(target, DIAGONAL)
    assert fit.status == "converged"
    torch.testing.assert_close(fit.model.variance, 1 / diagonal, rtol=1e-4, atol=0)
    assert max(seen) <= 1 << 23
    fit.save(tmp_path / "fit")
    assert sum(one.stat().st_size for one in (tmp_path / "fit").iterdir()) < 1_000_000
    again = wk.Fit.load(tmp_path / "fit")
    assert torch.equal(again.model.mean, fit.model.mean)
    assert torch.equal(again.model.stddev, fit.model.stddev)


def test_two_modes_in_many_dimensions_are_two_optima():
    target = wk.Target(log_prob=lambda x: torch.logaddexp(-(x - 3).square().sum(-1) / 2, -(x + 3).square().sum(-1) / 2), dim=300)
    solution = MeanField().solve(target, DIAGONAL, seed=0)
    assert sorted(round(float(one.model.mean[0]), 4) for one in solution.optima) == [-3.0, 3.0]
    assert all(one.is_global for one in solution.optima)
    fit = wk.fit(target, DIAGONAL)
    assert fit.diagnostics.separate == 2
    assert {"other_modes_exist", "weights_unreliable"} <= fit.findings


def test_kinks_are_met():
    target = wk.Target(log_prob=lambda x: -(x - 1).abs().sum(-1) - (x[:, 1:] - x[:, :-1]).abs().sum(-1) / 3, dim=30)
    fit = wk.fit(target, DIAGONAL)
    assert fit.status == "converged"
    assert fit.diagnostics.understated is None
    with pytest.raises(TargetError, match="kinks"):
        fit.linear_response()
    torch.testing.assert_close(fit.model.mean, torch.ones(30, dtype=D), rtol=0, atol=0.02)


def test_a_density_that_does_not_fall_off_is_refused():
    with pytest.raises(TargetError, match="spreads without bound along x2|constant|doesn't fall off"):
        wk.fit(wk.Target(log_prob=lambda x: -x[:, 0].square(), dim=2), DIAGONAL)
    with pytest.raises(TargetError, match="-inf at all 4 start points"):
        wk.fit(wk.Target(log_prob=lambda x: torch.full_like(x[:, 0], -math.inf), dim=300), DIAGONAL)


def test_older_files_of_diagonal_gaussians_are_read():
    old = DIAGONAL.model({"loc": torch.zeros(2, dtype=D), "scale_tril": torch.diag(torch.tensor([1.0, 2.0], dtype=D))})
    assert old.stddev.tolist() == [1, 2]


# ---- low rank


@pytest.mark.parametrize(("dim", "rank"), [(3, 1), (5, 2), (40, 3)])
def test_low_rank_is_exact_on_a_target_of_its_rank(dim, rank):
    generator = torch.Generator().manual_seed(dim)
    parts = torch.randn(dim, generator=generator, dtype=D), torch.randn(dim, rank, generator=generator, dtype=D)
    truth = LowRankMultivariateNormal(*parts, torch.rand(dim, generator=generator, dtype=D) + 0.5)
    fit = wk.fit(wk.Target(log_prob=truth.log_prob, dim=dim, normalized=True), Gaussian("low_rank", rank=rank))
    assert fit.solver == "low_rank"
    assert fit.status == "converged"
    torch.testing.assert_close(fit.model.covariance_matrix, truth.covariance_matrix, rtol=1e-4, atol=1e-4)
    assert abs(fit.value.value) < 1e-4
    assert not fit.findings


def test_low_rank_lies_between_mean_field_and_the_whole_covariance():
    target = wk.Target(log_prob=correlated(12).log_prob, dim=12, normalized=True)
    families = (DIAGONAL, Gaussian("low_rank", rank=1), Gaussian("low_rank", rank=4), Gaussian())
    losses = [wk.fit(target, one).diagnostics.optima[0].loss for one in families]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-6)


def test_low_rank_scales_to_many_columns():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(500, generator=generator, dtype=D), torch.randn(500, 3, generator=generator, dtype=D)
    truth = LowRankMultivariateNormal(*parts, torch.ones(500, dtype=D))
    found = LowRank().solve(wk.Target(log_prob=truth.log_prob, dim=500), Gaussian("low_rank", rank=3), seed=0).best
    assert found.converged
    assert float(kl_divergence(found.model, truth)) < 0.05


def test_a_rank_without_room_is_refused():
    with pytest.raises(InputError, match="rank must be smaller"):
        wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2), Gaussian("low_rank", rank=2))


# ---- linear response


@pytest.mark.parametrize("dim", [2, 7, 40])
def test_linear_response_is_the_covariance_of_a_gaussian(dim):
    truth = correlated(dim)
    fit = wk.fit(wk.Target(log_prob=truth.log_prob, dim=dim), DIAGONAL)
    torch.testing.assert_close(fit.linear_response(), truth.covariance_matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(fit.linear_response([dim - 1, "x1"]), truth.covariance_matrix[[dim - 1, 0]], rtol=0, atol=1e-6)
    assert fit.diagnostics.understated == pytest.approx(float((truth.variance / fit.model.variance).sqrt().max()), rel=1e-6)
    assert "variances_understated" in fit.findings
    assert "times as wide" in str(fit)


def test_linear_response_of_a_thousand_columns_goes_by_columns():
    target, _ = chain(1000)
    rows = wk.fit(target, DIAGONAL).linear_response([500])
    truth = 0.9 ** (torch.arange(1000, dtype=D) - 500).abs() / (1 - 0.81)
    torch.testing.assert_close(rows[0], truth, rtol=0, atol=1e-5)


def test_linear_response_repairs_a_posterior_that_is_not_gaussian():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 4, generator=generator, dtype=D) @ torch.tensor(
        [[1, 0.9, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 1]]
    ).to(D)
    y = (x.sum(-1) + torch.randn(300, generator=generator, dtype=D) > 0).to(D)

    def log_prob(b):
        return (y * (b @ x.T) - torch.nn.functional.softplus(b @ x.T)).sum(-1) - b.square().sum(-1) / 8

    target = wk.Target(log_prob=log_prob, dim=4)
    mean_field, full = wk.fit(target, DIAGONAL), wk.fit(target)
    truth = full.model.covariance_matrix.diagonal().sqrt()
    repaired = mean_field.linear_response().diagonal().sqrt()
    assert float((mean_field.model.stddev / truth).min()) < 0.7
    assert float((repaired / truth - 1).abs().max()) < 0.05


def test_linear_response_finds_the_width_of_a_funnel():
    """N(0, 3) for x₁, N(0, exp(x₁ / 2)) for the others: mean field takes a slice of it."""
    target = wk.Target(
        log_prob=lambda x: -((x[:, 0] / 3) ** 2) / 2 - x[:, 1:].square().sum(-1) * (-x[:, 0]).exp() / 2 - 4.5 * x[:, 0], dim=10
    )
    fit = wk.fit(target, DIAGONAL)
    assert float(fit.model.stddev[0]) < 0.6
    assert float(fit.linear_response(["x1"])[0, 0].sqrt()) == pytest.approx(3, rel=0.02)


def test_independent_columns_are_not_said_to_be_understated():
    fit = wk.fit(wk.Target(log_prob=lambda x: -(x - 2).square().sum(-1), dim=3), DIAGONAL)
    assert fit.diagnostics.understated == pytest.approx(1, abs=1e-6)
    assert "variances_understated" not in fit.findings


def test_linear_response_is_refused_where_it_means_nothing(tmp_path):
    fit = wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=3), DIAGONAL)
    with pytest.raises(InputError, match="no column 'y'"):
        fit.linear_response(["y"])
    with pytest.raises(InputError, match="no column is named"):
        fit.linear_response([])
    with pytest.raises(InputError, match=r"minimised reverse_kl over Gaussian\(\)"):
        wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=3)).linear_response()
    with pytest.raises(InputError, match="minimised forward_kl"):
        wk.fit(torch.randn(50, 2), DIAGONAL).linear_response()
    with pytest.raises(InputError, match="600 × 600"):
        wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=600), DIAGONAL).linear_response()
    fit.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    assert again.diagnostics.understated == fit.diagnostics.understated
    with pytest.raises(TargetError, match="a loaded fit has no log density"):
        again.linear_response()
    torch.testing.assert_close(again.linear_response(["x2"], target=fit.target), fit.linear_response([1]))
    with pytest.raises(InputError, match="3 free coordinates|the fit 3"):
        again.linear_response(target=wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2))


def test_linear_response_on_positive_numbers_is_in_free_coordinates():
    log_normal = torch.distributions.TransformedDistribution(correlated(2), torch.distributions.ExpTransform())
    target = wk.Target(log_prob=log_normal.log_prob, dim=2, support="positive")
    fit = wk.fit(target, DIAGONAL)
    torch.testing.assert_close(fit.linear_response(), correlated(2).covariance_matrix, rtol=0, atol=1e-5)
    assert "free coordinates" in str(fit)
