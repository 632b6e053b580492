"""Question: a divergence between two sides, p and q as the caller gave them, and what the sides can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.distributions import widened
from whichkl.divergences.kinds import KINDS, IntegralDivergence
from whichkl.process.memory import check_memory
from whichkl.targets import Target


@dataclass(frozen=True)
class Side:
    """One of the two distributions: a target, a discrete distribution, or both a torch distribution and its target."""

    name: str
    target: Target | None
    distribution: Distribution | None
    fitted_on: Tensor | None = None

    @property
    def discrete(self) -> bool:
        """Whether it lives on atoms."""
        return self.target is None

    @property
    def access(self) -> Access:
        """What can be done with it."""
        if self.target is None:
            return Access.SAMPLER | Access.LOG_PROB | Access.NORMALIZED | Access.ENUMERABLE
        return self.target.access

    @property
    def density(self) -> bool:
        """Whether it has a normalised log density."""
        return Access.NORMALIZED in self.access

    def thinned(self) -> tuple[Side, str | None]:
        """Return the side with its chains thinned to nearly independent rows, and a note where there was anything to thin."""
        if self.target is None or self.target.samples is None or self.target.chains is None:
            return self, None
        few, step = self.target.thinned()
        rows = 0 if few.samples is None else len(few.samples)
        note = f"the chains of {self.name} were thinned to every {step}. row, {rows:,} of {len(self.target.samples):,}"
        return replace(self, target=few), note

    @classmethod
    def of(cls, obj: Any, name: str) -> Side:
        """Read a torch distribution, a `Target`, samples (array, DataFrame, path) or the `model` of a fit.

        Raises:
            InputError: it is none of these.
        """
        model, fitted_on = getattr(obj, "model", None), None
        if isinstance(model, Distribution):
            if getattr(getattr(obj, "objective", None), "name", "") == "forward_kl":  # the others don't see the rows
                fitted_on = getattr(getattr(obj, "target", None), "samples", None)
            obj = model
        if isinstance(obj, Distribution):
            obj = widened(obj)
            if obj.batch_shape != () and obj.event_shape == ():
                because = f"{name} is a batch of {tuple(obj.batch_shape)} distributions"
                instead = "Give one, or torch.distributions.Independent(…, 1) for a vector"
                raise InputError(cannot("estimate one divergence of it", because, instead))
            if _is_discrete(obj):
                return cls(name, None, obj)
            return cls(name, Target.of(obj), obj, fitted_on)
        return cls(name, _in_memory(Target.of(obj), name), None)


def _in_memory(target: Target, name: str) -> Target:
    """Return a target whose samples are in memory, since all of them are compared with each other.

    Raises:
        InputError: they are pairs (x, y).
        ResourceError: they need more memory than is free.
    """
    stream = target.stream
    if stream is None:
        return target
    if stream.context_names:
        raise InputError(cannot("estimate a divergence of pairs (x, y)", f"{name} is conditional", "Give single rows"))
    check_memory(2 * stream.bytes_in_memory, f"hold the rows of {name}", "Give a part of them")
    rows = torch.cat([block.x for part in stream.parts for block in part.blocks()])
    return Target(samples=rows, names=target.names)


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


def as_rows(values: Any, name: str) -> Tensor:
    """Bring probabilities or logits to a floating tensor, atoms on the last axis.

    Raises:
        InputError: it isn't an array of numbers.
    """
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        array = array if array.dtype.kind == "f" else array.astype(np.float64)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        because = f"{name} is a `{type(values).__name__}`"
        raise InputError(cannot("read atoms", because, "Give an array or tensor of floats, atoms on the last axis")) from error


def _is_discrete(p: Distribution) -> bool:
    support = p.support
    return support is not None and bool(support.is_discrete)
