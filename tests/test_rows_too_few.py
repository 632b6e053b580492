"""Mixtures that are too rich for their rows aren't called fit for use, and those that aren't keep their value."""

import numpy as np
import pytest
import torch

import whichkl as wk


def banana(n, seed, curvature=0.5, noise=0.1):
    z = np.random.default_rng(seed).normal(size=(n, 2))
    return np.c_[2 * z[:, 0], curvature * (2 * z[:, 0]) ** 2 + noise * z[:, 1]]


def clusters(n, seed, count):
    rng = np.random.default_rng(seed)
    return 8 * np.eye(4)[rng.integers(count, size=n)][:, :2] + rng.normal(size=(n, 2))


def covers(fit, fresh):
    low, high = fit.value.interval
    return low <= -float(fit.model.log_prob(torch.as_tensor(fresh)).mean()) <= high


@pytest.mark.parametrize("curvature, noise", [(0.5, 0.1), (0.5, 0.4), (0.25, 0.3)])
def test_eight_components_on_200_rows_of_a_banana_are_not_called_fit_for_use(curvature, noise):
    fits = [wk.fit(banana(200, seed, curvature, noise), "mixture:8") for seed in range(5)]
    assert all(covers(fit, banana(20_000, 99, curvature, noise)) for fit in fits if fit.value.reliable)
    found = [fit for fit in fits if "rows_too_few" in fit.findings]
    assert len(found) >= 4
    for fit in found:
        assert not fit.value.reliable and fit.diagnostics.rows_too_few in fit.value.notes
        assert "Use the fit" not in fit.trust
        assert "Give more rows, or use fewer components, such as `mixture:auto` chooses." in " ".join(fit.explanations)


def test_a_chosen_number_of_components_is_no_advice_to_choose_it():
    fit = next(fit for seed in range(9) if "rows_too_few" in (fit := wk.fit(banana(100, seed), "mixture:auto")).findings)
    assert "or use fewer components." in " ".join(fit.explanations)


@pytest.mark.parametrize("rows, family", [(300, "mixture:3"), (200, "mixture:auto"), (1_000, "mixture:5")])
def test_separate_clusters_keep_their_value(rows, family):
    fits = [wk.fit(clusters(rows, seed, 3), family) for seed in range(5)]
    assert sum("rows_too_few" in fit.findings for fit in fits) == 0
    assert all(fit.value.reliable for fit in fits)


@pytest.mark.parametrize("rows", [40, 300])
def test_a_single_gaussian_is_never_too_rich_for_its_rows(rows):
    x = np.random.default_rng(0).normal(size=(rows, 5))
    assert all(wk.fit(x, family).diagnostics.rows_too_few is None for family in ("gaussian", "mixture:1", "student_t"))


def test_a_fold_in_another_optimum_is_no_value_of_the_fit_and_no_want_of_rows():
    """Three clusters of 4,000 rows: a fifth of the rows is scored by a model that merged two clusters."""
    centres = torch.randn(3, 5, generator=torch.Generator().manual_seed(10), dtype=torch.float64) * 6 / 2**0.5

    def rows(n, seed):
        which = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed + 1))
        return centres[which] + torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    fit = wk.fit(rows(4_000, 4), "mixture:3")
    assert not fit.findings
    assert covers(fit, rows(100_000, 9)) or not fit.value.reliable


def test_weights_count_as_effective_rows():
    """Half of the rows have hardly any weight: the others are as few as without them."""
    x = banana(400, 1)
    weights = np.r_[np.ones(200), np.full(200, 1e-6)]
    assert "rows_too_few" in wk.fit(wk.Target(samples=x, weights=weights), "mixture:8").findings


def test_a_saved_fit_keeps_the_finding(tmp_path):
    fit = wk.fit(banana(200, 0), "mixture:8")
    fit.save(tmp_path / "fit")
    loaded = wk.Fit.load(tmp_path / "fit")
    assert fit.diagnostics.rows_too_few and loaded.diagnostics.rows_too_few == fit.diagnostics.rows_too_few
    assert loaded.findings == fit.findings
