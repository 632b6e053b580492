"""Choices: direction, prefixes, credit and numbers of a distillation, and which of them go together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from whichkl._checks import InputError, cannot
from whichkl.distillation.language.pairs import SOURCES
from whichkl.divergences.divergence import RowDivergence


def shares_of(prefixes: Mapping[str, float] | None) -> dict[str, float]:
    """Return the share of every source of prefixes.

    Raises:
        InputError: a source isn't known, or the shares don't sum to 1.
    """
    given = dict({"data": 1.0} if prefixes is None else prefixes)
    unknown = [name for name in given if name not in SOURCES]
    if unknown:
        because = f"`{unknown[0]}` is none of data, student and teacher"
        raise InputError(cannot(f"use `prefixes={given}`", because, "Say, prefixes={'data': 0.5, 'student': 0.5}"))
    bad = any(isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one <= 1 for one in given.values())
    if bad or abs(sum(given.values()) - 1) > 1e-9:
        because = "shares are numbers between 0 and 1 that sum to 1"
        raise InputError(cannot(f"use `prefixes={given}`", because, "Say, prefixes={'data': 0.5, 'student': 0.5}"))
    return {name: float(given.get(name, 0.0)) for name in SOURCES}


def check_numbers(*, hard_label_weight: float, temperature: float, max_new_tokens: int, budget: float | None) -> None:
    """Refuse numbers out of their ranges; a NaN is out of each."""
    for name, value, is_right, because in (
        ("hard_label_weight", hard_label_weight, 0 <= hard_label_weight <= 1, "a weight is between 0 and 1"),
        ("temperature", temperature, 0 < temperature < math.inf, "a temperature is a positive number"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "it must be a whole number of at least 1"),
        ("budget", budget, budget is None or 0 < budget < math.inf, "it is a positive number of FLOPs"),
    ):
        if not is_right:
            raise InputError(cannot(f"use `{name}={value}`", because, "Leave it out, or correct it"))


def check_together(divergence: RowDivergence, shares: Mapping[str, float], credit: str, hard_label_weight: float) -> None:
    """Refuse choices whose sum is the gradient of nothing."""
    if credit not in ("token", "sequence"):
        raise InputError(cannot(f"use `credit={credit!r}`", "it is neither 'token' nor 'sequence'", "Leave it out"))
    if credit == "sequence" and (divergence.name != "reverse_kl" or shares["student"] < 1):
        because = "the score-function term belongs to the reverse KL of sequences drawn from the student"
        instead = "Use objective='reverse_kl' and prefixes={'student': 1.0}, or credit='token'"
        raise InputError(cannot("use `credit='sequence'` here", because, instead))
    if hard_label_weight and shares["data"] < 1:
        because = "drawn tokens are no labels: their cross-entropy trains on a model's own noise"
        raise InputError(cannot("use `hard_label_weight=` here", because, "Use prefixes={'data': 1.0}, or hard_label_weight=0"))
