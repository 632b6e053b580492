"""Solvers: one algorithm a file; each declares which objective and families it solves."""

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family
from whichkl.objectives import Objective
from whichkl.solvers.draws.sticking_the_landing import StickingTheLanding
from whichkl.solvers.draws.stochastic import Stochastic
from whichkl.solvers.draws.stochastic_two_sided import StochasticTwoSided
from whichkl.solvers.nodes.low_rank import LowRank
from whichkl.solvers.nodes.mean_field import MeanField
from whichkl.solvers.nodes.natural_gradient import NaturalGradient
from whichkl.solvers.nodes.sample_average import SampleAverage
from whichkl.solvers.nodes.two_sided import TwoSided
from whichkl.solvers.rows.closed_form import ClosedForm
from whichkl.solvers.rows.em import ExpectationMaximization
from whichkl.solvers.rows.newton import Newton
from whichkl.solvers.solver import Optimum, Solution, Solver
from whichkl.solvers.states.coordinate_ascent import CoordinateAscent
from whichkl.solvers.states.enumeration import Enumeration
from whichkl.solvers.states.score_function import ScoreFunction

SOLVERS: tuple[type[Solver], ...] = (
    ClosedForm,
    Newton,
    ExpectationMaximization,
    MeanField,
    LowRank,
    NaturalGradient,
    SampleAverage,
    StickingTheLanding,
    Enumeration,
    CoordinateAscent,
    ScoreFunction,
    Stochastic,
    TwoSided,
    StochasticTwoSided,
)

__all__ = [
    "SOLVERS",
    "ClosedForm",
    "CoordinateAscent",
    "Enumeration",
    "ExpectationMaximization",
    "LowRank",
    "MeanField",
    "NaturalGradient",
    "Newton",
    "Optimum",
    "SampleAverage",
    "ScoreFunction",
    "Solution",
    "Solver",
    "StickingTheLanding",
    "Stochastic",
    "StochasticTwoSided",
    "TwoSided",
    "families_of",
    "solver_for",
]


def solver_for(objective: Objective, family: Family, access: Access, wanted: Solver | str | None = None) -> Solver:
    """Return the first solver that does the job, or the one that is wanted if it can.

    Raises:
        TargetError: no solver does, or the wanted one doesn't.
    """
    able = [kind for kind in SOLVERS if kind.solves(objective, family, access)]
    if isinstance(wanted, Solver):
        able, label = [kind for kind in able if isinstance(wanted, kind)], wanted.name
        if able:
            return wanted.toward(objective)
    elif wanted is not None:
        able, label = [kind for kind in able if kind.name == wanted], wanted
    else:
        label = "any solver"
    if able:
        return able[0]().toward(objective)
    others = [kind.name for kind in SOLVERS if kind.solves(objective, family, access)]
    instead = f"Use solver={others[0]!r}" if others else f"Use another family{_families(objective)} or objective"
    because = f"it doesn't minimise `{objective.name}` over `{family}` with access to {access.label}"
    raise TargetError(cannot(f"use {label} here", because, instead))


def families_of(objective: Objective) -> tuple[str, ...]:
    """Return the names of the families over which some solver minimises an objective, with some of their options at least."""
    kinds = [kind for kind in SOLVERS if objective.direction == kind.direction]
    return tuple(dict.fromkeys(family.__name__ for kind in kinds for family in kind.families))


def _families(objective: Objective) -> str:
    """Which those are, in brackets, for a divergence between the directions; of others they are too many to name."""
    return f" ({', '.join(families_of(objective))})" if objective.is_between else ""
