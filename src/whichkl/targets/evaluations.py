"""Evaluations: how much of a target was used, counted by the target itself, and how much may be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

COUNTED = ("log_prob", "score", "samples", "rows")
"""What costs: log densities, gradients, fresh draws, and reads of fixed rows, a unit each."""


class Evaluations(dict[str, int]):
    """Counts by name; `rejected` ones among them cost nothing of their own.

    >>> counts = Evaluations()
    >>> with counts.capped(10) as used:
    ...     counts["log_prob"] += 12
    ...     counts.is_spent
    True
    >>> used, counts.is_spent
    ({'log_prob': 12, 'score': 0, 'samples': 0, 'rows': 0}, False)
    """

    def __init__(self) -> None:
        """Begin at zero, without a limit."""
        super().__init__(dict.fromkeys((*COUNTED, "rejected"), 0))
        self.most = math.inf
        self.is_cut = False
        """Whether a step was left out, since the budget doesn't hold so many more."""

    @property
    def total(self) -> int:
        """Everything that costs."""
        return sum(self[name] for name in COUNTED)

    @property
    def is_spent(self) -> bool:
        """Whether as much was used as may be: a solver then ends with what it has."""
        return self.is_cut or self.total >= self.most

    def affords(self, points: int) -> bool:
        """Whether so many more may be used; where they may not, the budget counts as spent from then on.

        >>> counts = Evaluations()
        >>> with counts.capped(100):
        ...     counts.affords(60), counts.is_spent, counts.affords(160), counts.is_spent
        (True, False, False, True)
        """
        self.is_cut = self.is_cut or self.total + points > self.most
        return not self.is_cut

    def calls(self, points: int, most: int) -> int:
        """How many calls with so many points use the budget up; at least 1, at most `most`.

        >>> counts = Evaluations()
        >>> with counts.capped(100):
        ...     counts.calls(30, 60), counts.calls(1, 60), counts.calls(200, 60)
        (4, 60, 1)
        """
        left = self.most - self.total
        return most if left >= most * points else max(1, math.ceil(left / max(1, points)))

    @contextlib.contextmanager
    def capped(self, budget: float | None = None) -> Iterator[dict[str, int]]:
        """Let the block use so much more, and fill the yielded counts with what it used."""
        before, limit, was_cut, used = dict(self), self.most, self.is_cut, dict.fromkeys(COUNTED, 0)
        self.most, self.is_cut = math.inf if budget is None else self.total + budget, False
        try:
            yield used
        finally:
            self.most, self.is_cut = limit, was_cut
            used.update({name: self[name] - before[name] for name in COUNTED})
