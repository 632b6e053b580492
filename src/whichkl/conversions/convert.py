"""convert: what is left of a target → a `Target`, and what that assumes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target


@runtime_checkable
class Evidence(Protocol):
    """Something that is known about a distribution."""

    def as_target(self, *, n: int | None, seed: int) -> Target:
        """Return the distribution as a target with its `origin`.

        Args:
            n: how many draws, simulations or features; None for the default of this kind.
            seed: fixes every random choice.
        """


@plain_modes()
@typed
def convert(evidence: Any, *, n: int | None = None, seed: int = 0) -> Target:
    """Return a target for a distribution that can be neither sampled nor evaluated, from what is known about it.

    Everything else works on the result as on any other target; its `origin` has what was assumed, what can't be known, what was
    left out and how far to trust it.

    Args:
        evidence: one of the classes that `advise(Target(dim=d))` lists, or any object with their method `as_target`.
        n: how many draws or simulations; by default what this kind of evidence needs.
        seed: fixes every random choice.

    Raises:
        InputError: the object is no evidence, or too little of it.
        TargetError: the evidence contradicts itself, or doesn't determine a distribution.
    """
    if isinstance(evidence, Target):
        if evidence.access.cell == "neither":
            because = "it has neither samples nor a density, and a dimension is no evidence"
            instead = f"Print `advise(Target(dim={evidence.dim}))`, which lists what can be converted"
            raise InputError(cannot("convert this target", because, instead))
        return evidence
    if not isinstance(evidence, Evidence) or isinstance(evidence, type):
        because = f"a `{getattr(evidence, '__name__', type(evidence).__name__)}` is none of the kinds of evidence"
        raise InputError(cannot("convert this object", because, "Print `advise(Target(dim=d))`, which lists them"))
    found: Target = evidence.as_target(n=n, seed=seed)
    return found
