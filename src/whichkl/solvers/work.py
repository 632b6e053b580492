"""Work: where a solver's passes run, whom it tells how far it is, and where it writes down what it has done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from whichkl.cluster import Threads, Workers
from whichkl.files.journal import Journal
from whichkl.targets.evaluations import Evaluations


def _silent(step: str, done: float) -> None:
    pass


@dataclass(frozen=True)
class Work:
    """Handed down from `fit` to its solver; every field has a quiet default."""

    workers: Workers = field(default_factory=Threads)
    tell: Callable[[str, float], None] = _silent
    """Called with what is being done, and the fraction of it that is done (an upper bound is 1; NaN where it can't be told)."""
    journal: Journal | None = None
    evaluations: Evaluations | None = None
    """Of the target: a solver that has used as many as it may ends with what it has."""

    @property
    def is_spent(self) -> bool:
        """Whether as many evaluations of the target were used as may be."""
        return self.evaluations is not None and self.evaluations.is_spent

    def under(self, prefix: str) -> Work:
        """Return the work of a part, whose entries in the journal are its own."""
        return replace(self, journal=None if self.journal is None else self.journal.under(prefix))

    def quiet(self) -> Work:
        """Return the same workers, telling nobody and writing nothing: for refits."""
        return Work(self.workers)


QUIET = Work()
