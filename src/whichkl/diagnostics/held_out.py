"""Held out: the value of forward KL on rows that the model was not fitted on, and what neighbouring families gain on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, WhichklError
from whichkl.access import Access
from whichkl.diagnostics.correlation import next_richer, rows_are_correlated
from whichkl.diagnostics.measured import Measured
from whichkl.diagnostics.models import carried, model_target
from whichkl.diagnostics.result import DRAWS, Diagnostics
from whichkl.diagnostics.weights import on_the_line
from whichkl.divergences import Estimate
from whichkl.divergences.draws import monte_carlo
from whichkl.divergences.exact import quadrature
from whichkl.families import Family, NetworkFamily, simpler, simplest
from whichkl.families.family import cast, log_likelihood
from whichkl.objectives import ForwardKL
from whichkl.samples import Block
from whichkl.samples.repeats import row_keys
from whichkl.solvers import Solution, Solver, solver_for
from whichkl.solvers.rows.rows import HELD, rows_of, thinned
from whichkl.solvers.work import Work
from whichkl.targets import Target

_FOLDS, FOLD_LIMIT = 10, 10_000
_FEW = 2_000
"""Up to so many rows every fold counts; above, half as many folds, and neighbouring families are compared on one."""
_COMPARED = 8_000
"""Neighbouring families are compared on models fitted to at most so many rows."""


def stride_of(target: Target, solver: Solver) -> int:
    """Every how many rows one is held out inside the solver; 0 where fresh draws or cross-fitting serve instead."""
    if target.chains is not None and target.sampler is None and solver.holds_chains:
        return _FOLDS // 2
    if target.sampler is not None or target.chains is not None:
        return 0
    rows = len(target.samples) if target.samples is not None else target.stream.about if target.stream is not None else 0
    if target.samples is not None and solver.refits and rows <= FOLD_LIMIT:
        return 0
    return min(max(5, rows // HELD), 32_768) if rows >= 20 else 0


def forward_value(
    target: Target,
    family: Family,
    solver: Solver,
    model: Any,
    solution: Solution,
    d: Diagnostics,
    seed: int,
    work: Work,
    measured: Measured,
) -> tuple[Estimate, Diagnostics]:
    """Estimate KL(p‖q), or the cross-entropy KL(p‖q) + H(p) where p can't be evaluated, on draws that q hasn't seen."""
    correlated = measured("the correlation of the columns", lambda: rows_are_correlated(target, family, solution, seed), None)
    d = replace(d, correlated=correlated)
    if target.sampler is not None:
        return _fresh(target, family, model, d, seed, measured)
    if solution.held is not None:
        return _on_held_rows(target, family, solver, solution, d, seed, work, measured)
    if target.samples is None:
        raise TypeError("neither rows nor a sampler")
    own = cross_fit(target, family, solver, seed, None if solver.refits else 1)
    if own is None:
        return in_sample(target, model), d
    order, mine, how = own
    groups = None if target.repeats is None else target.repeats.group
    w, chains, groups = (None if one is None else one[order] for one in (target.weights, target.chains, groups))
    most = None if len(order) <= _FEW or chains is not None else 1

    def gained(near: Family | None) -> Estimate | None:
        return measured(f"the gain of `{near}`", lambda: gain_of(near), None)

    def gain_of(near: Family | None) -> Estimate | None:
        refit = None if near is None else solver_for(ForwardKL(), near, target.access)
        if near is None or refit is None or not refit.refits:
            return None
        theirs = cross_fit(target, near, refit, seed, most)
        m = len(theirs[1]) if theirs is not None else 0
        return None if theirs is None else _gain(mine[:m], theirs[1], _first(w, m), chains, _first(groups, m))

    held_out = monte_carlo.cross_entropy(mine, how, w, chains, groups)
    d = replace(d, held_out=held_out, richer_gain=gained(next_richer(family, d)), simpler_gain=gained(simpler(family)))
    lowest = simplest(family)
    if d.simpler_gain is not None and d.simpler_gain.value > 0 and lowest not in (None, simpler(family)):
        gain = gained(lowest)
        if gain is not None and gain.value > d.simpler_gain.value:
            d = replace(d, simpler_gain=gain, simpler=str(lowest))
    if Access.LOG_PROB not in target.access:
        return held_out, d
    log_p = measured("log p at the unseen rows", lambda: target.log_prob(_samples(target)[order]), None)
    return _absolute(target, held_out, mine, log_p, w, chains, groups), d


def _first(values: Tensor | None, count: int) -> Tensor | None:
    return None if values is None else values[:count]


def _absolute(
    target: Target,
    held_out: Estimate,
    mine: Tensor,
    log_p: Tensor | None,
    w: Tensor | None,
    chains: Tensor | None = None,
    groups: Tensor | None = None,
) -> Estimate:
    """KL in place of the cross-entropy, where log p at the rows is known."""
    if log_p is None:
        return held_out
    absolute = monte_carlo.cross_entropy(mine + log_p, held_out.method, w, chains, groups)
    return replace(absolute, up_to=None if target.normalized else "log_z")


def in_sample(target: Target, model: Any) -> Estimate:
    """Mean −log q over the rows that were fitted: it flatters the fit, and says so."""
    note = "no rows were held out: the mean is over the rows that were fitted, and flatters the fit"
    if target.samples is None:
        raise TypeError("no rows in memory")
    loss = -log_likelihood(model, _samples(target), target.context)
    estimate = monte_carlo.cross_entropy(loss, "in-sample mean", target.weights, target.chains)
    return replace(estimate, reliable=False, notes=(note,))


def unseen(target: Target, family: Family, solver: Solver, solution: Solution, seed: int) -> tuple[Block, Any] | None:
    """Return rows of the target, and a model carried into its support that was fitted without them; None if too few."""
    if solution.held is not None:
        held = solution.held
        x = target.bijection.forward(held.block.x) if family.carried else held.block.x
        block = _distinct(target, Block(x, held.block.w, held.block.context))
        return block, carried(held.model, target.bijection) if family.carried else held.model
    if target.samples is None:
        return None
    folds = _folds(target, len(target.samples), seed)
    rows = torch.cat(folds[: max(1, len(folds) // 5)])
    keep = torch.ones(len(target.samples), dtype=torch.bool, device=rows.device)
    keep[rows] = False
    model = _refit(part_of(target, keep), family, solver, seed)
    if model is None:
        return None
    w = (
        torch.ones(len(rows), dtype=torch.float64, device="cpu")
        if target.weights is None
        else target.weights[rows].to(torch.float64)
    )
    block = Block(_samples(target)[rows], w, None if target.context is None else target.context[rows])
    return _distinct(target, block), model


def _distinct(target: Target, block: Block) -> Block:
    """Put equal rows together into one of their weight, where rows repeat: tests take rows as independent."""
    if target.repeats is None:
        return block
    _, number = row_keys(block.x, block.context).unique(return_inverse=True)
    count = int(number.max()) + 1
    first = torch.full((count,), len(block), dtype=torch.int64, device=number.device)
    first = first.scatter_reduce(0, number, torch.arange(len(block), device=number.device), "amin")
    w = torch.zeros(count, dtype=block.w.dtype, device=block.w.device).index_add(0, number, block.w)
    return replace(block.take(first), w=w)


def cross_fit(
    target: Target, family: Family, solver: Solver, seed: int, most: int | None = None
) -> tuple[Tensor, Float[Tensor, " m"], str] | None:
    """Return −log q of rows under models fitted without them (their numbers, losses, and the scheme); None if too few.

    Up to 2,000 rows: ten folds. Up to 10,000: five. Above: one fifth is held out once. Folds are random rows; of chains,
    stretches in time. With `most`, only so many of the folds.
    """
    x, n = _samples(target), len(_samples(target))
    folds = _folds(target, n, seed)[:most]
    losses = []
    for fold in folds:
        keep = torch.ones(n, dtype=torch.bool, device=x.device)
        keep[fold] = False
        fitted = _refit(part_of(target, keep), family, solver, seed)
        if fitted is None:
            return None
        losses.append(-log_likelihood(fitted, x[fold], None if target.context is None else target.context[fold]).detach())
    how = f"{len(folds)}-fold cross-fitting, {n} rows" if len(folds) > 1 else f"{len(folds[0]):,} rows held out"
    how += "" if target.repeats is None else f", {target.repeats.count:,} distinct in all"
    order, loss = torch.cat(folds), torch.cat(losses)
    if target.chains is None:
        return order, loss, how
    in_time = order.argsort()
    return order[in_time], loss[in_time], how


def part_of(target: Target, keep: Tensor) -> Target:
    """Return the target of some of the rows, known by them alone."""
    samples: Any = _samples(target)[keep]
    if target.context is not None:
        samples = (target.context[keep], samples[:, 0] if target.scalar else samples)
    weights = None if target.weights is None else target.weights[keep]
    return Target(samples=samples, weights=weights, names=target.names, support=target.bijection.constraints)


def _fresh(
    target: Target, family: Family, model: Any, d: Diagnostics, seed: int, measured: Measured
) -> tuple[Estimate, Diagnostics]:
    """By quadrature on the line, else on fresh draws."""
    q = model_target(model, target)
    if on_the_line(target):
        try:
            return quadrature.kl(target, q), d
        except WhichklError:  # heavy tails: Monte Carlo below says how far it can be trusted
            pass
    if Access.LOG_PROB in target.access:
        value = measured("forward KL on fresh draws", lambda: monte_carlo.forward_kl(target, q, DRAWS, seed + 2), None)
        if value is not None:
            return value, d
    x = target.draws(DRAWS, seed + 2)
    mine, larger = -log_likelihood(model, x), next_richer(family, d)
    held_out = monte_carlo.cross_entropy(mine, f"mean over {len(x):,} fresh draws")

    def gained() -> Estimate | None:
        refit = None if larger is None else solver_for(ForwardKL(), larger, target.access)
        other = None if larger is None or refit is None or not refit.refits else _refit(target, larger, refit, seed)
        return _gain(mine, None if other is None else -log_likelihood(other, x))

    return held_out, replace(d, held_out=held_out, richer_gain=measured(f"the gain of `{larger}`", gained, None))


def _on_held_rows(
    target: Target,
    family: Family,
    solver: Solver,
    solution: Solution,
    d: Diagnostics,
    seed: int,
    work: Work,
    measured: Measured,
) -> tuple[Estimate, Diagnostics]:
    """On the rows that the solver left out; neighbouring families on models of one smaller sample, all on the same rows."""
    found = unseen(target, family, solver, solution, seed)
    if found is None:
        raise TypeError("nothing was held out")
    block, model = found
    are_weighted = target.weights is not None or target.repeats is not None
    w = block.w if are_weighted else None
    groups = None if target.repeats is None else torch.arange(len(block), device=block.w.device)
    mine = -log_likelihood(model, block.x, block.context).detach()
    what = "rows" if target.repeats is None else "distinct rows"
    held_out = monte_carlo.cross_entropy(mine, f"{len(mine):,} {what} held out", w, groups=groups)
    near = [one for one in (next_richer(family, d), simpler(family))]

    def gained() -> list[Estimate | None]:
        able = [one is not None and solver.refits and solver_for(ForwardKL(), one, target.access).refits for one in near]
        gains: list[Estimate | None] = [None, None]
        if not any(able):
            return gains
        sample = _training_sample(target, family, seed, work)
        own = _refit(sample, family, solver, seed)
        base = None if own is None else -log_likelihood(own, block.x, block.context).detach()
        for i, one in enumerate(near):
            if one is None or not able[i] or base is None:
                continue
            other = _refit(sample, one, solver_for(ForwardKL(), one, target.access), seed)
            loss = None if other is None else -log_likelihood(other, block.x, block.context).detach()
            gains[i] = _gain(base, loss, w, groups=groups)
        return gains

    gains = measured("the gain of neighbouring families", gained, [None, None])
    d = replace(d, held_out=held_out, richer_gain=gains[0], simpler_gain=gains[1], held=block)
    if Access.LOG_PROB not in target.access:
        return held_out, d
    log_p = measured("log p at the unseen rows", lambda: target.log_prob(block.x), None)
    return _absolute(target, held_out, mine, log_p, w, groups=groups), d


def _training_sample(target: Target, family: Family, seed: int, work: Work) -> Target:
    """Some of the rows that weren't held out, evenly from all parts, in the coordinates of the target."""
    free = target.unconstrained() if family.carried else target
    rows = replace(rows_of(free, seed, work.workers), stride=stride_of(target, solver_for(ForwardKL(), family, target.access)))
    block, _ = thinned(rows, _COMPARED)
    x: Any = target.bijection.forward(block.x) if family.carried else block.x
    if block.context is not None:
        x = (block.context, x[:, 0] if target.scalar else x)
    weights = block.w if target.weights is not None else None
    return Target(samples=x, weights=weights, names=target.names, support=target.bijection.constraints)


def _folds(target: Target, n: int, seed: int) -> list[Tensor]:
    """Rows to hold out: random ones, equal ones together; of chains stretches, since neighbours in time tell of each other."""
    many = n <= FOLD_LIMIT
    if target.repeats is not None:
        return target.repeats.folds(_FOLDS if n <= _FEW else _FOLDS // 2, seed)[: None if many else 1]
    if target.chains is None:
        shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu").to(_samples(target).device)
        return [*shuffled.tensor_split(min(_FOLDS if n <= _FEW else _FOLDS // 2, n))] if many else [shuffled[: n // 5]]
    own = [(target.chains == one).nonzero()[:, 0] for one in range(int(target.chains.max()) + 1)]
    count = min(_FOLDS if many else 5, max(map(len, own)))
    stretches = [rows.tensor_split(count) for rows in own]
    return [torch.cat([parts[i] for parts in stretches]) for i in (range(count) if many else [count - 1])]


def _refit(target: Target, family: Family, solver: Solver, seed: int) -> Any:
    """Fit without judging: the model in the target's coordinates; None where the rows don't allow it."""
    free, solver = target.unconstrained() if family.carried else target, solver.quick()
    try:
        if free.samples is not None:
            family.check_samples(free.samples, target.names)
        model = solver.solve(free, family, seed).best.model
    except InputError:
        return None
    if target.device.type != "cpu" and not isinstance(family, NetworkFamily):
        model = cast(family, model, torch.float64, target.device)
    return carried(model, target.bijection) if family.carried else model


def _gain(
    mine: Tensor,
    theirs: Tensor | None,
    weights: Tensor | None = None,
    chains: Tensor | None = None,
    groups: Tensor | None = None,
) -> Estimate | None:
    if theirs is None:
        return None
    gain = monte_carlo.cross_entropy(mine - theirs, "paired on unseen draws", weights, chains, groups)
    return replace(gain, quantity="gain", up_to=None)


def _samples(target: Target) -> Tensor:
    if target.samples is None:
        raise TypeError("no samples")
    return target.samples.to(torch.float64)
