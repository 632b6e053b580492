"""Ends: how heavy the tails of the rows are, and how skewed the rows are. A log ratio's own tail shows neither on few rows."""

from __future__ import annotations

from whichkl.importance import tail_shape
from whichkl.targets import Target

_MIN_SKEWNESS = 1.0
"""Least |skewness| of a skewed column: that of an exponential law is 2, that of a Gaussian 0."""


class Ends:
    """The ends of the columns of a target's rows, in free coordinates.

    A log ratio folds a skewed column: both of its sides are in one tail, which then looks heavy. The column itself has its ends
    apart.

    Args:
        target: with samples in memory or without.

    >>> Ends(Target(samples=[1.1**i for i in range(100)])).is_skewed
    True
    """

    def __init__(self, target: Target) -> None:
        x = target.samples
        self.columns = None if x is None or target.context is not None else target.bijection.inverse(x).double().cpu()

    @property
    def may_be_heavy(self) -> bool:
        """Whether the variance of a column may be infinite: Pareto's k̂ of one of its ends is ½ or more; or no rows show it."""
        return self.columns is None or any(tail_shape(end) >= 0.5 for one in self.columns.T for end in (one, -one))

    @property
    def is_skewed(self) -> bool:
        """Whether a column has a longer end."""
        if self.columns is None:
            return False
        centred = self.columns - self.columns.mean(0)
        skewness = centred.pow(3).mean(0) / centred.square().mean(0).clamp(min=1e-300).pow(1.5)
        return bool((skewness.abs() > _MIN_SKEWNESS).any())
