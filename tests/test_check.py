"""Judging costs about as much as the fit, says what it left out, and `Fit.check` measures the rest."""

import numpy as np
import pytest
import torch

import whichkl as wk
from whichkl._checks import TargetError


def rows(n, d=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def numbers(fit):
    return {name: value.tolist() for name, value in fit.family.parameters(fit.diagnostics.optima[0].model).items()}


def test_check_measures_a_fit_that_was_not_judged_as_if_it_had_been():
    apart = rows(600) + 6 * (np.arange(600) % 2)[:, None]
    bare = wk.fit(apart, judge=False)
    assert bare.diagnostics.held_out is None and bare.diagnostics.left_out and not bare.findings
    checked, judged = bare.check(), wk.fit(apart).check()
    assert checked.findings == judged.findings == {"family_too_small"}
    assert checked.value.value == judged.value.value and checked.value.method == "10-fold cross-fitting, 600 rows"
    assert checked.diagnostics.left_out == () and numbers(checked) == numbers(bare)


def test_many_rows_are_judged_on_thousands_and_checked_on_all():
    fit = wk.fit(rows(20_000), "mixture:2")
    assert len(fit.diagnostics.left_out) == 2
    (note,) = [one for one in fit.diagnostics.notes if "fit.check()" in one]
    assert "2,000 instead of 4,000 rows for the two-sample test" in note
    checked = fit.check()
    assert checked.diagnostics.left_out == () and not any("fit.check()" in one for one in checked.diagnostics.notes)
    assert checked.diagnostics.two_sample.rows == 2 * fit.diagnostics.two_sample.rows == 2_000
    assert numbers(checked) == numbers(fit) and (checked.findings | fit.findings) <= {"family_too_rich"}


def test_repeated_rows_count_once_in_a_check_too():
    repeated = np.repeat(rows(300), 3, 0)
    fit, bare = wk.fit(repeated), wk.fit(repeated, judge=False)
    assert "300 distinct" in fit.value.method
    assert fit.value.value == fit.check().value.value == bare.check().value.value


def one_at_a_time(x):
    assert x.ndim == 1
    return -(x - 1).square().sum() / 2


def test_a_costly_log_density_is_judged_with_few_evaluations():
    target = wk.Target(log_prob=one_at_a_time, dim=4, batched=False)
    fit = wk.fit(target, judge=False)
    spent = fit.target.evaluations.total
    fit = wk.fit(wk.Target(log_prob=one_at_a_time, dim=4, batched=False))
    assert fit.target.evaluations.total <= 2 * spent + 3_000 + 6_000  # the last is the search's least, 128 particles
    assert fit.diagnostics.elbo.n < 10_000 and "draws of the model for the ELBO" in fit.diagnostics.left_out[0]
    assert fit.check().diagnostics.elbo.n == 10_000


def test_a_loaded_fit_is_checked_against_its_target(tmp_path):
    x = rows(600)
    fit = wk.fit(x, judge=False)
    fit.save(tmp_path / "fit")
    loaded = wk.Fit.load(tmp_path / "fit")
    assert loaded.diagnostics.left_out == fit.diagnostics.left_out
    with pytest.raises(TargetError, match="Pass `target=`"):
        loaded.check()
    assert loaded.check(target=x).value.value == pytest.approx(fit.check().value.value, abs=1e-12)


def test_checking_changes_no_random_state_and_reports_its_steps():
    fit, steps = wk.fit(rows(600), judge=False), []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit.check(tell=lambda step, done: steps.append(step))
    assert torch.equal(before, torch.get_rng_state()) and "judging the fit on unseen rows" in steps


def test_a_law_of_float32_costs_no_more_than_one_of_float64_and_gives_a_model_of_float32():
    fits = []
    for dtype in (torch.float64, torch.float32):
        parts = torch.distributions.Normal(torch.tensor([-3.0, 3.0], dtype=dtype), torch.tensor([1.0, 1.0], dtype=dtype))
        weights = torch.distributions.Categorical(probs=torch.tensor([0.7, 0.3], dtype=dtype))
        fits.append(wk.fit(torch.distributions.MixtureSameFamily(weights, parts)))
    wide, narrow = fits
    assert narrow.target.evaluations.total <= 1.05 * wide.target.evaluations.total
    assert narrow.value.exact and narrow.value.value == pytest.approx(wide.value.value, abs=1e-6)
    assert narrow.model.mean.dtype == torch.float32


@pytest.mark.parametrize("judge", [True, False])
def test_check_counts_equal_rows_as_one_whether_the_fit_was_judged_or_not(judge):
    checked = wk.fit(np.repeat(rows(40), 5, 0), judge=judge).check()
    assert any("of the rows repeat others" in note for note in checked.diagnostics.notes)
    assert "40 distinct" in checked.value.method
