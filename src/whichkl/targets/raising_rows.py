"""Raising rows: a log density or a score that raises for some rows of a batch is called again for the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from whichkl._checks import DeadDensityError, NotANumberError, TargetError
from whichkl.adapters import library_folders
from whichkl.distributions import is_outside, names_a_range
from whichkl.printable import shorten
from whichkl.targets.liveness import ROWS_BEFORE_CHECK, Liveness
from whichkl.user_code import place_of, said_of

_MAX_ROWS_WITHOUT_ANSWER = 64
"""Rows that may raise before any row gives a number: a function that can't be called at all isn't called for every row."""
_MAX_SAID = 240
"""Largest number of characters of what a function raised."""


class RaisingRows:
    """Calls of a function that may raise for some rows: their values are NaN, or −∞ where a law says that they lie outside.

    Rows are called in groups, the nearest to a point that gave a number first, since functions mostly raise far from the mass. A
    group that raises is halved, and the group after one that doesn't raise is twice as large. While batches have such rows, they
    begin with a small group: n rows then take about 2n evaluations.
    """

    def __init__(self, liveness: Liveness) -> None:
        self.liveness = liveness
        self.said = ""
        """What the function first raised, as the end of a sentence; empty if it never raised."""
        self.has_raised = False
        """Whether a row of the last batch raised."""

    def call(self, function: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...], *, batched: bool) -> Tensor:
        r"""Return the values of a function at rows.

        Args:
            function: (m, d) → (m, \*shape).
            x: (n, d).
            shape: of one row's value.
            batched: whether a group takes a single call of the user's function.

        Raises:
            NotANumberError: every row raises.
            TargetError: the function returns what can't be used.
        """
        if not self.has_raised or len(x) == 1:
            try:
                return function(x)
            except TargetError as error:
                value = self._value(error, x, shape)
                if len(x) == 1:
                    if bool(value.isnan().any()) or not self.liveness.has_answered:
                        _refuse(error)
                    return value
                self.liveness.check(error)
        return self._in_groups(function, x, shape, batched=batched)

    def _in_groups(self, function: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...], *, batched: bool) -> Tensor:
        order, parts, errors = self._nearest_first(x.detach()), list[Tensor](), list[TargetError]()
        size = 1 if self.has_raised or not batched else max(1, len(x) // 2)
        start = suspect = before_answer = 0  # some row of start … suspect − 1 raises
        while start < len(x):
            rows = order[start : start + size]
            try:
                parts.append(function(x[rows]))
                before_answer, left = len(errors), suspect - start - len(rows)
                size = 1 if not batched else max(1, left // 2) if left > 0 else 2 * len(rows)
            except TargetError as error:
                value = self._value(error, x, shape)
                if len(rows) > 1:
                    suspect, size = start + len(rows), len(rows) // 2
                    continue
                suspect = 0
                parts.append(value)
                errors.append(error)
                in_a_row = len(errors) - before_answer
                has_doubled = in_a_row >= ROWS_BEFORE_CHECK and in_a_row & (in_a_row - 1) == 0
                if has_doubled or (start == 0 and self.has_raised):  # the nearest row is the likeliest to answer
                    self.liveness.check(error)
                if len(errors) == len(parts) == _MAX_ROWS_WITHOUT_ANSWER and not self.liveness.has_answered:
                    _refuse(error)
            start += len(rows)
        self.has_raised = bool(errors)
        values = torch.cat(parts)[order.argsort()]
        if len(errors) == len(x) and (bool(values.isnan().any()) or not self.liveness.has_answered):
            _refuse(errors[0])
        return values

    def _nearest_first(self, x: Tensor) -> Tensor:
        """Return the numbers of the rows by their distance from a point that gave a number, or from 0."""
        known = self.liveness.known
        order: Tensor = torch.linalg.vector_norm(x if known is None else x - known, dim=1).argsort()
        return order

    def _value(self, error: TargetError, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the value of a row that raises, (1, *shape), and remember the error; raise it if the function raised nothing."""
        cause = error.__cause__
        is_final = isinstance(error, (NotANumberError, DeadDensityError))
        if is_final or not isinstance(cause, Exception):  # such as sys.exit, which is no row's fault
            raise error
        if not self.said:
            remedy = "; pass `support=`, so that it gets points inside alone" if names_a_range(cause) else ""
            said = shorten(said_of(cause).rstrip(": "), _MAX_SAID)
            self.said = f"{said}{place_of(cause, library_folders())}{remedy}"
        return x.new_full((1, *shape), -math.inf if is_outside(cause) and not shape else math.nan)


def _refuse(error: TargetError) -> NoReturn:
    """Raise the same error as one that a search can treat like NaN."""
    raise NotANumberError(str(error)) from error.__cause__
