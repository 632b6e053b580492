"""Side: p or q as the caller gave it, brought to the few forms that the methods read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot
from whichkl.access import Access
from whichkl.distributions import widened
from whichkl.memory_limits import check_memory
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
