"""Resolve: what a family leaves to the data, its margins or the number of components of a mixture."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.chains import chains_of, folds_in_time, standard_error
from whichkl.divergences import Estimate
from whichkl.divergences.draws import monte_carlo
from whichkl.families import Family, Mixture
from whichkl.families.family import log_likelihood
from whichkl.files.journal import tensors_behind
from whichkl.samples import Block
from whichkl.samples.repeats import repeats_of
from whichkl.samples.stream import slices
from whichkl.solvers.rows.em import ExpectationMaximization
from whichkl.solvers.rows.rows import Rows, rows_of, thinned
from whichkl.solvers.work import Work
from whichkl.targets import Target

_MAX_ROWS = 20_000
"""Largest number of rows on which the number of components is chosen."""
_FOLDS, _MAX_ROWS_OF_FOLDS = 5, 3_000
"""Number of folds, and the largest number of rows that are cross-fitted; of more, a third is held out once."""
_MAX_COMPONENTS = 64
_PATIENCE = 3
"""The search ends after this many larger numbers in a row that are no better."""

Curve = tuple[tuple[int, Estimate], ...]
"""Numbers of components with the held-out cross-entropy of each."""


def resolve(target: Target, family: Family, seed: int, work: Work) -> tuple[Family, Curve | None, tuple[str, ...]]:
    """Return the family to fit, the held-out curve that chose its number of components, and what was inferred."""
    if isinstance(family, Mixture) and family.components == "auto":
        return choose_components(target, family, seed, work)
    inferred: Any = getattr(family, "resolve", None)
    x = target.samples if target.samples is not None else None if target.stream is None else target.stream.first.x
    if inferred is None or x is None:
        return family, None, ()
    explicit, note = inferred(x, target.names, whole=target.samples is not None)
    return explicit, None, (note,) if note else ()


def choose_components(target: Target, family: Mixture, seed: int, work: Work) -> tuple[Mixture, Curve, tuple[str, ...]]:
    """Cross-fit mixtures of 1, 2, 3, … components until three in a row are no better; keep the smallest that is as good.

    A number is as good as the best if it is within one standard error of the paired difference, the one-standard-error rule of
    Breiman et al. (1984). Up to 3,000 rows are cross-fitted in five folds; of more rows, at most 20,000 spread evenly, a third is
    held out once. Chains are cross-fitted in five folds, each a stretch of time, and errors count effective draws. Every number
    is judged on the same rows.

    Raises:
        InputError: one component can't be fitted, as where there are too few rows.
        TargetError: the target has no samples.
    """
    if not target.access.can_sample:
        because = "the number of components is chosen on held-out samples, and the target has none"
        raise TargetError(cannot(f"use `{family}` here", because, "Give a number, say Mixture(3)"))
    block, _ = thinned(rows_of(target.unconstrained(), seed, work.workers), _MAX_ROWS)
    stretch = None if target.chains is None else block.keys
    repeats = repeats_of(block.x) if stretch is None else None
    is_small = len(block) <= _MAX_ROWS_OF_FOLDS or stretch is not None
    if stretch is not None:
        folds = folds_in_time(stretch, _FOLDS)
    elif repeats is not None:
        folds = repeats.folds(_FOLDS if is_small else 3, seed)
    else:
        shuffled = torch.randperm(len(block), generator=torch.Generator().manual_seed(seed), device="cpu")
        folds = [*shuffled.tensor_split(min(_FOLDS, len(block)))] if is_small else [shuffled[: len(block) // 3]]
    folds = folds if is_small else folds[:1]
    order = torch.cat(folds)
    groups = None if repeats is None else repeats.group[order]
    w = block.w[order] / block.w[order].sum()
    losses: dict[int, Tensor] = {}
    best, count, worse = 0, 1, 0
    while count <= _MAX_COMPONENTS and worse < _PATIENCE:
        work.tell(f"trying {count} component{'s' * (count > 1)}", math.nan)
        try:
            loss = _cross_fitted(block, folds, replace(family, components=count), target, seed, work, count)
        except InputError as error:
            if count > 1:
                break
            because = f"one component can't be fitted in {len(folds)} folds of {len(block)} rows: {error}"
            raise InputError(cannot(f"fit `{family}`", because.rstrip("."), "Give more samples, or a smaller family")) from error
        losses[count] = loss if stretch is None else loss[order.argsort()]  # in time
        if best == 0 or float(w @ loss) < float(w @ losses[best]):
            best, worse = count, 0
        else:
            worse += 1
        count += 1 if count < 10 else 2 if count < 20 else 4
    chains = None if stretch is None else chains_of(stretch)
    chosen = next(k for k in sorted(losses) if _is_as_good(w, losses[k], losses[best], groups, chains))
    how = (
        f"{len(w):,} of {len(block):,} rows held out" if len(folds) == 1 else f"{len(folds)}-fold cross-fitting, {len(w):,} rows"
    )
    weights = None if target.weights is None else w
    curve = tuple((k, monte_carlo.cross_entropy(losses[k], how, weights, chains, groups)) for k in sorted(losses))
    were = "component was" if chosen == 1 else "components were"
    note = f"{chosen} {were} chosen by {how}: the fewest within one standard error of the best ({best})"
    return replace(family, components=chosen), curve, (note,)


def _cross_fitted(block: Block, folds: Any, family: Mixture, target: Target, seed: int, work: Work, count: int) -> Tensor:
    """Return −log q of every row under a mixture fitted without its fold.

    Raises:
        InputError: the rows don't allow it.
    """
    name = f"components-{count}"
    if work.journal is not None:
        like = {"loss": torch.zeros(sum(map(len, folds)), dtype=torch.float64, device="cpu")}
        done = work.journal.load(name, lambda tensors, _: tensors_behind("", tensors, like))
        if done is not None:
            return done["loss"]
    rows = Rows(slices(block), target.names, None, work.workers)
    for fold in folds:
        keep = torch.ones(len(block), dtype=torch.bool, device="cpu")
        keep[fold] = False
        family.check_samples(block.x[keep], target.names)
    models = ExpectationMaximization().quick().run_without(rows, family, folds, seed)
    loss = torch.cat([-log_likelihood(model, block.x[fold]) for model, fold in zip(models, folds, strict=True)])
    if work.journal is not None:
        work.journal.save(name, {"loss": loss}, {})
    return loss


def _is_as_good(w: Tensor, loss: Tensor, best: Tensor, groups: Tensor | None, chains: Tensor | None) -> bool:
    """Return whether a paired loss is within one standard error of the best; a group of rows counts as one row."""
    apart = loss - best
    if chains is not None:
        return float(apart.mean()) <= standard_error(apart, chains)[0]
    mean = w @ apart
    parts = w * (apart - mean)
    if groups is not None:
        parts = torch.zeros(int(groups.max()) + 1, dtype=parts.dtype, device="cpu").index_add(0, groups, parts)
    return float(mean) <= float(parts.square().sum().sqrt())
