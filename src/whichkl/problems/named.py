"""Named distributions: 'Normal(0, 1)' or '0.5*Normal(-3,1) + 0.5*Normal(3,1)' → a torch distribution, by a fixed grammar."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributions as laws
from torch.distributions import Categorical, Distribution, MixtureSameFamily

from whichkl._checks import InputError, cannot
from whichkl.process.torch_modes import plain_modes

_ARGUMENTS = {
    "Normal": "mean, sd",
    "Uniform": "low, high",
    "Laplace": "location, scale",
    "Cauchy": "location, scale",
    "StudentT": "df, location, scale",
    "Gumbel": "location, scale",
    "LogNormal": "mean, sd of the logarithm",
    "Exponential": "rate",
    "Gamma": "shape, rate",
    "Beta": "a, b",
    "Poisson": "rate",
    "Bernoulli": "probability",
}
"""Arguments of the distributions of torch that a text can name."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BEGINNING = re.compile(rf"\s*(?:{_NUMBER}\s*\*\s*)?(?:{'|'.join(_ARGUMENTS)}|Categorical)\s*\(")
_TERM = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?([A-Za-z]+)\s*\(([^()]*)\)\s*")


@plain_modes()
def named(text: str) -> Distribution:
    """Read a distribution, or a weighted sum of several of one family; only numbers are evaluated.

    Raises:
        InputError: a name, a number of arguments or an argument isn't right.

    >>> named("Normal(0, 1)")
    Normal(loc: 0.0, scale: 1.0)
    >>> named("0.5*Normal(-3,1) + 0.5*Normal(3,1)").variance
    tensor(10., dtype=torch.float64)
    """
    terms = _terms(text)
    if text.strip().startswith("Categorical"):  # the only one with any number of arguments
        each = terms[0][2]
        if len(terms) > 1 or min(each) < 0 or abs(math.fsum(each) - 1) > 1e-6:
            because = f"its probabilities are {', '.join(f'{one:g}' for one in each)}, with the sum {math.fsum(each):g}"
            raise InputError(cannot(f"read `{text}`", because, "Give probabilities that sum to 1"))
        return _build(text, Categorical, torch.tensor(each, dtype=torch.float64, device="cpu"))
    names = {name for _, name, _ in terms}
    for name in names:
        if name not in _ARGUMENTS:
            known = ", ".join(f"{one}({arguments})" for one, arguments in _ARGUMENTS.items())
            known += ", Categorical(probabilities), or a weighted sum such as 0.5*Normal(-3,1) + 0.5*Normal(3,1)"
            raise InputError(cannot(f"read `{text}`", f"`{name}` isn't a known distribution", f"Choose among {known}"))
    if len(names) > 1:
        raise InputError(cannot(f"read `{text}`", "a sum must be of one family", "Use, say, two Normals"))
    name = names.pop()
    if {len(values) for _, _, values in terms} != {len(_ARGUMENTS[name].split(", "))}:
        raise InputError(cannot(f"read `{text}`", f"it takes {_ARGUMENTS[name]}", "Give these numbers"))
    kind = getattr(laws, name)
    columns = torch.tensor([values for _, _, values in terms], dtype=torch.float64, device="cpu").T
    if len(terms) == 1 and terms[0][0] is None:
        return _build(text, kind, *(column[0] for column in columns))
    weights = torch.tensor([1.0 if weight is None else weight for weight, _, _ in terms], dtype=torch.float64, device="cpu")
    if bool((weights <= 0).any()) or abs(float(weights.sum()) - 1) > 1e-9:
        raise InputError(cannot(f"read `{text}`", f"the weights {weights.tolist()} don't sum to 1", "Correct them"))
    return MixtureSameFamily(Categorical(probs=weights), _build(text, kind, *columns))


def looks_named(text: str) -> bool:
    """Whether a text has the form of a distribution, or begins as one, rather than of a path."""
    return _BEGINNING.match(text) is not None or _TERM.match(text) is not None


def _terms(text: str) -> list[tuple[float | None, str, list[float]]]:
    terms, rest = [], text
    while True:
        match = _TERM.match(rest)
        if match is None:
            raise InputError(cannot(f"read `{text}`", "it isn't a distribution", "Write, say, Normal(0, 1)"))
        weight, name, inside = match.groups()
        parts = [part.strip() for part in inside.split(",")]
        if not all(re.fullmatch(_NUMBER, part) and math.isfinite(float(part)) for part in parts):
            raise InputError(cannot(f"read `{text}`", f"`{inside}` isn't a list of numbers", "Write, say, Normal(0, 1)"))
        terms.append((None if weight is None else float(weight), name, [float(part) for part in parts]))
        rest = rest[match.end() :]
        if not rest:
            return terms
        if not rest.startswith("+"):
            instead = "Write 0.5*Normal(0,1) + 0.5*Normal(3,1)"
            raise InputError(cannot(f"read `{text}`", f"`{rest}` doesn't begin with +", instead))
        rest = rest[1:]


def _build(text: str, kind: Callable[..., Distribution], *arguments: Tensor) -> Distribution:
    try:
        return kind(*arguments, validate_args=True)
    except ValueError as error:
        because = " ".join(str(error).split())[:200]
        raise InputError(cannot(f"read `{text}`", because, "Give arguments in their range")) from error
