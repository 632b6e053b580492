"""Category tables: probabilities of independent columns of categories, as starts, models and optima; and log p of states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.families import Categorical, Family, Product
from whichkl.families.columns import codes
from whichkl.solvers.solver import Optimum
from whichkl.targets import Target

_KINDS = {"bernoulli", "categorical"}
_MAX_DIFFERENCE = 0.02
"""Tables whose probabilities differ by at most this are one optimum."""
_MAX_NUMBERS_PER_CALL = 1 << 22
"""Largest number of floats in the points of one call of the target."""


def is_table(family: Family) -> bool:
    """Return whether a family is one of independent columns of categories, or of one such column."""
    if isinstance(family, Product):
        margins = (family.margins,) if isinstance(family.margins, str) else family.margins or ()
        return bool(margins) and set(margins) <= _KINDS
    return isinstance(family, Categorical)


def categories_for(target: Target, family: Family) -> tuple[int, ...]:
    """Return the number of categories of each column of the target; the family must allow them.

    Raises:
        TargetError: the target isn't declared to be discrete, or its categories aren't counted from 0.
        InputError: the family has other columns.
    """
    levels = target.bijection.levels
    if levels is None:
        because = "its support isn't declared to be discrete"
        instead = "Pass support='boolean' or 'integer_interval(0, K - 1)'"
        raise TargetError(cannot(f"fit `{family}` to this target", because, instead))
    if refused := not_counted_from_zero(target):
        raise TargetError(cannot(f"fit `{family}` to this target", *refused))
    counts = tuple(high + 1 for _, high in levels)
    if isinstance(family, Categorical):
        if len(counts) > 1:
            because = f"there are {len(counts)} columns, and `Categorical` is a table of one"
            raise InputError(cannot(f"fit `{family}`", because, "Use Product('categorical'), or Autoregressive()"))
        _refuse_other(family, [family.categories], counts)
    if isinstance(family, Product):
        named = zip(_margins(family, len(counts)), family.categories or (None,) * len(counts), strict=True)
        said = [2 if margin == "bernoulli" else count for margin, count in named]
        _refuse_other(family, said, counts)
    return counts


def not_counted_from_zero(target: Target) -> tuple[str, str] | None:
    """Return why whole numbers can't be categories, and what to do; None if they can, or if there are none."""
    starts = [low for low, _ in target.bijection.levels or () if low != 0]
    if not starts:
        return None
    instead = "Declare 'integer_interval(0, K - 1)', and add the least value to x inside your own function"
    return f"its whole numbers begin at {starts[0]}, and categories are counted from 0", instead


def log_prob_of_states(target: Target, x: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Return log p of states in float64, evaluated in blocks of bounded size."""
    parts = x.reshape(-1, x.shape[-1]).split(max(1, _MAX_NUMBERS_PER_CALL // x.shape[-1]))
    value = [target.log_prob(one.to(target.device, target.dtype)).detach().cpu().to(torch.float64) for one in parts]
    return torch.cat(value).reshape(x.shape[:-1])


def model_of(family: Family, logs: Sequence[Float[Tensor, " k"]]) -> Any:
    """Return the model whose columns have these log probabilities."""
    if isinstance(family, Categorical):
        return family.model({"probs": logs[0].exp()})
    if not isinstance(family, Product):
        raise TypeError(family)
    margins = enumerate(zip(_margins(family, len(logs)), logs, strict=True))
    return family.model(
        {
            f"{i}.{margin}.probs": log[1].exp() if margin == "bernoulli" else codes(log.exp()).logits.exp()
            for i, (margin, log) in margins
        }
    )


def distinct_tables(
    family: Family, ends: Sequence[tuple[float, Sequence[Float[Tensor, " k"]], bool]], tie: float = 1e-6
) -> tuple[Optimum, ...]:
    """Sort ends (loss, log probabilities of each column, converged) by loss, and drop those that repeat a better one.

    Two ends are the same if no probability differs by more than 0.02.
    """
    kept: list[tuple[float, Sequence[Tensor], bool]] = []
    for one in sorted(ends, key=lambda end: (round(end[0], 9), [float(log[0]) for log in end[1]])):
        apart = [max(float((x.exp() - y.exp()).abs().max()) for x, y in zip(one[1], other[1], strict=True)) for other in kept]
        if min(apart, default=math.inf) > _MAX_DIFFERENCE:
            kept.append(one)
    best = kept[0][0]
    return tuple(Optimum(model_of(family, logs), loss, done, loss - best <= tie) for loss, logs, done in kept)


def _margins(family: Product, dim: int) -> tuple[str, ...]:
    margins = (family.margins,) * dim if isinstance(family.margins, str) else family.margins or ()
    if len(margins) != dim:
        because = f"it names {len(margins)} margins, and there are {dim} columns"
        raise InputError(cannot(f"use `{family}`", because, "Name one margin per column, or one for all"))
    return margins


def _refuse_other(family: Family, said: Sequence[int | None], counts: Sequence[int]) -> None:
    for i, (mine, found) in enumerate(zip(said, counts, strict=True)):
        if mine is not None and mine != found:
            because = f"column {i + 1} has {mine} categories in the family and {found} in the target's support"
            raise InputError(cannot(f"fit `{family}` to this target", because, "Correct `categories=` or `support=`"))
