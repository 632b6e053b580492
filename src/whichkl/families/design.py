"""Design: the columns x that a conditional family is given, and whether they determine its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent

from whichkl._checks import InputError, cannot
from whichkl.families.family import Family

_DEPENDENT = 1e-12


def check_context(family: Family, context: Tensor | None) -> Tensor:
    """Return the rows of x.

    Raises:
        InputError: there are none.
    """
    if context is None:
        raise InputError(cannot(f"fit `{family}`", "it models y given x, and there is no x", "Pass `samples=(x, y)`"))
    return context


def as_column(law: Any) -> Distribution:
    """Return the law of the same numbers as a column: batch shape (n,), event shape (1,)."""
    names = [name for name in ("loc", "scale", "rate", "logits") if name in law.arg_constraints]
    parts = {name: getattr(law, name) for name in names}
    wide = {name: value[:, None, :] if isinstance(law, Categorical) else value[:, None] for name, value in parts.items()}
    return Independent(type(law)(**wide, validate_args=False), 1, validate_args=False)


def context_names(names: Sequence[str], count: int) -> list[str]:
    """Return the names of x's columns, x1, x2, … where they aren't given."""
    return list(names) if len(names) == count else [f"x{i + 1}" for i in range(count)]


def refuse_degenerate(family: Family, covariance: Float[Tensor, "c c"], names: Sequence[str], *, dependent: bool = True) -> None:
    """Refuse columns x that aren't finite or are constant, which the intercept stands for, and such as depend on each other.

    Raises:
        InputError: there are any; the message names them.
    """
    if not bool(covariance.isfinite().all()):
        which = ", ".join(f"`{names[i]}`" for i in (~covariance.diagonal().isfinite()).nonzero().flatten().tolist())
        because = f"column {which} of x holds NaN or infinities"
        raise InputError(cannot(f"fit `{family}`", because, "Drop or repair those rows first"))
    constant = (covariance.diagonal() <= 0).nonzero().flatten().tolist()
    if constant:
        which = ", ".join(f"`{names[i]}`" for i in constant)
        because = f"column {which} of x is constant, and the intercept stands for it"
        raise InputError(cannot(f"fit `{family}`", because, "Drop it"))
    if not dependent or len(covariance) == 0:
        return
    sd = covariance.diagonal().sqrt()
    eigenvalues, vectors = torch.linalg.eigh(covariance / torch.outer(sd, sd))
    if float(eigenvalues[0]) < _DEPENDENT * float(eigenvalues[-1]):
        involved = (vectors[:, 0].abs() > 1e-3).nonzero().flatten().tolist()
        which = ", ".join(f"`{names[i]}`" for i in involved)
        because = f"the columns {which} of x are linearly dependent, so their weights aren't determined"
        raise InputError(cannot(f"fit `{family}`", because, "Drop one of them"))
