"""Diagnostics: one that fails costs its own number and never the fit; a fit whose search finds most of the mass goes there."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import whichkl as wk
from whichkl._checks import TargetError
from whichkl.diagnostics import FINDINGS, MissingModes
from whichkl.plots import plot

D = torch.float64
JUDGE, HELD_OUT = "whichkl.diagnostics.judge", "whichkl.diagnostics.held_out"
ROWS = torch.tensor(np.random.default_rng(0).normal(size=(120, 2)) + 5)
MANY = torch.tensor(np.random.default_rng(0).normal(size=(10_500, 2)) + 5)


def bell(x):
    return -x.square().sum(-1) / 2


def draw(n, generator):
    return torch.randn(n, 2, generator=generator, dtype=D)


FITS = {
    "rows": lambda: wk.fit(ROWS),
    "many rows": lambda: wk.fit(MANY),
    "density": lambda: wk.fit(wk.Target(log_prob=bell, dim=2)),
    "mean field": lambda: wk.fit(wk.Target(log_prob=bell, dim=2), "gaussian:diagonal"),
    "sampler": lambda: wk.fit(wk.Target(sampler=draw, dim=2)),
    "sampler and density": lambda: wk.fit(wk.Target(sampler=draw, log_prob=bell, dim=2)),
    "rows and density": lambda: wk.fit(wk.Target(samples=ROWS - 5, log_prob=bell), solver="closed_form"),
    "between": lambda: wk.fit(wk.Target(samples=ROWS - 5, log_prob=bell), objective="jeffreys"),
    "line": lambda: wk.fit(Normal(torch.tensor(0.0, dtype=D), 1.0)),
    "pairs": lambda: wk.fit(wk.Target(samples=(ROWS[:60], ROWS[60:, 0])), wk.families.LinearGaussian()),
    "states": lambda: wk.fit(wk.Target(log_prob=lambda x: x.sum(-1), dim=3, support="boolean"), "product:bernoulli"),
}
DENSITIES, SAMPLED = ("density", "mean field", "states"), ("rows", "many rows", "rows and density", "pairs")
WEIGHTED = (*DENSITIES, "sampler and density", "rows and density", "between", "line")
VALUED = (*SAMPLED, "sampler", "sampler and density", "line")
PARTS = {
    JUDGE: {
        "beyond_the_ends": VALUED,
        "by_weights": WEIGHTED,
        "forward_value": VALUED,
        "unseen": (*SAMPLED, "between"),
        "two_sample_test": (*SAMPLED, "between"),
        "transform_calibration": (*SAMPLED, "between"),
        "between_value": ("between",),
        "missing_modes": DENSITIES,
        "reverse_value": DENSITIES,
        "spread_ratios": ("mean field",),
        "jumps": ("density", "mean field"),
        "accesses_disagree": tuple(FITS),
        "model_target": WEIGHTED,
    },
    HELD_OUT: {
        "rows_are_correlated": VALUED,
        "cross_fitted_losses": ("rows", "rows and density", "pairs"),
        "next_richer": (*SAMPLED, "sampler"),
        "log_likelihood": ("many rows", "sampler"),
        "monte_carlo": (*SAMPLED, "sampler", "sampler and density"),
        "quadrature": ("line",),
        "_training_sample": ("many rows",),
    },
}
"""Parts of the diagnostics by module, each with the fits that use it."""
CASES = [(where, part, name) for where, parts in PARTS.items() for part, fits in parts.items() for name in fits]
ERRORS = [
    ValueError("math domain error"),
    torch.linalg.LinAlgError("the matrix is singular"),
    RuntimeError("out of memory"),
    TargetError("Cannot evaluate `log_prob`: the server is gone."),
    MemoryError(),
    OverflowError("math range error"),
]


class Failing:
    """In place of a function or a module: every use of it raises."""

    def __init__(self, error):
        self.error, self.uses = error, 0

    def __call__(self, *args, **kwargs):
        self.uses += 1
        raise self.error

    def __getattr__(self, name):
        return self


@pytest.mark.parametrize(("where", "part", "name"), CASES)
def test_whatever_fails_the_fit_is_returned(where, part, name, monkeypatch):
    failing = Failing(ERRORS[(len(part) + len(name)) % len(ERRORS)])
    monkeypatch.setattr(sys.modules[where], part, failing)
    fit = FITS[name]()
    assert failing.uses and fit.status == "converged"
    assert "not_measured" in fit.findings and "not_measured" in str(fit)
    assert any("wasn't measured" in note for note in fit.diagnostics.notes)
    assert fit.value.reliable or fit.value.notes


@pytest.mark.parametrize("name", ["rows", "many rows", "pairs"])
def test_the_mean_over_the_fitted_rows_takes_the_place_of_a_value_that_fails(name, monkeypatch):
    monkeypatch.setattr(sys.modules[JUDGE], "forward_value", Failing(ValueError("math domain error")))
    value, usual = FITS[name]().value, wk.fit(FITS[name]().target, FITS[name]().family, judge=False).value
    assert "in-sample" in value.method and not value.reliable
    assert value.value == pytest.approx(usual.value, abs=1e-12)


@pytest.mark.parametrize("name", ["rows", "many rows", "density", "between", "sampler"])
def test_where_nothing_could_be_measured_the_fit_is_saved_reported_and_drawn(name, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        for where, parts in {**PARTS, JUDGE: [*PARTS[JUDGE], "in_sample"]}.items():
            for part in parts:
                patched.setattr(sys.modules[where], part, Failing(ValueError("math domain error")))
        fit = FITS[name]()
    assert "not_measured" in fit.findings and not fit.value.reliable
    assert "loss of the solver" in fit.value.method
    fit.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    assert str(again) == str(fit) and again.to_dict() == fit.to_dict()
    assert "not measured" in wk.report(fit, tmp_path / "report.html").read_text()
    plot(fit)
    json.dumps(fit.to_dict())


def test_an_error_of_the_keyboard_is_no_diagnostic(monkeypatch):
    monkeypatch.setattr(sys.modules[JUDGE], "two_sample_test", Failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        wk.fit(ROWS)


def test_a_density_that_is_not_normalised_though_said_so_is_still_refused():
    with pytest.raises(TargetError, match="its integral isn't one"):
        wk.fit(wk.Target(log_prob=lambda x: bell(x) + 3, dim=2, normalized=True))


class Undrawable(nn.Module):
    """A law whose draws fail, and whose density doesn't: a model of the user's own."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2, dtype=D))

    def forward(self):
        class Law(Independent):
            def sample(self, shape=()):
                raise NotImplementedError("no draws")

        return Law(Normal(self.loc, torch.ones(2, dtype=D)), 1)


def test_a_model_that_can_not_be_drawn_from_is_fitted_all_the_same():
    fit = wk.fit(ROWS, Undrawable())
    assert fit.status == "converged" and 2 < fit.value.value < 4
    assert "no draws" in str(fit.diagnostics)


def test_every_finding_is_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "fitting.md").read_text()
    assert all(f"`{name}`" in text for name in FINDINGS)


# Mass elsewhere


def two(weight, far, dim, sd=1.0, drop=None):
    """A standard normal bump of this weight, and the rest at a distance along the diagonal."""
    center = torch.full((dim,), far / math.sqrt(dim), dtype=D)
    light = math.log(weight) if drop is None else -drop

    def log_prob(x):
        return torch.logaddexp(bell(x) + light, bell((x - center) / sd) + math.log1p(-weight))

    return log_prob, center


@pytest.mark.parametrize(
    ("family", "weights", "places"),
    [
        ("gaussian", [1e-300, 1e-30, 1e-5, 0.01, 0.3], [(1, 20.0), (1, 40.0), (2, 25.0), (5, 30.0)]),
        ("gaussian:diagonal", [1e-30, 1e-5, 0.01], [(1, 20.0), (2, 25.0), (5, 30.0)]),
        ("gaussian:low_rank:1", [1e-30, 0.01], [(2, 25.0), (5, 30.0)]),
        ("mixture:2", [1e-30, 0.01], [(1, 40.0), (2, 25.0)]),
    ],
)
def test_a_fit_far_from_the_mass_starts_again_from_there(family, weights, places):
    for weight, (dim, far) in itertools.product(weights, places):
        _holds_the_far_mode(family, weight, dim, far)


def _holds_the_far_mode(family, weight, dim, far):
    log_prob, center = two(weight, far, dim)
    target = wk.Target(log_prob=log_prob, dim=dim)
    fit = wk.fit(target, family)
    assert float((fit.model.mean - (1 - weight * (family == "mixture:2")) * center).abs().max()) < 1e-3
    best, *others = fit.diagnostics.optima
    assert best.is_global and not any(one.is_global for one in others)
    assert fit.diagnostics.evaluations == dict(target.evaluations)
    assert best.loss == pytest.approx(-dim / 2 * math.log(2 * math.pi), abs=0.4)
    if family != "mixture:2" and weight > 0.02:
        assert "modes_missing" in fit.findings  # the light one is missed now, and it isn't so light
    else:
        assert "modes_missing" not in fit.findings


@pytest.mark.parametrize(("dim", "far", "sd", "drop"), [(6, 9.0, 0.5, 60.0), (4, 12.0, 0.4, 80.0), (3, 50.0, 1.0, 700.0)])
def test_the_missing_mass_may_round_to_one(dim, far, sd, drop):
    log_prob, center = two(1e-300, far, dim, sd, drop)
    fit = wk.fit(wk.Target(log_prob=log_prob, dim=dim))
    assert float((fit.model.mean - center).abs().max()) < 1e-3
    assert [one.is_global for one in fit.diagnostics.optima] == [True, False]
    assert any("solving again from them, the loss fell from" in note for note in fit.diagnostics.notes)


def test_on_a_support_it_starts_again_too():
    def log_prob(x):
        u = x.log()
        return torch.logaddexp(bell(u) + math.log(1e-12), bell(u - 25)) - u.sum(-1)

    fit = wk.fit(wk.Target(log_prob=log_prob, dim=2, support="positive"))
    assert float((fit.diagnostics.optima[0].model.mean - 25).abs().max()) < 1e-3


def test_of_three_modes_the_heaviest_is_kept_and_the_others_are_named():
    def log_prob(x):
        far = [bell(x - at) + math.log(share) for at, share in ((-30.0, 0.5), (30.0, 0.3), (60.0, 0.2))]
        return torch.logsumexp(torch.stack([bell(x) + math.log(1e-20), *far]), 0)

    fit = wk.fit(wk.Target(log_prob=log_prob, dim=1))
    assert float(fit.model.mean) == pytest.approx(-30, abs=1e-3)
    assert "modes_missing" in fit.findings
    assert fit.diagnostics.missing_modes.mass == pytest.approx(0.5, abs=0.02)


def test_a_fit_that_holds_most_of_the_mass_is_made_once():
    target = wk.Target(log_prob=lambda x: torch.logaddexp(bell(x) + math.log(0.6), bell(x - 30) + math.log(0.4)), dim=1)
    fit = wk.fit(target)
    assert "modes_missing" in fit.findings
    assert not any("again" in note for note in fit.diagnostics.notes)


def test_a_restart_that_fails_leaves_the_first_fit(monkeypatch):
    import whichkl.fitting.run as fitting

    solve, calls = fitting.solve, []

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return solve(*args, **kwargs)

    monkeypatch.setattr(fitting, "solve", second_fails)
    fit = wk.fit(wk.Target(log_prob=two(1e-9, 20.0, 1)[0], dim=1))
    assert float(fit.model.mean.abs()) < 1e-3 and "modes_missing" in fit.findings
    assert any("solving again from the missing modes failed" in note for note in fit.diagnostics.notes)


def test_an_infinite_cost_of_missing_modes_is_saved():
    modes = ((1.0, 2.0),)
    found = MissingModes(1.0, 0.0, None, math.inf, 1, modes, (1.0,), ("a", "b"), 0.0, "particles", "far", 10, 2)
    fields = json.loads(json.dumps({**found.to_dict(), "least_kl": "inf"}))
    assert MissingModes.from_dict(fields) == found
    assert "at least inf nats" in str(found)
