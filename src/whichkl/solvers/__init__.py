"""Solvers: one algorithm per file, and the registry from which `fit` chooses the first that can do the job."""

from collections.abc import Sequence

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family
from whichkl.objectives import Objective
from whichkl.solvers.draws.sticking_the_landing import StickingTheLanding
from whichkl.solvers.draws.stochastic import Stochastic
from whichkl.solvers.draws.stochastic_two_sided import StochasticTwoSided
from whichkl.solvers.nodes.mean_field import LowRank, MeanField
from whichkl.solvers.nodes.natural_gradient import NaturalGradient
from whichkl.solvers.nodes.sample_average import SampleAverage
from whichkl.solvers.nodes.two_sided import TwoSided
from whichkl.solvers.particles.population import Population
from whichkl.solvers.rows.block_em import BlockExpectationMaximization
from whichkl.solvers.rows.closed_form import ClosedForm
from whichkl.solvers.rows.em import ExpectationMaximization
from whichkl.solvers.rows.newton import Newton
from whichkl.solvers.solver import Optimum, Solution, Solver
from whichkl.solvers.states.coordinate_ascent import CoordinateAscent
from whichkl.solvers.states.enumeration import Enumeration
from whichkl.solvers.states.score_function import ScoreFunction

_REGISTERED: list[type[Solver]] = [
    ClosedForm,
    Newton,
    ExpectationMaximization,
    BlockExpectationMaximization,
    MeanField,
    LowRank,
    NaturalGradient,
    SampleAverage,
    StickingTheLanding,
    Enumeration,
    CoordinateAscent,
    ScoreFunction,
    Stochastic,
    Population,
    TwoSided,
    StochasticTwoSided,
]
SOLVERS: Sequence[type[Solver]] = _REGISTERED
"""Every solver, in the order of preference; `register` adds to it."""

__all__ = [
    "SOLVERS",
    "BlockExpectationMaximization",
    "ClosedForm",
    "CoordinateAscent",
    "Enumeration",
    "ExpectationMaximization",
    "LowRank",
    "MeanField",
    "NaturalGradient",
    "Newton",
    "Optimum",
    "Population",
    "SampleAverage",
    "ScoreFunction",
    "Solution",
    "Solver",
    "StickingTheLanding",
    "Stochastic",
    "StochasticTwoSided",
    "TwoSided",
    "families_of",
    "register",
    "solver_for",
    "unregister",
]


def register(kind: type[Solver], *, before: type[Solver] | None = None) -> type[Solver]:
    """Make a solver available to `fit` and `solver_for`, which take the first one that can do the job.

    Args:
        kind: the class; it must work without arguments. `register` can decorate it.
        before: the solver over which the new one is preferred; by default the new one comes last.

    Returns:
        The class itself.

    Raises:
        InputError: a solver of this name is registered, or `before` isn't registered.

    >>> class Patient(NaturalGradient):
    ...     name = "patient"
    >>> register(Patient, before=NaturalGradient).name, len(SOLVERS)
    ('patient', 17)
    >>> unregister(Patient)
    """
    if any(kind.name == other.name for other in SOLVERS):
        because = f"a solver named `{kind.name}` is registered already"
        raise InputError(cannot(f"register `{kind.__name__}`", because, "Give it another name"))
    if before is not None and before not in SOLVERS:
        because = f"`{before.__name__}` isn't registered"
        raise InputError(cannot(f"register `{kind.__name__}`", because, "Leave `before` out, or register that solver first"))
    _REGISTERED.insert(len(_REGISTERED) if before is None else _REGISTERED.index(before), kind)
    return kind


def unregister(kind: type[Solver]) -> None:
    """Take a solver out of the registry.

    Raises:
        InputError: it isn't registered.
    """
    if kind not in SOLVERS:
        raise InputError(cannot(f"unregister `{kind.__name__}`", "it isn't registered", "Register it first"))
    _REGISTERED.remove(kind)


def solver_for(objective: Objective, family: Family, access: Access, wanted: Solver | str | None = None) -> Solver:
    """Return the first solver that can do the job, or the wanted one if it can.

    Raises:
        TargetError: no solver can, or the wanted one can't.
    """
    able = [kind for kind in SOLVERS if kind.solves(objective, family, access)]
    if isinstance(wanted, Solver):
        if isinstance(wanted, tuple(able)):
            return wanted.toward(objective)
        label = wanted.name
    else:
        for kind in able:
            if wanted in (None, kind.name):
                return kind().toward(objective)
        label = wanted or "any solver"
    # Divergences between the directions name their families; of the other objectives there are too many.
    others = f" ({', '.join(families_of(objective))})" if objective.is_between else ""
    instead = f"Use solver={able[0].name!r}" if able else f"Use another family{others} or objective"
    because = f"it doesn't minimise `{objective.name}` over `{family}` with access to {access.label}"
    raise TargetError(cannot(f"use {label} here", because, instead))


def families_of(objective: Objective) -> tuple[str, ...]:
    """Return the names of the families over which some solver minimises an objective, at least with some of their options."""
    kinds = [kind for kind in SOLVERS if objective.direction == kind.direction]
    return tuple(dict.fromkeys(family.__name__ for kind in kinds for family in kind.families))
