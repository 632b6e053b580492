"""Objective: a divergence of the next token and the prefixes that it is taken on, and what the two minimise together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.specs import row_divergence_of, spec_of
from whichkl.divergences.divergence import RowDivergence

SOURCES = ("data", "student", "teacher")
Prefixes = Mapping[str, float] | None
"""Shares of the sources; None for the data alone."""
_PART = re.compile(rf"\s*(?:(\d*\.?\d+)\s*\*?\s*)?({'|'.join(SOURCES)})\s*")
_WRITTEN = "Write, say, forward_kl@data, reverse_kl@student, jeffreys:0.3@0.5data+0.5student or reverse_kl@student:sequence"
_MINIMISES = {
    ("forward_kl", "teacher", "token"): "the forward KL of sequences, KL(p‖q): its exact gradient",
    ("reverse_kl", "student", "token"): "the reverse KL of sequences, KL(q‖p), less its score-function term",
    ("reverse_kl", "student", "sequence"): "the reverse KL of sequences, KL(q‖p): its exact gradient on average",
}
_WHOSE = {"data": "the data's", "student": "the student's own", "teacher": "the teacher's"}


@dataclass(frozen=True)
class LanguageObjective:
    """A divergence of the next token's laws, the source of the tokens before it, and whether a token is credited with later ones.

    As text it is the divergence, ``@`` and the prefixes, with shares where there are several: ``"forward_kl@data"``,
    ``"jeffreys:0.3@0.5data+0.5student"``. ``"reverse_kl@student:sequence"`` adds the score-function term.
    """

    divergence: RowDivergence
    shares: Mapping[str, float]
    """Of every source."""
    credit: str = "token"
    is_of_teachers_text: bool = False
    """Whether the data are known to be the teacher's own text."""
    is_between: ClassVar[bool] = False

    @classmethod
    def of(cls, text: Any) -> LanguageObjective:
        """Read an objective; without prefixes they are those of the data.

        Raises:
            InputError: it isn't written in this way, or its parts don't go together.

        >>> LanguageObjective.of("jeffreys:0.3@ 0.5 student + 0.5 data").name
        'jeffreys:0.3@0.5data+0.5student'
        """
        if not isinstance(text, str):
            return cls(row_divergence_of(text), shares_of(None))
        divergence, at, rest = text.partition("@")
        prefixes, colon, credit = rest.partition(":")
        parts = [_PART.fullmatch(one) for one in prefixes.split("+")] if at else []
        if (at and not all(parts)) or (colon and credit.strip() != "sequence"):
            raise InputError(cannot(f"minimise `{text}`", "its prefixes or its credit can't be read", _WRITTEN))
        shares: dict[str, float] = {}
        for part in parts:
            if part is not None:  # without a number, equal shares
                shares[part[2]] = shares.get(part[2], 0.0) + (float(part[1]) if part[1] else 1 / len(parts))
        found = cls(row_divergence_of(divergence), shares_of(shares if at else None), "sequence" if colon else "token")
        check_together(found.divergence, found.shares, found.credit)
        return found

    @property
    def name(self) -> str:
        """The text that `of` reads."""
        used = {name: share for name, share in self.shares.items() if share}
        prefixes = next(iter(used)) if len(used) == 1 else "+".join(f"{share:.12g}{name}" for name, share in used.items())
        return f"{spec_of(self.divergence)}@{prefixes}" + (":sequence" if self.credit == "sequence" else "")

    @property
    def formula(self) -> str:
        """What is averaged over sequences."""
        pair = {"forward_kl": "KL(pₜ‖qₜ)", "reverse_kl": "KL(qₜ‖pₜ)"}.get(self.divergence.name, "D(pₜ, qₜ)")
        return f"Σₜ {pair} after tokens of {' and '.join(f'the {name}' for name, share in self.shares.items() if share)}"

    @property
    def minimises(self) -> str:
        """What this pair of divergence and prefixes minimises, as a divergence of whole sequences where it is one."""
        used = [name for name, share in self.shares.items() if share]
        source = ["teacher"] if used == ["data"] and self.is_of_teachers_text else used
        return minimised(self.divergence.name, source, self.credit)

    @property
    def character(self) -> str:
        """The same, as a sentence of an advice."""
        return f"minimises {self.minimises}"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `language_model` that choose it."""
        used = {name: share for name, share in self.shares.items() if share}
        return {"objective": spec_of(self.divergence), "prefixes": used, "credit": self.credit}


def minimised(divergence: str, sources: Sequence[str], credit: str = "token") -> str:
    """Return what a divergence of the next token minimises on prefixes of these sources.

    >>> minimised("forward_kl", ["teacher"])
    'the forward KL of sequences, KL(p‖q): its exact gradient'
    """
    known = _MINIMISES.get((divergence, sources[0], credit)) if len(sources) == 1 else None
    whose = " and ".join(_WHOSE[source] for source in sources)
    return known or f"no KL of sequences: a divergence of the next token, on {whose} prefixes"


def shares_of(prefixes: Any) -> dict[str, float]:
    """Return the share of every source; those of the data by default.

    Raises:
        InputError: it is no dict, a source isn't known, or the shares don't sum to 1.
    """
    if prefixes is not None and not isinstance(prefixes, Mapping):
        shown = repr(prefixes) if isinstance(prefixes, str) else "…"
        because = f"it is a `{type(prefixes).__name__}`, and each source needs its share"
        meant = {"data": 0.5, "student": 0.5}
        if isinstance(prefixes, str) and prefixes in SOURCES:
            meant = {prefixes: 1.0}
        raise InputError(cannot(f"use `prefixes={shown}`", because, f"Say, prefixes={meant}"))
    given = dict({"data": 1.0} if prefixes is None else prefixes)
    unknown = [name for name in given if name not in SOURCES]
    values = list(given.values())
    bad = any(isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one <= 1 for one in values)
    if unknown or bad or abs(sum(values) - 1) > 1e-9:
        because = "shares are numbers between 0 and 1 that sum to 1"
        if unknown:
            because = f"`{unknown[0]}` is none of data, student and teacher"
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


def check_together(divergence: RowDivergence, shares: Mapping[str, float], credit: str, hard_label_weight: float = 0.0) -> None:
    """Refuse choices whose sum is the gradient of nothing.

    Raises:
        InputError: they don't go together.
    """
    if credit not in ("token", "sequence"):
        raise InputError(cannot(f"use `credit={credit!r}`", "it is neither 'token' nor 'sequence'", "Leave it out"))
    if credit == "sequence" and (divergence.name != "reverse_kl" or shares["student"] < 1):
        because = "the score-function term belongs to the reverse KL of sequences drawn from the student"
        instead = "Use objective='reverse_kl' and prefixes={'student': 1.0}, or credit='token'"
        raise InputError(cannot("use `credit='sequence'` here", because, instead))
    if hard_label_weight and shares["data"] < 1:
        because = "drawn tokens are no labels: their cross-entropy trains on a model's own noise"
        raise InputError(cannot("use `hard_label_weight=` here", because, "Use prefixes={'data': 1.0}, or hard_label_weight=0"))
