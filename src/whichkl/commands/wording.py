"""Wording: what the library names in Python, and what can be typed on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping

_FOR_FINDINGS = {
    "Look at `fit.diagnostics.optima`, and at": "Look at the optima in `--json`, and at",
    " (`fit.diagnostics.missing_modes`)": "",
    "`fit.diagnostics.notes` has the diagnostic and the error": "the lines above have the diagnostic and the error",
    "Raise `max_nodes` of the solver, or use": "Use",
    "(`solver=` with more iterations, steps or epochs)": "(in Python, by `solver=`)",
    "Use `fit.expect(f)`, which moves": "In Python, use `fit.expect(f)`, which moves",
    "Use the covariance of `fit.linear_response()`, or": "In Python, use the covariance of `fit.linear_response()`, or",
}
_OPTIONS = {"support": "--support", "log_prob": "--log-prob"}
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[\w.:+-]+"


def typed_in_shell(text: str) -> str:
    """Return the text of a fit with options of the command line in place of Python's arguments."""
    from whichkl.families.named import name_in

    for python, shell in _FOR_FINDINGS.items():
        text = re.sub(re.escape(python).replace("\\ ", r"\s+"), shell, text)  # sentences are wrapped
    head, _, rest = with_options(text, _OPTIONS).partition("\n")

    def option(found: re.Match[str]) -> str:
        name = name_in(" ".join(found[0].split()))
        return found[0] if name is None else f"`--family {name}`"

    return "\n".join([head, re.sub(r"`?\b[A-Z]\w+\([^()]*\)`?", option, rest)])


def with_options(text: str, options: Mapping[str, str]) -> str:
    """Return a message with a command's options in place of Python's arguments of the same names.

    >>> with_options("Pass `Target(samples=…, drop=['a', 'b'], missing='drop')`.", {"drop": "--drop", "missing": "--missing"})
    'Pass `--drop a --drop b --missing drop`.'
    >>> with_options("Cannot use `dim=0`: … Correct `support=`, or `names=`.", {"dim": "--dim", "support": "--support"})
    'Cannot use `--dim 0`: … Correct `--support`, or `names=`.'
    """
    names = "|".join(sorted(options, key=len, reverse=True))
    if not names:
        return text

    def one(found: re.Match[str]) -> str:
        values = re.findall(r"[^'\",\s][^'\",]*", (found[2] or "").strip("[]")) or [""]
        return " ".join(f"{options[found[1]]} {value}".strip() for value in values)

    text = re.sub(rf"Target\(samples=…, ((?:(?:{names})=(?:{_VALUE})(?:, )?)+)\)", r"\1", text)
    text = re.sub(rf"(?:(?<=`)|\b(?=\w\w))({names})=({_VALUE})?(?=\W|$)", one, text)  # `q=` may be a formula elsewhere
    return re.sub(r"(--[\w-]+ [^\s`]+), (?=--)", r"\1 ", text)
