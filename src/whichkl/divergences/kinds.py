"""The registry: every divergence by its name. A divergence that is added here is known to estimates, losses and audits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

from whichkl._checks import InputError, cannot
from whichkl.divergences.adaptive_kl import AdaptiveKL, InterpolatedKL
from whichkl.divergences.divergence import Divergence, IntegralDivergence, RowDivergence
from whichkl.divergences.f_divergences import ChiSquared, Hellinger, RenyiDivergence, TotalVariation
from whichkl.divergences.kl_divergences import (
    ForwardKLDivergence,
    JeffreysDivergence,
    JeffreysSum,
    JensenShannonDivergence,
    ReverseKLDivergence,
    SkewForwardKLDivergence,
    SkewReverseKLDivergence,
    WeightedKLs,
)

__all__ = [
    "DIVERGENCES",
    "KINDS",
    "ROW_DIVERGENCES",
    "AdaptiveKL",
    "ChiSquared",
    "Divergence",
    "ForwardKLDivergence",
    "Hellinger",
    "IntegralDivergence",
    "InterpolatedKL",
    "JeffreysDivergence",
    "JeffreysSum",
    "JensenShannonDivergence",
    "Kind",
    "RenyiDivergence",
    "ReverseKLDivergence",
    "RowDivergence",
    "SkewForwardKLDivergence",
    "SkewReverseKLDivergence",
    "TotalVariation",
    "WeightedKLs",
    "divergence_named",
    "parameters_of",
    "register",
]

D = TypeVar("D", bound=Divergence)

DIVERGENCES: dict[str, type[Divergence]] = {}
"""Every divergence by its name."""
KINDS: dict[str, type[IntegralDivergence]] = {}
"""The divergences of two densities."""
ROW_DIVERGENCES: dict[str, type[RowDivergence]] = {}
"""The divergences of rows of log-probabilities, which are losses."""
PARAMETERS: dict[str, tuple[str, ...]] = {}
"""The names of each divergence's parameters; torch.compile reads this table, and can't read dataclass fields of a class."""
Kind = IntegralDivergence


def parameters_of(divergence: type[Divergence] | Divergence) -> tuple[str, ...]:
    """Return the names of a divergence's parameters.

    >>> parameters_of(JeffreysDivergence)
    ('weight_on_forward',)
    """
    return tuple(one.name for one in fields(divergence))


def register(kind: type[D]) -> type[D]:
    """Make a divergence known by its name to estimates, losses, distillation and the audit. It can decorate the class.

    Raises:
        InputError: a divergence of this name is registered.
    """
    if kind.name in DIVERGENCES:
        because = "a divergence of this name is registered already"
        raise InputError(cannot(f"register `{kind.name}`", because, "Give it another name"))
    DIVERGENCES[kind.name], PARAMETERS[kind.name] = kind, parameters_of(kind)
    if issubclass(kind, IntegralDivergence):
        KINDS[kind.name] = kind
    if issubclass(kind, RowDivergence):
        ROW_DIVERGENCES[kind.name] = kind
    return kind


for _kind in (
    ForwardKLDivergence,
    ReverseKLDivergence,
    JeffreysDivergence,
    JeffreysSum,
    JensenShannonDivergence,
    SkewForwardKLDivergence,
    SkewReverseKLDivergence,
    RenyiDivergence,
    TotalVariation,
    Hellinger,
    ChiSquared,
    AdaptiveKL,
    InterpolatedKL,
):
    register(_kind)


def divergence_named(name: str, known: Mapping[str, type[D]], **parameters: float) -> D:
    """Return the divergence of a name, with its parameter.

    >>> divergence_named("jeffreys", KINDS, weight_on_forward=0.3)
    JeffreysDivergence(weight_on_forward=0.3)

    Raises:
        InputError: `known` has no such name, or the divergence takes no such parameter.
    """
    if not isinstance(name, str) or name not in known:
        because = "there is no such divergence here"
        raise InputError(cannot(f"use the divergence `{name}`", because, f"Use one of {', '.join(known)}"))
    taken = PARAMETERS[name]
    if unknown := sorted(set(parameters) - set(taken) - ({"skew"} if "skew" in name else set())):
        because = f"`{name}` has no such parameter: it takes {', '.join(taken) or 'no parameters'}"
        raise InputError(cannot(f"set `{', '.join(unknown)}`", because, "Leave it out"))
    return known[name](**parameters)
