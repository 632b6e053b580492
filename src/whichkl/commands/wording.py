"""Wording: what the library names in Python, and what can be typed on the command line."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping

from whichkl._checks import WhichklError

_FOR_SHELL = {
    "Look at `fit.diagnostics.optima`, and at": "Look at the optima in `--json`, and at",
    " (`fit.diagnostics.missing_modes`)": "",
    "`fit.diagnostics.notes` has the diagnostic and the error": "the lines above have the diagnostic and the error",
    "Raise `max_nodes` of the solver, or use": "Use",
    "(`solver=` with more iterations, steps or epochs)": "(in Python, by `solver=`)",
    "Use `fit.expect(f)`, which moves": "In Python, use `fit.expect(f)`, which moves",
    "Use the covariance of `fit.linear_response()`, or": "In Python, use the covariance of `fit.linear_response()`, or",
    "`print(target)` reports why": "the value's note above reports why",
}
"""Sentences of fits that name what is typed in Python, and what they are in a shell."""
_FOR_ORIGINS = {
    "`target.origin.unlikeness(x)` is a p-value that tells if an observation x is unlike all simulations.": "In Python, "
    "`wk.convert(wk.Simulations(…)).origin.unlikeness(x)` is a p-value that tells if an observation x is unlike all simulations.",
    "can be trusted: `fit.diagnostics.calibration`.": "can be trusted: every fit reports it.",
    " Fit `Flow()` or another network, which learns from all of them; a fit of another family is unreliable.": " A fit to a file "
    "of them is unreliable. In Python, `Flow()` and other networks learn from all of them.",
}
"""The same in the origin of a file, which has neither the prior nor the proposal of simulations."""
_USAGE = {
    r"Input should be a valid integer.*": "It isn't a whole number.",
    r"Input should be a valid number.*": "It isn't a number.",
    r"Input should be greater than or equal to (.*)": r"It isn't at least \1.",
}
"""What is wrong with an option's value, in words."""
_OPTIONS = {
    "support": "--support",
    "log_prob": "--log-prob",
    "weights": "--weights",
    "log_weights": "--log-weights",
    "drop": "--drop",
}
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\{[^}]*\}|[\w.:+-]+"


def in_words(message: str) -> str:
    """Return what is wrong with an option's value, in words.

    >>> in_words("Input should be a valid integer, unable to parse string as an integer")
    "It isn't a whole number."
    """
    for pattern, words in _USAGE.items():
        message = re.sub(pattern, words, message)
    return message


def of_file(sentence: str) -> str:
    """Return a sentence of an origin as it holds for a file of the samples, and for the command line."""
    for python, shell in _FOR_ORIGINS.items():
        sentence = sentence.replace(python, shell)
    return sentence


def typed_in_shell(text: str) -> str:
    """Return the text of a fit with options of the command line in place of Python's arguments."""
    for python, shell in _FOR_SHELL.items():
        text = re.sub(re.escape(python).replace("\\ ", r"\s+"), shell, text)  # sentences are wrapped
    head, _, rest = with_options(text, _OPTIONS).partition("\n")
    return f"{head}\n{_with_families(rest)}"


def _with_families(text: str) -> str:
    """Write families that Python makes, `Mixture(2)`, as options."""
    from whichkl.families.named import name_in

    def option(found: re.Match[str]) -> str:
        name = name_in(" ".join(found[0].split()))
        return found[0] if name is None else f"`--family {name}`"

    return re.sub(r"`?\b[A-Z]\w+\([^()]*\)`?", option, text)


@contextlib.contextmanager
def in_options(options: Mapping[str, str]) -> Iterator[None]:
    """Write the errors of a block with these options in place of Python's arguments, and families as `--family` takes them."""
    try:
        yield
    except WhichklError as error:
        said = with_options(str(error), options)
        if "family" in options and "torch" in sys.modules:  # else there was no family yet
            said = _with_families(said).replace(" of whichkl.families", "")
        error.args = (said, *error.args[1:])
        raise


def with_options(text: str, options: Mapping[str, str]) -> str:
    """Return a message with a command's options in place of Python's arguments of the same names.

    >>> with_options("Pass `Target(samples=…, drop=['a', 'b'], missing='drop')`.", {"drop": "--drop", "missing": "--missing"})
    'Pass `--drop a --drop b --missing drop`.'
    >>> with_options("Cannot use `dim=0`: … Correct `support=`, or `names=`.", {"dim": "--dim", "support": "--support"})
    'Cannot use `--dim 0`: … Correct `--support`, or `names=`.'
    >>> with_options("support={'a': 'positive', 'b': 'unit_interval'} keeps it inside", {"support": "--support"})
    '--support a=positive --support b=unit_interval keeps it inside'
    """
    names = "|".join(sorted(options, key=len, reverse=True))
    if not names:
        return text

    def one(found: re.Match[str]) -> str:
        given = re.sub(r"(['\"]): (['\"])", "=", found[2] or "")  # a value per column, a dict in Python
        values = re.findall(r"[^'\",\s][^'\",]*", given.strip("[]{}")) or [""]
        return " ".join(f"{options[found[1]]} {value}".strip() for value in values)

    text = re.sub(rf"Target\(samples=…,\s+((?:(?:{names})=(?:{_VALUE})(?:, )?)+)\)", r"\1", text)
    text = re.sub(rf"(?:(?<=`)|\b(?=\w\w))({names})=({_VALUE})?(?=\W|$)", one, text)  # `q=` may be a formula elsewhere
    return re.sub(r"(--[\w-]+ [^\s`]+), (?=--)", r"\1 ", text)
