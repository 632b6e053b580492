"""Resolve: a family that leaves something to the data becomes one that doesn't: margins, a number of components."""

from __future__ import annotations

from typing import Any

from whichkl.divergences import Estimate
from whichkl.families import Family, Mixture
from whichkl.solvers.rows.component_count import choose_components
from whichkl.solvers.work import Work
from whichkl.targets import Target

Curve = tuple[tuple[int, Estimate], ...]


def resolve(target: Target, family: Family, seed: int, work: Work) -> tuple[Family, Curve | None, tuple[str, ...]]:
    """Return the family to fit, the held-out curve that chose its number of components, and what was inferred."""
    if isinstance(family, Mixture) and family.components == "auto":
        return choose_components(target, family, seed, work)
    inferred: Any = getattr(family, "resolve", None)
    if inferred is None:
        return family, None, ()
    x = target.samples if target.samples is not None else None if target.stream is None else target.stream.first.x
    if x is None:
        return family, None, ()
    explicit, note = inferred(x, target.names, whole=target.samples is not None)
    return explicit, None, (note,) if note else ()
