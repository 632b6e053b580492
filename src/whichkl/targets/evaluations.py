"""Evaluations: a target counts how often it is used, and can have a budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

COUNTED = ("log_prob", "score", "samples", "rows")
"""What has a cost of one unit: a log density, a gradient, a fresh draw, or a fixed row that is read."""


class Evaluations(dict[str, int]):
    """Counts by name; `rejected` points are counted among the log densities and gradients too.

    >>> counts = Evaluations()
    >>> with counts.capped(10) as used:
    ...     counts["log_prob"] += 12
    ...     counts.is_spent
    True
    >>> used, counts.is_spent
    ({'log_prob': 12, 'score': 0, 'samples': 0, 'rows': 0}, False)
    """

    def __init__(self) -> None:
        super().__init__(dict.fromkeys((*COUNTED, "rejected"), 0))
        self.most = math.inf
        self.is_cut = False
        """Whether a step was omitted because the budget was too small for it."""

    @property
    def total(self) -> int:
        """The sum of all costs."""
        return sum(self[name] for name in COUNTED)

    @property
    def is_spent(self) -> bool:
        """Whether the budget is used up; a solver then returns what it has."""
        return self.is_cut or self.total >= self.most

    def affords(self, points: int) -> bool:
        """Whether the budget has room for `points` more; if not, it counts as spent afterwards.

        >>> counts = Evaluations()
        >>> with counts.capped(100):
        ...     counts.affords(60), counts.is_spent, counts.affords(160), counts.is_spent
        (True, False, False, True)
        """
        self.is_cut = self.is_cut or self.total + points > self.most
        return not self.is_cut

    def calls(self, points: int, most: int) -> int:
        """Return the number of calls with `points` points each that use the budget up, between 1 and `most`.

        >>> counts = Evaluations()
        >>> with counts.capped(100):
        ...     counts.calls(30, 60), counts.calls(1, 60), counts.calls(200, 60)
        (4, 60, 1)
        """
        left = self.most - self.total
        return most if left >= most * points else max(1, math.ceil(left / max(1, points)))

    @contextlib.contextmanager
    def capped(self, budget: float | None = None) -> Iterator[dict[str, int]]:
        """Give the block a budget (None: no limit), and fill the yielded counts with what it used."""
        before, limit, was_cut, used = dict(self), self.most, self.is_cut, dict.fromkeys(COUNTED, 0)
        self.most, self.is_cut = math.inf if budget is None else self.total + budget, False
        try:
            yield used
        finally:
            self.most, self.is_cut = limit, was_cut
            used.update({name: self[name] - before[name] for name in COUNTED})
