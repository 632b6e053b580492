"""Verdict: what training changed, in one sentence, and what speaks against the figures."""

from __future__ import annotations

import math
from typing import NamedTuple

from whichkl.distillation.language.sequence_kl import SequenceKL
from whichkl.divergences import Estimate

_CLEAR = 2.0
"""Standard errors from which on a change counts as one."""
_MIN_CUT = 0.01
_MIN_LENGTH_CHANGE = 0.1
"""Smallest difference of mean lengths that is named, as a share of the teacher's."""
_WORDS = {"forward_kl": "Forward KL", "reverse_kl": "reverse KL"}


class Verdict(NamedTuple):
    """What a training changed."""

    outcome: str
    sentence: str
    doubts: tuple[str, ...]
    """What speaks against the figures, a sentence each."""


def verdict_of(before: SequenceKL, after: SequenceKL) -> Verdict:
    """Compare both KLs before and after training, on the same prompts.

    The errors of the two are combined as if they were independent, which is too wide where they share draws of the teacher.
    """
    moves = {name: _move(getattr(before, name), getattr(after, name)) for name in _WORDS}
    parts = [_said(_WORDS[name], getattr(before, name), getattr(after, name), moves[name]) for name in _WORDS]
    return Verdict(_OUTCOMES[_sign(moves["forward_kl"]), _sign(moves["reverse_kl"])], f"{'; '.join(parts)}.", _doubts(after))


_OUTCOMES = {
    (-1, -1): "The student came closer to its teacher",
    (-1, 0): "The student came closer to its teacher",
    (0, -1): "The student came closer to its teacher",
    (-1, 1): "The student came closer in the forward direction only",
    (1, -1): "The student came closer in the reverse direction only",
    (0, 0): "No change was detected",
    (0, 1): "The student moved away from its teacher",
    (1, 0): "The student moved away from its teacher",
    (1, 1): "The student moved away from its teacher",
}


def _move(was: Estimate, now: Estimate) -> tuple[float, float]:
    """Return the difference and its standard error."""
    if not (math.isfinite(was.value) and math.isfinite(now.value)):
        same = math.isinf(was.value) and math.isinf(now.value)
        return (0.0 if same else now.value - was.value), 0.0
    return now.value - was.value, math.hypot(was.stderr or 0.0, now.stderr or 0.0)


def _sign(move: tuple[float, float]) -> int:
    difference, error = move
    return 0 if abs(difference) <= _CLEAR * error else 1 if difference > 0 else -1


def _said(word: str, was: Estimate, now: Estimate, move: tuple[float, float]) -> str:
    if not (math.isfinite(was.value) and math.isfinite(now.value)):
        return f"{word} was {was.number} and is {now.number} nats a sequence"
    change = Estimate("change", abs(move[0]), move[1])
    verb = ("hardly moved", "rose", "fell")[_sign(move)]
    by = f", by {change.number}" if _sign(move) else ""
    return f"{word} {verb} from {was.number} to {now.number} nats a sequence{by}"


def _doubts(after: SequenceKL) -> tuple[str, ...]:
    found = []
    if max(after.cut.values()) >= _MIN_CUT:
        shares = " and ".join(f"{share:.0%} of the {who}'s" for who, share in after.cut.items())
        found.append(f"{shares} continuations were cut at {after.max_new_tokens} tokens: the KLs of whole ones are larger.")
    for name, word in _WORDS.items():
        if not math.isfinite(getattr(after, name).value):
            found.append(f"{word[:1].upper()}{word[1:]} is infinite: a token that one model can draw has no chance in the other.")
    length = after.measures.get("length")
    if length is not None and length.difference is not None:
        change, error = length.difference.value, length.difference.stderr or 0.0
        if abs(change) > max(_CLEAR * error, _MIN_LENGTH_CHANGE * length.teacher.value):
            side = "longer" if change > 0 else "shorter"
            tokens = Estimate("length", abs(change), error)
            found.append(f"The student's continuations are {tokens.number} tokens {side} than the teacher's.")
    return tuple(found)
