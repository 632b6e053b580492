"""Verdict: what training changed, in one sentence, and what speaks against the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from whichkl.distillation.language.clusters import notes_on
from whichkl.distillation.language.held_out_loss import HeldOutLoss
from whichkl.distillation.language.sequence_kl import MIN_CUT, SequenceKL
from whichkl.divergences import Estimate
from whichkl.printable import as_sentence

_CLEAR = 2.0
"""Standard errors from which on a change counts as one."""
_MIN_LENGTH_CHANGE = 0.1
"""Smallest difference of mean lengths that is named, as a share of the teacher's."""
_WORDS = {"forward_kl": "forward KL", "reverse_kl": "reverse KL"}


class Verdict(NamedTuple):
    """What a training changed."""

    outcome: str
    sentence: str
    doubts: tuple[str, ...]
    """What speaks against the figures, a sentence each."""


def verdict_of(before: SequenceKL | HeldOutLoss, after: SequenceKL | HeldOutLoss) -> Verdict:
    """Compare the KLs before and after training, on the same prompts.

    The errors of the two are combined as if they were independent, which is too wide where they share draws of the teacher.
    """
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in _WORDS}
    moves = {name: _move(*both) for name, both in pairs.items() if None not in both}
    parts = [_said(_WORDS[name], *pairs[name], moves[name], after.per) for name in moves]
    outcome = _outcome({name: _sign(move) for name, move in moves.items()})
    return Verdict(outcome, as_sentence("; ".join(parts)), _doubts(after))


def _outcome(signs: Mapping[str, int]) -> str:
    fell, rose = [name for name, sign in signs.items() if sign < 0], [name for name, sign in signs.items() if sign > 0]
    if fell and rose:
        return f"The student came closer in the {fell[0].split('_')[0]} direction only"
    if fell:
        return "The student came closer to its teacher"
    return "The student moved away from its teacher" if rose else "No change was detected"


def _move(was: Estimate, now: Estimate) -> tuple[float, float]:
    """Return the difference and its standard error."""
    if not (math.isfinite(was.value) and math.isfinite(now.value)):
        same = math.isinf(was.value) and math.isinf(now.value)
        return (0.0 if same else now.value - was.value), 0.0
    return now.value - was.value, math.hypot(was.stderr or 0.0, now.stderr or 0.0)


def _sign(move: tuple[float, float]) -> int:
    difference, error = move
    return 0 if abs(difference) <= _CLEAR * error else 1 if difference > 0 else -1


def _said(word: str, was: Estimate, now: Estimate, move: tuple[float, float], per: str) -> str:
    word = "the cross-entropy, forward KL + H(p)," if now.up_to == "entropy_p" else word
    if not (math.isfinite(was.value) and math.isfinite(now.value)):
        return f"{word} was {was.number} and is {now.number} nats a {per}"
    change = Estimate("change", abs(move[0]), move[1])
    verb = ("hardly moved", "rose", "fell")[_sign(move)]
    by = f", by {change.number}" if _sign(move) else ""
    return f"{word} {verb} from {was.number} to {now.number} nats a {per}{by}"


def _doubts(after: SequenceKL | HeldOutLoss) -> tuple[str, ...]:
    if isinstance(after, HeldOutLoss):
        what = "these are no KLs of sequences" if after.per == "token" else "the KL is estimated by plain Monte Carlo"
        known = f"Of the teacher there is {after.access}: {what}."
        notes = [note for one in (after.forward_kl, after.reverse_kl) if one is not None for note in one.notes]
        return (known, *(as_sentence(note.replace("_kl", " KL")) for note in dict.fromkeys(notes)))
    found = [as_sentence(note) for note in notes_on(after.clusters)]
    if max(after.cut.values()) >= MIN_CUT:
        shares = " and ".join(f"{share:.0%} of the {who}'s" for who, share in after.cut.items())
        found.append(f"{shares} continuations were cut at {after.max_new_tokens} tokens: the KLs of whole ones are larger.")
    for name, word in _WORDS.items():
        if not math.isfinite(getattr(after, name).value):
            found.append(as_sentence(f"{word} is infinite: a token that one model can draw has no chance in the other"))
    length = after.measures.get("length")
    if length is not None and length.difference is not None:
        change, error = length.difference.value, length.difference.stderr or 0.0
        if abs(change) > max(_CLEAR * error, _MIN_LENGTH_CHANGE * length.teacher.value):
            side = "longer" if change > 0 else "shorter"
            tokens = Estimate("length", abs(change), error)
            found.append(f"The student's continuations are {tokens.number} tokens {side} than the teacher's.")
    return tuple(found)
