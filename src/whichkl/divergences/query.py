"""Question: which divergence is asked for, between which two sides, and what the sides can do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.kinds import KINDS, IntegralDivergence
from whichkl.divergences.sides import Side
from whichkl.targets import Target


@dataclass(frozen=True)
class Question:
    """Both sides, the divergence, and the number of draws."""

    p: Side
    q: Side
    name: str
    kind: IntegralDivergence | None
    n: int
    seed: int

    def swapped(self) -> Question:
        """Return the question of KL(q‖p), as the forward KL of q from p."""
        return replace(self, p=self.q, q=self.p, name="forward_kl", kind=KINDS["forward_kl"]())

    @property
    def continuous(self) -> bool:
        """Whether neither lives on atoms."""
        return not self.p.discrete and not self.q.discrete

    @property
    def evaluated(self) -> bool:
        """Whether both have a log density."""
        return Access.LOG_PROB in self.p.access and Access.LOG_PROB in self.q.access

    @property
    def sampled(self) -> bool:
        """Whether there are draws of both, fixed or fresh."""
        return self.p.access.can_sample and self.q.access.can_sample

    def rows(self) -> tuple[Tensor, Tensor]:
        """Equally weighted draws of both, for methods that have nothing else.

        Raises:
            TargetError: one side's samples are weighted.
        """
        return _unweighted(self.drawn(self.p)), _unweighted(self.drawn(self.q, 1))

    def drawn(self, side: Side, shift: int = 0) -> Target:
        """Return a side's fixed samples where there are any, else `n` fresh draws, at most 10,000."""
        target = target_of(side)
        return target if target.samples is not None else Target(samples=target.draws(min(self.n, 10_000), self.seed + shift))


def target_of(side: Side) -> Target:
    """The target of a continuous side."""
    if side.target is None:
        raise TypeError("discrete")
    return side.target


def _unweighted(target: Target) -> Tensor:
    if target.weights is not None:
        because = "the samples are weighted, and this method takes equal weights"
        raise TargetError(cannot("compare these samples", because, "Resample them by their weights first"))
    if target.samples is None:
        raise TypeError("no samples")
    return target.samples
