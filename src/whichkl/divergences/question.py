"""Question: a divergence between two sides, p and q as the caller gave them, and what the sides can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.distributions import widened
from whichkl.divergences.kinds import KINDS, IntegralDivergence
from whichkl.process.memory import check_memory
from whichkl.targets import Target

_MAX_FRESH_DRAWS = 10_000
"""Largest number of draws for methods that compare all rows with each other."""


@dataclass(frozen=True)
class Side:
    """One of the two distributions: a target, a discrete distribution, or both a torch distribution and its target."""

    name: str
    given: Target | None
    distribution: Distribution | None
    fitted_on: Tensor | None = None

    @property
    def discrete(self) -> bool:
        """Whether it lives on atoms."""
        return self.given is None

    @property
    def target(self) -> Target:
        """The target of a continuous side."""
        if self.given is None:
            raise TypeError("discrete")
        return self.given

    @property
    def access(self) -> Access:
        """What can be done with it."""
        if self.given is None:
            return Access.SAMPLER | Access.LOG_PROB | Access.NORMALIZED | Access.ENUMERABLE
        return self.given.access

    @property
    def numbers(self) -> int:
        """How many numbers its samples have."""
        return 0 if self.given is None or self.given.samples is None else self.given.samples.numel()

    @property
    def density(self) -> bool:
        """Whether it has a normalised log density."""
        return Access.NORMALIZED in self.access

    def thinned(self) -> tuple[Side, list[str]]:
        """Return the side with its chains thinned to nearly independent rows, and a note where there was anything to thin."""
        target = self.given
        if target is None or target.samples is None or target.chains is None:
            return self, []
        few, step = target.thinned()
        rows = 0 if few.samples is None else len(few.samples)
        note = f"the chains of {self.name} were thinned to every {step}. row, {rows:,} of {len(target.samples):,}"
        return replace(self, given=few), [note]

    @classmethod
    def of(cls, obj: Any, name: str) -> Side:
        """Read a torch distribution, a `Target`, samples (array, DataFrame, path) or the `model` of a fit."""
        model, fitted_on = getattr(obj, "model", None), None
        if isinstance(model, Distribution):
            if getattr(getattr(obj, "objective", None), "name", "") == "forward_kl":  # the others don't see the rows
                fitted_on = getattr(getattr(obj, "target", None), "samples", None)
            obj = model
        if not isinstance(obj, Distribution):
            return cls(name, _in_memory(Target.of(obj), name), None)
        obj = widened(obj)
        if obj.batch_shape != () and obj.event_shape == ():
            because = f"{name} is a batch of {tuple(obj.batch_shape)} distributions"
            instead = "Give one, or torch.distributions.Independent(…, 1) for a vector"
            raise InputError(cannot("estimate one divergence of it", because, instead))
        if obj.support is not None and obj.support.is_discrete:
            return cls(name, None, obj)
        return cls(name, Target.of(obj), obj, fitted_on)


def _in_memory(target: Target, name: str) -> Target:
    """Return a target whose samples are in memory, since all of them are compared with each other."""
    stream = target.stream
    if stream is None:
        return target
    if stream.context_names:
        raise InputError(cannot("estimate a divergence of pairs (x, y)", f"{name} is conditional", "Give single rows"))
    check_memory(2 * stream.bytes_in_memory, f"hold the rows of {name}", "Give a part of them")
    return Target(samples=torch.cat([block.x for part in stream.parts for block in part.blocks()]), names=target.names)


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
    def targets(self) -> tuple[Target, Target]:
        """The targets of two continuous sides."""
        return self.p.target, self.q.target

    @property
    def continuous(self) -> bool:
        """Whether neither lives on atoms."""
        return not self.p.discrete and not self.q.discrete

    @property
    def is_kl(self) -> bool:
        """Whether the divergence is the forward or the reverse KL."""
        return self.name in ("forward_kl", "reverse_kl")

    @property
    def evaluated(self) -> bool:
        """Whether both have a log density."""
        return Access.LOG_PROB in self.p.access and Access.LOG_PROB in self.q.access

    @property
    def sampled(self) -> bool:
        """Whether there are draws of both, fixed or fresh."""
        return self.p.access.can_sample and self.q.access.can_sample

    def drawn(self, side: Side, shift: int = 0) -> Target:
        """Return a side's fixed samples where there are any, else `n` fresh draws, at most 10,000."""
        target = side.target
        if target.samples is not None:
            return target
        return Target(samples=target.draws(min(self.n, _MAX_FRESH_DRAWS), self.seed + shift))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return equally weighted draws of both, for methods that have nothing else."""
        drawn = (self.drawn(self.p), self.drawn(self.q, 1))
        rows = [one.samples for one in drawn if one.weights is None and one.samples is not None]
        if len(rows) < len(drawn):
            because = "the samples are weighted, and this method takes equal weights"
            raise TargetError(cannot("compare these samples", because, "Resample them by their weights first"))
        return rows[0], rows[1]
