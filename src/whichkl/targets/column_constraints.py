"""Column constraints: a support as it is given (a constraint, several, words, a dict) → one torch constraint per column."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from whichkl._checks import InputError, cannot, quoted

Support = Constraint | Sequence[Constraint] | str | None

REALS = (type(constraints.real), type(constraints.real_vector))
_BOUNDED = r"(interval|integer_interval|greater_than|less_than)\(([^(),]+)(?:,([^(),]+))?\)"
_WORDS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "unit_interval": constraints.unit_interval,
    "simplex": constraints.simplex,
    "boolean": constraints.boolean,
}


def parse_support(support: Support) -> tuple[Constraint, ...]:
    """Read a support: a constraint, several, or words such as ``"positive"`` and ``"interval(0, 2)"``.

    Raises:
        InputError: a word isn't known, or its interval is empty.
    """
    if support is None:
        return (constraints.real,)
    if isinstance(support, Constraint):
        return (support,)
    if isinstance(support, (list, tuple)):
        return tuple(part for one in support for part in parse_support(one))
    if not isinstance(support, str):
        because = f"a `{type(support).__name__}` is no support"
        instead = "Give a word such as 'positive', a constraint of torch.distributions.constraints, or a list of one per column"
        raise InputError(cannot("use this `support`", because, instead))
    word = support.strip()
    if word in _WORDS:
        return (_WORDS[word],)
    match = re.fullmatch(_BOUNDED, word)
    bounded = None if match is None else _bounded(*match.groups())
    if bounded is not None:
        return (bounded,)
    known = ", ".join([*_WORDS, "interval(a, b)", "integer_interval(a, b)", "greater_than(a)", "less_than(b)"])
    raise InputError(cannot(f"read the support `{word}`", "it isn't a known one", f"Choose among {known}"))


def read_support(support: Support, dim: int) -> tuple[Constraint, ...]:
    """Return a support of d columns as one constraint, of each column or of the whole row, or as one constraint per column.

    Raises:
        InputError: it has another number of columns, a column of it is empty, or no bijection from ℝᵏ onto it is known.

    >>> read_support(constraints.interval(torch.zeros(2), torch.tensor([1.0, 2.0])), 2)
    (Interval(lower_bound=0.0, upper_bound=1.0), Interval(lower_bound=0.0, upper_bound=2.0))
    """
    parts = parse_support(support)
    parts = (
        constraint_columns(parts[0], dim) if len(parts) == 1 else tuple(one for p in parts for one in constraint_columns(p, 1))
    )
    do = "use this `support`"
    if len(parts) not in (1, dim):
        because = f"{len(parts)} constraints were given for {dim} columns"
        raise InputError(cannot(do, because, "Give one constraint, or one per column"))
    for part in parts:
        if part.event_dim > (len(parts) == 1):
            because = f"{part} constrains {'a whole row' if part.event_dim == 1 else 'a matrix'}, not a column"
            raise InputError(cannot(do, because, "Give one constraint of the whole row, or one of numbers per column"))
        try:
            biject_to(constraints.real if part.is_discrete else part)
        except NotImplementedError as error:
            because = f"there is no bijection from ℝᵏ onto {part}"
            raise InputError(
                cannot(do, because, "Use 'real', 'positive', 'simplex' or bounds; or the support of a law")
            ) from error
    return parts


def constraint_columns(part: Constraint, dim: int) -> tuple[Constraint, ...]:
    """Return a constraint of d columns as it is, or as one per column where it is made of several or its bounds differ.

    The union of the components' supports is that of a mixture.

    Raises:
        InputError: the bounds have another shape, aren't numbers, or have nothing between them.
    """
    event_axes = None
    while (inner := getattr(part, "base_constraint", None)) is not None:
        if isinstance(part, constraints.MixtureSameFamilyConstraint):
            event_axes = part.event_dim
        elif inner.event_dim > 0:
            return (part,)
        part = inner
    if (several := getattr(part, "cseq", None)) is not None:
        lengths = getattr(part, "lengths", [1] * len(several))
        return tuple(own for one, n in zip(several, lengths, strict=True) for own in _repeated(constraint_columns(one, n), n))
    bounds = {name: getattr(part, name) for name in ("lower_bound", "upper_bound") if hasattr(part, name)}
    if not any(isinstance(bound, Tensor) for bound in bounds.values()):
        return (part,)
    ends = torch.broadcast_tensors(*(torch.as_tensor(end, dtype=torch.float64, device="cpu") for end in bounds.values()))
    if event_axes is not None:  # the other axes are the components'
        ends = [end.reshape(-1, *end.shape[end.ndim - event_axes :]) for end in ends]
        ends = [end.amin(0) if name == "lower_bound" else end.amax(0) for name, end in zip(bounds, ends, strict=True)]
    if ends[0].numel() not in (1, dim):
        because = f"its bounds have shape {tuple(ends[0].shape)} for {dim} columns"
        raise InputError(cannot("use this `support`", because, "Give one bound per column"))
    columns = list(zip(*(end.reshape(-1).tolist() for end in ends), strict=True))
    found = [_between(part, dict(zip(bounds, column, strict=True))) for column in columns]
    return tuple(found[:1] if len(set(columns)) == 1 else found)


def _repeated(found: tuple[Constraint, ...], n: int) -> tuple[Constraint, ...]:
    return found * n if len(found) == 1 and found[0].event_dim == 0 else found


def _between(part: Constraint, ends: dict[str, float]) -> Constraint:
    """Return the constraint of one column; an end at infinity is no bound."""
    low, high = ends.get("lower_bound", -math.inf), ends.get("upper_bound", math.inf)
    if not (low < high or (part.is_discrete and low == high)):
        because = f"there is nothing between its ends {low:g} and {high:g}"
        raise InputError(cannot("use this `support`", because, "Give the lower end first, and numbers"))
    finite = [end for end in ends.values() if math.isfinite(end)]
    if len(finite) == len(ends):
        kind: Any = type(part)
        found: Constraint = kind(*map(int, finite)) if part.is_discrete else kind(*finite)
        return found
    if not finite:
        return constraints.real
    return constraints.greater_than_eq(low) if math.isfinite(low) else constraints.less_than(high)


def support_of_columns(support: Support | Mapping[str, Constraint | str], names: Sequence[str]) -> Support:
    """Return a support that is given by the names of columns as one constraint per column; the others are real.

    Raises:
        InputError: there is no column of a name.

    >>> support_of_columns({"tau": "positive"}, ["mu", "tau"])
    (Real(), GreaterThan(lower_bound=0.0))
    """
    if not isinstance(support, Mapping):
        return support
    if absent := [str(name) for name in support if name not in names]:
        because = f"there is no column `{absent[0]}`, but {quoted(names)}"
        raise InputError(cannot("use this `support`", because, "Name columns of the target"))
    return tuple(part for name in names for part in parse_support(support.get(name)))


def _bounded(name: str, *ends: str | None) -> Constraint | None:
    """Return a constraint with bounds; None if they aren't numbers, or if their count is wrong."""
    try:
        numbers = [int(end) if name == "integer_interval" else float(end) for end in ends if end is not None]
        constraint: Constraint = getattr(constraints, name)(*numbers)
    except (TypeError, ValueError):
        return None
    if len(numbers) == 2 and (numbers[0] > numbers[1] or (name == "interval" and numbers[0] == numbers[1])):
        because = "there is nothing between its ends"
        raise InputError(cannot(f"read the support `{name}({ends[0]},{ends[1]})`", because, "Give the lower end first"))
    return constraint


def levels_of(parts: Sequence[Constraint], dim: int) -> tuple[tuple[int, int], ...] | None:
    """Return the smallest and the largest value per column of a discrete support; None for a continuous one."""
    if not any(part.is_discrete for part in parts):
        return None
    if not all(part.is_discrete for part in parts):
        because = "some columns are discrete and others aren't, and no family has both"
        raise InputError(cannot("use this `support`", because, "Sum or integrate one kind out of `log_prob`"))
    ends = []
    for part in parts:
        low, high = (0, 1) if part is constraints.boolean else (getattr(part, f"{end}_bound", None) for end in ("lower", "upper"))
        if part.event_dim > 0 or low is None or high is None:
            because = f"{part} isn't a finite range of whole numbers per column"
            raise InputError(cannot("use this discrete `support`", because, "Use 'boolean', or 'integer_interval(0, K - 1)'"))
        ends.append((int(low), int(high)))
    return tuple(ends) * (dim if len(ends) == 1 else 1)


def describe_constraint(part: Constraint) -> str:
    """Return a constraint as a word or bounds, as `parse_support` reads it."""
    for word, known in _WORDS.items():
        if part is known or (word == "real" and isinstance(part, REALS)):
            return word
    bounds = [getattr(part, name) for name in ("lower_bound", "upper_bound") if hasattr(part, name)]
    if part.is_discrete and len(bounds) == 2:
        return f"integer_interval({', '.join(str(int(bound)) for bound in bounds)})"
    name = {2: "interval", 1: "greater_than" if hasattr(part, "lower_bound") else "less_than"}.get(len(bounds))
    if name is None:
        because = f"a file can't hold the constraint {part}"
        raise InputError(cannot("save this support", because, "Use real, positive, simplex or bounds"))
    return f"{name}({', '.join(str(float(bound)) for bound in bounds)})"
