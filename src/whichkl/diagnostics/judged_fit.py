"""Judged fit: what a solver found and the diagnostics read, and the errors of those that failed, so that the fit is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from whichkl._checks import DeadDensityError, NotANumberError
from whichkl.advice import Advice
from whichkl.chains import disagreement
from whichkl.families import Family
from whichkl.objectives import Objective
from whichkl.printable import shorten
from whichkl.samples.point_masses import in_words, point_masses
from whichkl.solvers import Solution, Solver
from whichkl.solvers.resolve import Curve
from whichkl.solvers.work import Work
from whichkl.targets import Target
from whichkl.targets.origin import Origin

Found = TypeVar("Found")
Otherwise = TypeVar("Otherwise")
_CHEAP_NUMBERS = 1 << 28
"""Numbers that torch computes in one to three tenths of a second."""
_UNCOUNTED_EVALUATIONS, _SINGLE_EVALUATIONS = 30_000, 3_000
"""Evaluations of a log density whose work torch doesn't count: of many points at once, and of one point at a time."""
_MAX_ERROR_LENGTH = 200
"""Largest number of characters of an error in a note."""


class Measured:
    """What became of the diagnostics of one fit.

    >>> measured = Measured()
    >>> measured("the ratio", lambda: 1 / 0, otherwise=None), measured("the sum", lambda: 1 + 1, otherwise=None)
    (None, 2)
    >>> measured.notes
    ["the ratio wasn't measured (ZeroDivisionError: division by zero)"]
    """

    def __init__(self) -> None:
        """Begin without a failure."""
        self.notes: list[str] = []
        """What wasn't measured, and why."""
        self.met_no_number = False
        """Whether a failure came from a log density that gave no number."""

    def __call__(self, what: str, measure: Callable[[], Found], otherwise: Otherwise) -> Found | Otherwise:
        """Return what `measure` returns; if it raises, note the error and return `otherwise`."""
        try:
            return measure()
        except Exception as error:  # whatever the user's density, a decomposition or memory raises, the fit is done
            self.met_no_number |= isinstance(error, (DeadDensityError, NotANumberError))
            self.notes.append(f"{what} wasn't measured ({_in_short(error)})")
            return otherwise


@dataclass(frozen=True)
class JudgedFit:
    """What a solver found for a target, how, and what the diagnostics of it share."""

    target: Target
    family: Family
    objective: Objective
    solver: Solver
    solution: Solution
    model: Any
    """The best model, in the coordinates of the target."""
    seed: int
    work: Work
    advice: Advice
    notes: tuple[str, ...] = ()
    """How the fit was found."""
    curve: Curve | None = None
    """The losses by which the number of components was chosen, if it was."""
    spent: int = 0
    """Evaluations of the target by the solver."""
    thorough: bool = False
    """Whether everything is measured, whatever it costs."""
    measured: Measured = field(default_factory=Measured)
    left_out: list[str] = field(default_factory=list)
    """What was measured with less than there is, so that judging costs no more than the fit."""

    @property
    def doubted_origin(self) -> Origin | None:
        """What the target was converted from, if it can't carry a conclusion about this model."""
        origin = self.target.origin
        if not isinstance(origin, Origin) or origin.reliable or (origin.is_corrected and self.solution.corrects_weights):
            return None
        return origin

    @cached_property
    def chains_apart(self) -> str:
        """Which chain of p's draws disagrees with the others, in words; empty if none does."""
        p = self.target
        return "" if p.samples is None or p.chains is None else disagreement(p.samples, p.chains, p.names)

    @cached_property
    def masses(self) -> str:
        """Values with mass in columns of p's rows that the model has a density in, in words; empty if there are none."""
        p, x = self.target, self.target.samples
        if self.objective.direction != "forward" or x is None or p.chains is not None or p.repeats is not None:
            return ""
        try:
            support = getattr(self.model, "support", None) if p.context is None else None
        except NotImplementedError:
            support = None
        columns = getattr(support, "columns", [support] * x.shape[1])
        found = {i: one for i, one in point_masses(x).items() if not getattr(columns[i], "is_discrete", False)}
        return in_words(found, p.names)

    @property
    def affordable(self) -> int:
        """The number of evaluations of the log density that judging may take: as many as the fit took, or about 0.1 seconds."""
        return max(self.spent, _cheap_evaluations(self.target))

    def at_most(self, what: str, wanted: int, affordable: int) -> int:
        """Return `wanted`, or what is affordable if that is less; the latter is noted."""
        if self.thorough or wanted <= affordable:
            return wanted
        self.left_out.append(f"{affordable:,} instead of {wanted:,} {what}")
        return affordable


def _cheap_evaluations(target: Target) -> int:
    """Return the number of evaluations of the log density that take about a tenth of a second.

    It is counted, never timed, so that a fit finds the same on every machine.
    """
    if target.density is None:
        return _UNCOUNTED_EVALUATIONS
    convention = target.density.convention
    if not convention.batched:
        return _SINGLE_EVALUATIONS
    is_counted = convention.style == "autograd" and convention.adapter is None
    return _CHEAP_NUMBERS // max(1, convention.work) if is_counted else _UNCOUNTED_EVALUATIONS


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {shorten(text, _MAX_ERROR_LENGTH)}" if text else type(error).__name__
