"""Pairs: what each pair of a direction and a source of prefixes minimises."""

from __future__ import annotations

SOURCES = ("data", "student", "teacher")
"""Where the tokens before the next one come from."""
_SCORE = "the sequence's reverse KL"
_NONE = "no KL of sequences"
_ON_DATA = "a divergence of the next token on the data's prefixes, no KL of sequences"


def minimised(objective: str, source: str, credit: str = "token") -> str:
    """Return in words what an objective of the next token minimises on prefixes of a source.

    >>> minimised("forward_kl", "teacher")
    "the sequence's forward KL, with its exact gradient"
    >>> minimised("reverse_kl", "student", credit="sequence")
    "the sequence's reverse KL, with its exact gradient"
    """
    if source == "data":
        return _ON_DATA
    if (objective, source) == ("forward_kl", "teacher"):
        return "the sequence's forward KL, with its exact gradient"
    if (objective, source) == ("reverse_kl", "student"):
        return f"{_SCORE}, " + ("with its exact gradient" if credit == "sequence" else "less its score-function term")
    return _NONE
