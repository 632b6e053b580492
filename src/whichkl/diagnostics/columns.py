"""Columns: whether they are correlated though a family treats them as independent, bounded though a model isn't, or an index."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.diagnostics.result import Diagnostics
from whichkl.distributions import draws_of
from whichkl.families import Family, has_independent_columns, richer
from whichkl.importance import effective_sample_size
from whichkl.process.seeds import seeded
from whichkl.solvers import Solution
from whichkl.targets import Target

_DRAWS = 2_000
_MIN_ESS = 100
_MIN_MASS = 0.01
"""Least mass of the model beyond an end that is noted."""
_MIN_ROWS = 20
_MAX_NAMED_COLUMNS = 5


def next_richer(family: Family, diagnostics: Diagnostics) -> Family | None:
    """Return the next richer family: one with correlations before one with components, unless optima are separate."""
    return richer(family, correlated=bool(diagnostics.correlated) and diagnostics.separate == 1)


def rows_are_correlated(target: Target, family: Family, solution: Solution, seed: int) -> bool | None:
    """Decide by draws of p, in the coordinates of the family; None if the family has correlations of its own."""
    if not has_independent_columns(family):
        return None
    if solution.held is not None:
        return are_correlated(solution.held.block.x, solution.held.block.w)
    free = target.unconstrained() if family.carried else target
    few = free.thinned()[0]
    return are_correlated(few.draws(_DRAWS, seed + 4) if few.samples is None else few.samples, few.weights)


def weights_are_correlated(
    target: Target, family: Family, x: Float[Tensor, "n d"], log_weight: Float[Tensor, " n"]
) -> bool | None:
    """Decide by draws of q, reweighted to p; if the ESS is too small, a full covariance is the next family to try."""
    if not has_independent_columns(family):
        return None
    if effective_sample_size(log_weight) < _MIN_ESS:
        return x.shape[1] > 1
    return are_correlated(target.bijection.inverse(x) if family.carried else x, (log_weight - log_weight.max()).exp())


def are_correlated(x: Float[Tensor, "n d"], w: Float[Tensor, " n"] | None = None) -> bool:
    """Return whether a full Gaussian has a better BIC than a diagonal one: −n/2 · log|R| > d (d − 1)/4 · log n.

    With weights w of the rows, n is the effective number of rows, (Σw)²/Σw².

    Source: Schwarz (1978).

    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> are_correlated(x), are_correlated(x @ torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64))
    (False, True)
    """
    x, dim = x.detach().to(torch.float64), x.shape[1]
    w = torch.ones_like(x[:, 0]) if w is None else w.to(x)
    n = float(w.sum().square() / w.square().sum())
    if dim < 2 or not n > dim + 1:
        return False
    w = w / w.sum()
    centred = x - w @ x
    covariance = (w[:, None] * centred).T @ centred
    sd = covariance.diagonal().sqrt()
    if not bool((sd > 0).all()) or not bool(covariance.isfinite().all()):
        return False
    gain = -n / 2 * float(torch.linalg.slogdet(covariance / torch.outer(sd, sd))[1])
    return gain > dim * (dim - 1) / 4 * math.log(n)


def beyond_the_ends(target: Target, model: Any, seed: int) -> tuple[str, ...]:
    """Name the columns that look bounded, with the model's mass beyond the end; none if `support=` was given.

    The support of p isn't guessed: a model is carried onto a support only if it was given.
    """
    x = target.samples
    if x is None or target.context is not None or not target.bijection.is_real or len(x) < _MIN_ROWS:
        return ()
    if not isinstance(model, Distribution):
        return ()
    maybe = x[:_MIN_ROWS].amin(0) > 0  # most columns have both signs within a few rows
    if not bool(maybe.any()):
        return ()
    least, largest = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    least[maybe], largest[maybe] = x[:, maybe].aminmax(dim=0)
    with seeded(seed), torch.no_grad():
        draws = draws_of(model, torch.Size((_DRAWS,))).reshape(_DRAWS, -1).to(x)
    is_above, is_between = least > 0, (least > 0) & (largest < 1)
    cases = (  # a column within (0, 1) is in the second case alone
        (is_above & (largest > 1), draws <= 0, "above 0", "positive"),
        (is_between, (draws <= 0) | (draws >= 1), "between 0 and 1", "unit_interval"),
    )
    notes = []
    for is_bounded, is_beyond, where, support in cases:
        beyond = is_beyond.double().mean(0)
        columns = (is_bounded & (beyond > _MIN_MASS)).nonzero().flatten().tolist()
        if columns:
            shown = ", ".join(f"`{target.names[i]}` ({float(beyond[i]):.0%})" for i in columns[:_MAX_NAMED_COLUMNS])
            shown += f" and {len(columns) - _MAX_NAMED_COLUMNS} more" if len(columns) > _MAX_NAMED_COLUMNS else ""
            each = {target.names[i]: support for i in columns[:_MAX_NAMED_COLUMNS]}
            given = support if len(columns) == x.shape[1] else each  # of all columns, or of some
            share = f"with this share of the model beyond: support={given!r} keeps it inside"
            notes.append(f"every row lies {where} in {shown}, {share}")
    return tuple(notes)


def like_an_index(target: Target) -> tuple[str, ...]:
    """Name the columns whose whole numbers rise with every row, as the number of a row does; it drives scores, and isn't data."""
    x = target.samples
    if x is None or len(x) < _MIN_ROWS or target.repeats is not None:
        return ()
    rises = torch.arange(x.shape[1], device=x.device)
    for some in (x[:_MIN_ROWS], x):  # most columns fall within a few rows
        ahead, behind = some[1:, rises], some[:-1, rises]
        rises = rises[((ahead > behind) & (ahead == ahead.round())).all(0)]
    found = [f"`{target.names[int(i)]}`" for i in rises[:_MAX_NAMED_COLUMNS]]
    why = "whole numbers that rise with every row, as an index does; drop the column unless it is data"
    return (f"{', '.join(found)}: {why}",) if found else ()
