"""Judged fit: what the diagnostics of one fit read, and the errors of those that failed, so that the fit is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from whichkl._checks import DeadDensityError, NotANumberError
from whichkl.families import Family
from whichkl.objectives import Objective
from whichkl.solvers import Solution, Solver
from whichkl.solvers.work import Work
from whichkl.targets import Target

Found = TypeVar("Found")
Otherwise = TypeVar("Otherwise")
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
    """A fit, and what its diagnostics share."""

    target: Target
    family: Family
    objective: Objective
    solver: Solver
    solution: Solution
    model: Any
    """The best model, in the coordinates of the target."""
    seed: int
    work: Work
    measured: Measured = field(default_factory=Measured)


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= _MAX_ERROR_LENGTH else f"{text[:_MAX_ERROR_LENGTH]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
