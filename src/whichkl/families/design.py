"""Design: the columns of x that a conditional family is given, and whether they determine its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent

from whichkl.arrays import default_names
from whichkl.families.family import Family
from whichkl.families.field_checks import dependent_columns, quoted


def check_context(family: Family, context: Tensor | None) -> Tensor:
    """Return the rows of x; refuse samples without them."""
    if context is None:
        family.refuse("it models y given x, and there is no x", "Pass `samples=(x, y)`")
    return context


def as_column(law: Any) -> Distribution:
    """Return the law of the same numbers as a column: batch shape (n,), event shape (1,)."""
    names = [name for name in ("loc", "scale", "rate", "logits") if name in law.arg_constraints]
    parts = {name: getattr(law, name) for name in names}
    wide = {name: value[:, None, :] if isinstance(law, Categorical) else value[:, None] for name, value in parts.items()}
    return Independent(type(law)(**wide, validate_args=False), 1, validate_args=False)


def column_flag(is_column: bool) -> dict[str, Tensor]:
    """Return the parameter by which a model remembers that y came as (n, 1)."""
    return {"column": torch.tensor(1, dtype=torch.int64, device="cpu")} if is_column else {}


def context_names(names: Sequence[str], count: int) -> list[str]:
    """Return the names of x's columns, x1, x2, … where they aren't given."""
    return list(names) if len(names) == count else list(default_names(count))


def refuse_degenerate(family: Family, covariance: Float[Tensor, "c c"], names: Sequence[str], *, dependent: bool = True) -> None:
    """Refuse columns of x that aren't finite, that are constant as the intercept is, or that depend on each other."""
    variance = covariance.diagonal()
    if not bool(covariance.isfinite().all()):
        which = quoted(names, ~variance.isfinite())
        family.refuse(f"column {which} of x holds NaN or infinities", "Drop or repair those rows first")
    if bool((variance <= 0).any()):
        family.refuse(f"column {quoted(names, variance <= 0)} of x is constant, as the intercept is", "Drop it")
    if dependent and len(covariance) and bool((involved := dependent_columns(covariance)).any()):
        because = f"the columns {quoted(names, involved)} of x are linearly dependent, so their weights aren't determined"
        family.refuse(because, "Drop one of them")
