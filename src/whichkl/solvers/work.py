"""Work: where a solver's passes run, where it reports its progress, and where it writes that progress down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from whichkl.cluster import Threads, Workers
from whichkl.files.journal import Journal
from whichkl.targets.evaluations import Evaluations


@dataclass(frozen=True)
class Work:
    """The surroundings of a solver, which `fit` passes on; every field has a quiet default."""

    workers: Workers = field(default_factory=Threads)
    tell: Callable[[str, float], None] = lambda step, done: None
    """Called with the name of the present step and the fraction of it that is done, at most 1; NaN if it is unknown."""
    journal: Journal | None = None
    evaluations: Evaluations = field(default_factory=Evaluations)
    """The target's evaluations; a solver that has used up its budget ends with its best result so far."""

    @property
    def is_spent(self) -> bool:
        """Whether the evaluations of the target are used up."""
        return self.evaluations.is_spent

    def under(self, prefix: str) -> Work:
        """Return the work of a part, with its own entries in the journal."""
        return replace(self, journal=None if self.journal is None else self.journal.under(prefix))

    def quiet(self) -> Work:
        """Return the same workers without progress or journal, for refits."""
        return Work(self.workers)


QUIET = Work()
