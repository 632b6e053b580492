"""Asking: on a terminal, `whichkl advise` without a target asks what one can do with it."""

from __future__ import annotations

import sys

from whichkl._checks import InputError, cannot
from whichkl.commands import console
from whichkl.conversions.table import CONVERSIONS

_OTHERWISE = "Run `whichkl advise --access samples,log_prob`, or whatever you can do with the target"


def is_possible() -> bool:
    """Whether somebody can answer: input and messages are a terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def ask() -> tuple[str, str | None]:
    """Ask for the access to the target and, where there is none, for what is left; return both as options have them.

    Raises:
        InputError: the input ended.
    """
    samples = _agrees("Do you have samples of the target, or can you draw them?")
    density = _agrees("Can you evaluate its log density (or an energy), at least up to a constant?")
    access = ",".join(["samples"] * samples + ["log_prob"] * density)
    return (access, None) if access else ("nothing", _chosen())


def _agrees(question: str) -> bool:
    while True:
        answer = _answer(f"{question} [y/n] ").lower()
        if answer in ("y", "yes", "n", "no"):
            return answer.startswith("y")
        console.note("Please answer y or n.")


def _chosen() -> str | None:
    console.note("What do you have of it?")
    for number, one in enumerate(CONVERSIONS, 1):
        console.note(f"  {number}. {one.name}: {one.left}")
    console.note("  0. nothing of these")
    while True:
        answer = _answer(f"[0-{len(CONVERSIONS)}] ").lower()
        if any(one.name == answer for one in CONVERSIONS):
            return answer
        if answer.isdecimal() and int(answer) <= len(CONVERSIONS):
            return CONVERSIONS[int(answer) - 1].name if int(answer) else None
        console.note(f"Please answer with a number from 0 to {len(CONVERSIONS)}, or its word.")


def _answer(question: str) -> str:
    console.ERR.print(question, end="", highlight=False, markup=False, soft_wrap=True)
    line = sys.stdin.readline()
    if not line:
        raise InputError(cannot("ask what you can do with the target", "the input ended", _OTHERWISE))
    return line.strip()
