"""Liveness: distinguish a log density that no longer returns numbers from a search that is at bad points."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import DeadDensityError, ResourceError, TargetError, WhichklError, cannot

FAILURES = (TargetError, ResourceError)
"""What a call of the user's function raises; memory may suffice for fewer points at once."""
ROWS_BEFORE_CHECK = 8
"""Consecutive rows without a number after which the log density is called again where it once gave one."""
_MAX_TRIES = 3
"""Calls at that point before a log density counts as dead: a server may fail once."""


class Liveness:
    """Remembers a point where a log density gave a number, and calls it there again when it gives none for many rows."""

    def __init__(self, answers: Callable[[Float[Tensor, "1 d"], bool], bool]) -> None:
        # whether the log density, with its gradient if the second argument is true, is a number at a point
        self._answers = answers
        self.source: Liveness | None = None
        """That of the log density that this one calls, if this one is in other coordinates."""
        self._known: tuple[Float[Tensor, "1 d"], bool] | None = None
        """A point with a number, and whether there was a gradient too."""
        self._unanswered, self._patience = 0, ROWS_BEFORE_CHECK

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Let an error out of the block, as a `DeadDensityError` if the function is dead."""
        try:
            yield
        except DeadDensityError:
            raise
        except FAILURES as error:
            self.check(error)
            raise

    def count(self, x: Float[Tensor, "n d"], value: Tensor, gradient: Tensor | None = None) -> None:
        """Remember a point that has a number; if many rows had none, call the function at such a point again.

        Raises:
            DeadDensityError: there is none at that point either.
        """
        if self.remember(x, value, gradient):
            self._unanswered, self._patience = 0, ROWS_BEFORE_CHECK
            return
        self._unanswered += len(x)
        if self._unanswered >= self._patience:
            self._patience = 2 * self._unanswered
            self.check()

    def remember(self, x: Float[Tensor, "n d"], value: Tensor, gradient: Tensor | None = None) -> bool:
        """Return whether any value is a number, and keep the first such point."""
        known = value.detach().isfinite()
        if not bool(known.any()):
            return False
        if self._known is None or (gradient is not None and not self._known[1]):
            first = int(known.int().argmax())
            self._known = x[first : first + 1].detach().clone(), gradient is not None
        return True

    @property
    def known(self) -> Float[Tensor, "1 d"] | None:
        """A point that gave a number, if any did."""
        return None if self._known is None else self._known[0]

    @property
    def has_answered(self) -> bool:
        """Whether any point had a number so far."""
        return self._known is not None

    def check(self, error: WhichklError | None = None) -> None:
        """Call the function where it once gave a number.

        Raises:
            DeadDensityError: it gives none there any more, at several calls.
        """
        if self.is_alive():
            return
        self._unanswered, self._patience = 0, ROWS_BEFORE_CHECK  # the next caller gets the error at once
        cause = None if error is None else error.__cause__
        said = "" if cause is None else f" ({type(cause).__name__}: {(str(cause).splitlines() or [''])[0]})"
        because = f"`log_prob` gives no number any more, not even at a point where it gave one before{said}"
        instead = "Bring back what it depends on (a server, memory, a file), and fit again"
        raise DeadDensityError(cannot("go on with this target", because, instead)) from error

    def is_alive(self) -> bool:
        """Whether the function still gives a number where it once did, or never gave one anywhere."""
        if self._known is None:
            return self.source is None or self.source.is_alive()
        for _ in range(_MAX_TRIES):
            with contextlib.suppress(*FAILURES):
                if self._answers(*self._known):
                    return True
        return False
