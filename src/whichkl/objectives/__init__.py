"""Objectives: what a fit minimises, and the access that it requires; their registry, and the texts that name them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from whichkl._checks import InputError, cannot
from whichkl.objectives.between import Jeffreys, JensenShannon, Renyi, SkewForwardKL, SkewReverseKL
from whichkl.objectives.kl import ForwardKL, ReverseKL
from whichkl.objectives.objective import Direction, Objective, UpTo, parameters

OBJECTIVES: dict[str, Objective] = {
    one.name: one for one in (ForwardKL(), ReverseKL(), Jeffreys(), JensenShannon(), SkewForwardKL(), SkewReverseKL(), Renyi())
}
"""Every objective by its name, best first where several are possible, with its default parameter."""

__all__ = [
    "OBJECTIVES",
    "Direction",
    "ForwardKL",
    "Jeffreys",
    "JensenShannon",
    "Objective",
    "Renyi",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "UpTo",
    "objective_of",
    "register",
]


def register(objective: Objective) -> Objective:
    """Make an objective known by its name to `fit`, `advise`, `compare` and the command line.

    One whose `direction` is "between" is minimised by the solvers of such divergences.

    Raises:
        InputError: an objective of this name is registered.
    """
    if objective.name in OBJECTIVES:
        because = "an objective of this name is registered already"
        raise InputError(cannot(f"register `{objective.name}`", because, "Give it another name"))
    OBJECTIVES[objective.name] = objective
    return objective


def objective_of(objective: Objective | str) -> Objective:
    """Return the objective that a text names: its name, then a colon and its parameter if it has one.

    Raises:
        InputError: the name isn't known, or the parameter isn't allowed.

    >>> objective_of("jeffreys:0.3")
    Jeffreys(weight_on_forward=0.3)
    >>> objective_of("renyi").spec
    'renyi:0.5'
    """
    if isinstance(objective, Objective):
        return objective
    given: Any = objective
    if not isinstance(given, str):
        instead = f"Give the name of one, such as {next(iter(OBJECTIVES))!r}"
        raise InputError(cannot("minimise this objective", f"it is a `{type(objective).__name__}`", instead))
    name, colon, value = (part.strip() for part in objective.partition(":"))
    known = OBJECTIVES.get(name)
    if known is None:
        because = f"this version minimises {', '.join(map(_written, OBJECTIVES.values()))}"
        near = get_close_matches(name, OBJECTIVES, 1)
        raise InputError(
            cannot(f"minimise `{objective}`", because, f"Write `{near[0]}`, if you meant that" if near else "Choose one of them")
        )
    if not colon:
        return known
    build: Any = type(known)
    try:
        number = float(value)
    except ValueError:
        number = None
    if number is None or not parameters(known):
        raise InputError(cannot(f"minimise `{objective}`", f"it is written {_written(known)}", "Correct it"))
    one: Objective = build(number)
    return one


def _written(objective: Objective) -> str:
    """Such as ``jeffreys[:WEIGHT_ON_FORWARD]``."""
    return objective.name + "".join(f"[:{name.upper()}]" for name in parameters(objective))
