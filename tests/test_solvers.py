"""The registry of solvers, and the checks of their fields."""

from dataclasses import dataclass

import pytest
import torch

import whichkl as wk
from whichkl._checks import InputError
from whichkl.families import Gaussian
from whichkl.families.gaussian import gaussian
from whichkl.solvers import (
    SOLVERS,
    CoordinateAscent,
    Enumeration,
    NaturalGradient,
    Optimum,
    ScoreFunction,
    Solution,
    Solver,
    StickingTheLanding,
    Stochastic,
    StochasticTwoSided,
    register,
    unregister,
)

TARGET = wk.Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=2)


@dataclass(frozen=True)
class Standard(Solver):
    """N(0, I), whatever the target."""

    name = "standard"
    direction = "reverse"
    families = (Gaussian,)

    def solve(self, target, family, seed, work=None, stride=0):
        eye = torch.eye(target.dim, dtype=torch.float64)
        return Solution((Optimum(gaussian(eye[0] * 0, eye, "full"), 0.0, converged=True, is_global=True),), 1, 0.0)


@pytest.fixture
def standard():
    yield register(Standard)
    unregister(Standard)


def test_a_registered_solver_is_fitted_by_name_and_as_an_object(standard):
    assert SOLVERS[-1] is standard
    for wanted in ("standard", Standard()):
        fit = wk.fit(TARGET, Gaussian(), solver=wanted, judge=False)
        assert fit.solver == "standard"
        assert torch.equal(fit.model.mean, torch.zeros(2, dtype=torch.float64))
    assert wk.fit(TARGET, Gaussian(), judge=False).solver == "natural_gradient"


def test_a_solver_can_be_preferred_to_another():
    register(Standard, before=NaturalGradient)
    try:
        assert SOLVERS.index(Standard) == SOLVERS.index(NaturalGradient) - 1
        assert wk.fit(TARGET, Gaussian(), judge=False).solver == "standard"
        assert wk.advise(TARGET, Gaussian()).best.solver == "standard"
    finally:
        unregister(Standard)


def test_names_are_registered_once(standard):
    with pytest.raises(InputError, match="a solver named `standard` is registered already"):
        register(Standard)
    with pytest.raises(InputError, match="`Solver` isn't registered"):
        register(type("Other", (Standard,), {"name": "other"}), before=Solver)
    with pytest.raises(InputError, match="isn't registered"):
        unregister(type("Other", (Standard,), {"name": "other"}))


@pytest.mark.parametrize(
    "kind", [CoordinateAscent, StickingTheLanding, ScoreFunction, Stochastic, StochasticTwoSided, Enumeration]
)
def test_fields_out_of_range_are_refused(kind):
    count = "sweeps" if kind in (CoordinateAscent, Enumeration) else "steps"
    positive = "tolerance" if hasattr(kind, "tolerance") else "clip"
    for wrong in (0, 2.5, True):
        with pytest.raises(InputError, match=f"use `{kind.__name__}`: `{count}={wrong!r}` isn't a whole number of at least 1"):
            kind(**{count: wrong})
    with pytest.raises(InputError, match=f"`{positive}=-1` isn't a positive number"):
        kind(**{positive: -1})
