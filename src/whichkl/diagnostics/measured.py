"""Measured: diagnostics are made one by one, so that one that fails costs its own number and not the fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from whichkl._checks import DeadDensityError, NotANumberError

Found = TypeVar("Found")
Otherwise = TypeVar("Otherwise")
_LONGEST = 200
"""Characters of an error that a note repeats."""


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
        """Whether a failure came of a log density that gave no number."""

    def __call__(self, what: str, measure: Callable[[], Found], otherwise: Otherwise) -> Found | Otherwise:
        """Return what `measure` returns; where it raises, note that and return `otherwise`."""
        try:
            return measure()
        except Exception as error:  # whatever the user's density, a decomposition or memory raises: the fit is there
            self.met_no_number |= isinstance(error, (DeadDensityError, NotANumberError))
            self.notes.append(f"{what} wasn't measured ({_short(error)})")
            return otherwise


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
