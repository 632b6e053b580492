"""Dead densities: a log density that stops to answer is given up after a few calls, and no fit that was done is lost."""

import functools
import math

import pytest
import torch

import whichkl as wk
from programs import whichkl
from whichkl._checks import DeadDensityError, TargetError


def out_of_memory(x):
    raise MemoryError


ENDINGS = {
    "raises": lambda x: 1 / 0,
    "runs out of memory": out_of_memory,
    "is NaN": lambda x: x[:, 0] * math.nan,
    "is -inf": lambda x: x[:, 0] * 0 - math.inf,
    "returns nothing": lambda x: None,
    "has another shape": lambda x: x,
}
SUPPORTS = {"real": (lambda x: -x.square().sum(-1) / 2, None), "positive": (lambda x: -x.sum(-1), "positive")}


LOSSES = {"real": -math.log(2 * math.pi), "positive": 0.1694}
"""−log Z, as the normal law is the target; and least KL(q‖p) of two log-normal laws from exponential ones."""


class Dying:
    """A log density that answers this many calls."""

    def __init__(self, log_prob, calls, ending):
        self.log_prob, self.most, self.ending, self.calls = log_prob, calls, ending, 0

    def __call__(self, x):
        self.calls += 1
        return self.log_prob(x) if self.calls <= self.most else self.ending(x)


@functools.cache
def calls_of(log_prob, family, support, *, judge=True):
    live = Dying(log_prob, math.inf, None)
    wk.fit(wk.Target(log_prob=live, dim=2, support=support), family, judge=judge)
    return live.calls


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("family", "support"), [("gaussian", "real"), ("gaussian", "positive"), ("gaussian:diagonal", "real"), ("mixture:2", "real")]
)
def test_it_is_given_up_after_a_few_calls_whenever_it_dies(family, ending, support):
    log_prob, where = SUPPORTS[support]
    whole = calls_of(log_prob, family, where)
    early, late = (Dying(log_prob, max(6, int(share * whole)), ENDINGS[ending]) for share in (0.3, 0.95))
    with pytest.raises(TargetError) as error:  # the solver was at work
        wk.fit(wk.Target(log_prob=early, dim=2, support=where), family)
    assert error.value.exit_code == 3
    fit = wk.fit(wk.Target(log_prob=late, dim=2, support=where), family)  # the diagnostics were
    assert {"not_measured", "not_a_number_met"} <= fit.findings
    assert any("wasn't measured" in note and "DeadDensityError" in note for note in fit.diagnostics.notes)
    assert fit.value.reliable and fit.value.value == pytest.approx(LOSSES[support], abs=0.01)
    for density in (early, late):
        assert density.most < density.calls <= density.most + 40


def test_a_fit_that_was_done_is_kept_and_its_value_is_that_of_the_solver():
    whole = calls_of(SUPPORTS["real"][0], "gaussian", None)
    values = {}
    for calls in range(8, whole):
        density = Dying(SUPPORTS["real"][0], calls, ENDINGS["raises"])
        try:
            fit = wk.fit(wk.Target(log_prob=density, dim=2), "gaussian")
        except DeadDensityError as error:
            assert "ZeroDivisionError: division by zero" in str(error)
            continue
        assert fit.status == "converged" and fit.model.mean.abs().max() < 1e-6
        values[fit.value.method] = fit.value
    unmeasured = values["loss of the solver"]
    assert not unmeasured.reliable and unmeasured.up_to == "log_z"
    assert unmeasured.value == pytest.approx(-math.log(2 * math.pi), abs=1e-6)
    assert any(one.reliable for one in values.values())


def test_a_failed_search_for_modes_is_no_clean_bill(tmp_path):
    whole = calls_of(SUPPORTS["real"][0], "gaussian", None)
    fit = wk.fit(wk.Target(log_prob=Dying(SUPPORTS["real"][0], whole - 3, ENDINGS["is NaN"]), dim=2))
    assert fit.diagnostics.missing_modes is None
    assert any(note.startswith("the mass at missing modes wasn't measured") for note in fit.diagnostics.notes)
    assert "not_measured: A diagnostic failed" in str(fit)
    fit.save(tmp_path / "fit")
    assert str(wk.Fit.load(tmp_path / "fit")) == str(fit)


@pytest.mark.parametrize("ending", ENDINGS)
def test_draws_are_not_said_to_contradict_a_density_that_is_dead(ending):
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_prob = SUPPORTS["real"][0]
    live = Dying(log_prob, math.inf, None)
    wk.fit(wk.Target(samples=x, log_prob=live), objective="forward_kl")
    for calls in range(4, live.calls):
        dying = Dying(log_prob, calls, ENDINGS[ending])
        fit = wk.fit(wk.Target(samples=x, log_prob=dying), objective="forward_kl")
        assert {"not_measured", "not_a_number_met"} <= fit.findings
        assert "accesses_disagree" not in fit.findings
        assert dying.calls <= calls + 20
        assert fit.value.up_to in ("entropy_p", "log_z", None)


def test_the_command_ends_with_exit_code_3(tmp_path):
    text = "calls = [0]\ndef f(x):\n    calls[0] += 1\n    if calls[0] > 12: raise RuntimeError('connection lost')\n"
    (tmp_path / "m.py").write_text(text + "    return -x.square().sum(-1) / 2\n")
    done = whichkl("fit", "--log-prob", "m.py:f", "--dim", "2", cwd=tmp_path)
    assert done.returncode == 3
    assert "gives no number any more" in done.stderr and "connection lost" in done.stderr


def test_a_server_that_fails_once_is_asked_again():
    whole = calls_of(SUPPORTS["real"][0], "gaussian", None)
    for failing in range(8, whole, 3):
        calls = [0]

        def log_prob(x, calls=calls, failing=failing):
            calls[0] += 1
            return SUPPORTS["real"][0](x) if calls[0] != failing else 1 / 0

        try:
            fit = wk.fit(wk.Target(log_prob=log_prob, dim=2))
        except TargetError as error:
            assert not isinstance(error, DeadDensityError)  # where every number counts, one failure is an error
        else:
            assert fit.status == "converged"


def test_rows_and_batches_that_fail_alone_are_still_sorted_out():
    def rows(x):
        if bool((x.abs() > 6).any()):
            raise ValueError("the factorisation failed")  # for one row of the batch
        return SUPPORTS["real"][0](x)

    def batches(x):
        if len(x) > 64:
            raise MemoryError
        return SUPPORTS["real"][0](x)

    for log_prob in (rows, batches):
        target = wk.Target(log_prob=log_prob, dim=2)
        target.value_and_score(torch.zeros(1, 2, dtype=torch.float64))
        x = torch.linspace(-8, 8, 200, dtype=torch.float64)[:, None].expand(-1, 2)
        value, score = target.trial(x)
        known = x[:, 0].abs() <= 6 if log_prob is rows else torch.ones(200, dtype=torch.bool)
        torch.testing.assert_close(value[known], -x[known].square().sum(-1) / 2)
        torch.testing.assert_close(score[known], -x[known])
        assert bool((value[~known] == -math.inf).all())
        assert target.evaluations["rejected"] == int((~known).sum())


def test_a_live_density_is_not_called_more_often():
    """Far away it gives no number, row after row; it's tried where it gave one a few times only."""
    calls = [0]

    def log_prob(x):
        calls[0] += 1
        return torch.where(x.abs().amax(-1) > 7, math.nan, SUPPORTS["real"][0](x))

    density = wk.Target(log_prob=log_prob, dim=2).density
    density.value_and_score(torch.zeros(1, 2, dtype=torch.float64))
    before = calls[0]
    for _ in range(1_000):
        assert density.trial(torch.full((1, 2), 9.0, dtype=torch.float64))[2] == 1
    assert calls[0] - before < 1_000 * 1.01 + 10


def test_a_discrete_target_that_dies_says_so():
    live = Dying(lambda x: x.sum(-1), math.inf, None)
    wk.fit(wk.Target(log_prob=live, dim=12, support="boolean"), "product:bernoulli", objective="reverse_kl")
    for calls in range(2, live.calls):
        dying = Dying(lambda x: x.sum(-1), calls, ENDINGS["raises"])
        try:
            fit = wk.fit(wk.Target(log_prob=dying, dim=12, support="boolean"), "product:bernoulli", objective="reverse_kl")
        except TargetError:
            continue
        assert {"not_measured", "not_a_number_met"} <= fit.findings
