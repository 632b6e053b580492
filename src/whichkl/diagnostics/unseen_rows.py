"""Unseen rows: which rows of p a fit leaves out, and models that were fitted without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError
from whichkl.chains import folds_in_time, stretches
from whichkl.diagnostics.models import carried
from whichkl.families import Family, NetworkFamily
from whichkl.families.family import cast, log_likelihood
from whichkl.samples import Block
from whichkl.samples.repeats import row_keys
from whichkl.solvers import Solution, Solver
from whichkl.solvers.rows.rows import HELD
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

FOLDS = 10
MAX_ROWS_FOR_ALL_FOLDS = 2_000
"""Largest number of rows for ten folds; above, five folds, and neighbouring families are compared on one of them."""
MAX_ROWS_FOR_CROSS_FITTING = 10_000
"""Largest number of rows for cross-fitting; above, rows are held out once."""
_MIN_ROWS_TO_HOLD_OUT = 20
_MAX_STRIDE = 32_768


def stride_of(target: Target, solver: Solver) -> int:
    """Return s if the solver holds out every s-th row; 0 if fresh draws or cross-fitting are used instead."""
    if target.chains is not None and target.sampler is None and solver.holds_chains:
        return FOLDS // 2
    if target.sampler is not None or target.chains is not None:
        return 0
    rows = len(target.samples) if target.samples is not None else target.stream.about if target.stream is not None else 0
    if target.samples is not None and solver.refits and rows <= MAX_ROWS_FOR_CROSS_FITTING:
        return 0
    return min(max(5, rows // HELD), _MAX_STRIDE) if rows >= _MIN_ROWS_TO_HOLD_OUT else 0


def unseen(target: Target, family: Family, solver: Solver, solution: Solution, seed: int) -> tuple[Block, Any] | None:
    """Return rows of the target, and a model in its support that was fitted without them; None if the rows are too few."""
    if solution.held is not None:
        held = solution.held
        x = target.bijection.forward(held.block.x) if family.carried else held.block.x
        block = _distinct(target, Block(x, held.block.w, held.block.context))
        return block, carried(held.model, target.bijection) if family.carried else held.model
    if target.samples is None:
        return None
    folds = _folds(target, len(target.samples), seed)
    rows = torch.cat(folds[: max(1, len(folds) // 5)])
    models = _refits_without(target, [rows], family, solver, seed)
    if models is None:
        return None
    w = torch.ones(len(rows), dtype=torch.float64, device="cpu") if target.weights is None else target.weights[rows]
    context = None if target.context is None else target.context[rows]
    return _distinct(target, Block(samples_of(target)[rows], w.to(torch.float64), context)), models[0]


def cross_fitted_losses(
    target: Target, family: Family, solver: Solver, seed: int, most: int | None = None
) -> tuple[Tensor, Float[Tensor, " m"], str] | None:
    """Return −log q of rows under models fitted without them; None if the rows are too few.

    Up to 2,000 rows there are ten folds, up to 10,000 five (at most `most`); above, one fifth of the rows is held out once. Folds
    are random rows; folds of chains are stretches in time.

    Returns:
        The numbers of the rows, their losses, and the scheme in words.
    """
    x, n = samples_of(target), len(samples_of(target))
    folds = _folds(target, n, seed)[:most]
    models = _refits_without(target, folds, family, solver, seed)
    if models is None:
        return None
    contexts = [None if target.context is None else target.context[fold] for fold in folds]
    losses = [-log_likelihood(*one).detach() for one in zip(models, (x[fold] for fold in folds), contexts, strict=True)]
    how = f"{len(folds)}-fold cross-fitting, {n} rows" if len(folds) > 1 else f"{len(folds[0]):,} rows held out"
    how += "" if target.repeats is None else f", {target.repeats.count:,} distinct in all"
    order, loss = torch.cat(folds), torch.cat(losses)
    if target.chains is None:
        return order, loss, how
    in_time = order.argsort()
    return order[in_time], loss[in_time], how


def refit(target: Target, family: Family, solver: Solver, seed: int, work: Work = QUIET) -> Any:
    """Fit without judging: the model in the target's coordinates; None if the rows don't allow it."""
    free = target.unconstrained() if family.carried else target
    try:
        if free.samples is not None:
            family.check_samples(free.samples, target.names)
        return _brought_back(target, family, solver.quick().solve(free, family, seed, work).best.model)
    except InputError:
        return None


def _refits_without(target: Target, left_out: Sequence[Tensor], family: Family, solver: Solver, seed: int) -> list[Any] | None:
    """Fit without each of several sets of rows; None if the others don't allow it."""
    free = target.unconstrained() if family.carried else target
    x = samples_of(free)
    try:
        for rows in left_out:  # each: a column may be constant without one of them
            keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
            keep[rows] = False
            family.check_samples(x[keep], target.names)
        models = solver.quick().solve_without(free, family, left_out, seed)
    except InputError:
        return None
    return [_brought_back(target, family, model) for model in models]


def _brought_back(target: Target, family: Family, model: Any) -> Any:
    """Carry a model of free coordinates to the target's device and coordinates."""
    if target.device.type != "cpu" and not isinstance(family, NetworkFamily):
        model = cast(family, model, torch.float64, target.device)
    return carried(model, target.bijection) if family.carried else model


def samples_of(target: Target) -> Tensor:
    """Return the rows in memory in float64."""
    if target.samples is None:
        raise TypeError("no samples")
    return target.samples.to(torch.float64)


def _distinct(target: Target, block: Block) -> Block:
    """Merge equal rows into one row with the sum of their weights, since tests take rows as independent."""
    if target.repeats is None:
        return block
    _, number = row_keys(block.x, block.context).unique(return_inverse=True)
    count = int(number.max()) + 1
    first = torch.full((count,), len(block), dtype=torch.int64, device=number.device)
    first = first.scatter_reduce(0, number, torch.arange(len(block), device=number.device), "amin")
    w = torch.zeros(count, dtype=block.w.dtype, device=block.w.device).index_add(0, number, block.w)
    return replace(block.take(first), w=w)


def _folds(target: Target, n: int, seed: int) -> list[Tensor]:
    """Rows to hold out: random rows, with equal rows together; stretches of chains, since neighbours in time are dependent."""
    is_cross_fitted = n <= MAX_ROWS_FOR_CROSS_FITTING
    count = FOLDS if n <= MAX_ROWS_FOR_ALL_FOLDS else FOLDS // 2
    if target.repeats is not None:
        return target.repeats.folds(count, seed)[: None if is_cross_fitted else 1]
    if target.chains is None:
        shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu").to(samples_of(target).device)
        return [*shuffled.tensor_split(min(count, n))] if is_cross_fitted else [shuffled[: n // 5]]
    folds = folds_in_time(stretches(target.chains), FOLDS if is_cross_fitted else FOLDS // 2)
    return folds if is_cross_fitted else folds[-1:]
