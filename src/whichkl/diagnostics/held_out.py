"""Held out: the value of forward KL on rows that the model was not fitted on, and the gains of neighbouring families there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MixtureSameFamily

from whichkl._checks import WhichklError
from whichkl.access import Access
from whichkl.cluster import Threads
from whichkl.diagnostics.columns import next_richer, rows_are_correlated
from whichkl.diagnostics.findings import MAX_KL
from whichkl.diagnostics.judged_fit import JudgedFit
from whichkl.diagnostics.models import model_target
from whichkl.diagnostics.result import MAX_DRAWS, Diagnostics
from whichkl.diagnostics.richness import doubt_of_rows
from whichkl.diagnostics.unseen_rows import (
    FOLDS,
    MAX_ROWS_FOR_ALL_FOLDS,
    cross_fitted_losses,
    refit,
    samples_of,
    stride_of,
    unseen,
)
from whichkl.diagnostics.weights import on_the_line
from whichkl.divergences import Estimate
from whichkl.divergences.draws import monte_carlo
from whichkl.divergences.exact import quadrature
from whichkl.families import Family, simpler, simplest
from whichkl.families.family import log_likelihood
from whichkl.objectives import ForwardKL
from whichkl.solvers import Solver, solver_for
from whichkl.solvers.rows.rows import rows_of, thinned
from whichkl.solvers.work import Work
from whichkl.targets import Target
from whichkl.targets.coordinates import in_free_coordinates

_COMPARED_ROWS, _MAX_COMPARED_ROWS, _ROWS_PER_NUMBER = 8_000, 30_000, 5
"""Number of rows that neighbouring families are fitted to; if the model needs more, this many per number of the model, at most
`_MAX_COMPARED_ROWS`."""
_MAX_NATS_LEFT = MAX_KL / 20
"""Nats per row that the fit of a richer family may leave: it is compared with a level of `MAX_KL`."""
_ONE_THREAD = Threads(1)
"""Each family is fitted in a thread of its own: the passes over few rows would mostly wait for each other."""
_MIN_COMPARED_ROWS = 200
"""Unseen rows on which a neighbouring family is compared first."""
_STANDARD_ERRORS = 4.0
"""Standard errors between a gain and the level that matters, from which on more unseen rows wouldn't change the answer."""


@dataclass(frozen=True)
class _Losses:
    """−log q at unseen draws of p, in the order of time where they are chains."""

    loss: Float[Tensor, " n"]
    method: str
    weights: Float[Tensor, " n"] | None = None
    chains: Tensor | None = None
    groups: Tensor | None = None
    """Numbers that equal draws share, where rows repeat."""

    def cross_entropy(self) -> Estimate:
        """Return the mean −log q, forward KL plus H(p)."""
        return monte_carlo.cross_entropy(self.loss, self.method, self.weights, self.chains, self.groups)

    def value(self, fit: JudgedFit, x: Float[Tensor, "n d"]) -> Estimate:
        """Return the mean log p − log q at the draws x; the cross-entropy if log p can't be evaluated."""
        target, log_p = fit.target, None
        if Access.LOG_PROB in target.access:
            log_p = fit.measured("log p at the unseen rows", lambda: target.log_prob(x), None)
        if log_p is None:
            return self.cross_entropy()
        return replace(replace(self, loss=self.loss + log_p).cross_entropy(), up_to=None if target.normalized else "log_z")

    def gain_of(self, other: Float[Tensor, " m"] | None) -> Estimate | None:
        """Return the mean gain of another model, paired on the first m draws."""
        if other is None:
            return None
        of_rows = (None if one is None else one[: len(other)] for one in (self.weights, self.chains, self.groups))
        paired = _Losses(self.loss[: len(other)] - other, "paired on unseen draws", *of_rows)
        return replace(paired.cross_entropy(), quantity="gain", up_to=None)


def forward_value(fit: JudgedFit, d: Diagnostics) -> tuple[Estimate, Diagnostics]:
    """Estimate KL(p‖q), or the cross-entropy KL(p‖q) + H(p) if p can't be evaluated, on draws that q hasn't seen."""
    value, log_z = fit.solution.value, fit.solution.log_z
    if value is not None:
        said = (
            () if log_z is None or fit.target.normalized else (f"log Z = {log_z.number} nats; its error is part of the value's",)
        )
        return value, replace(d, log_z=log_z, notes=(*d.notes, *said))
    what = "the correlation of the columns"
    correlated = fit.measured(what, lambda: rows_are_correlated(fit.target, fit.family, fit.solution, fit.seed), None)
    d = replace(d, correlated=correlated)
    if fit.target.sampler is not None:
        return _on_fresh_draws(fit, d)
    if fit.solution.held is not None:
        return _on_held_rows(fit, d)
    return _by_cross_fitting(fit, d)


def in_sample(target: Target, model: Any) -> Estimate:
    """Return the mean −log q over the rows that were fitted; it flatters the fit, and a note states that."""
    note = "no rows were held out: the mean is over the rows that were fitted, and flatters the fit"
    if target.samples is None:
        raise TypeError("no rows in memory")
    loss = -log_likelihood(model, samples_of(target), target.context)
    return replace(_Losses(loss, "in-sample mean", target.weights, target.chains).cross_entropy(), reliable=False, notes=(note,))


def _refitting_solver(fit: JudgedFit, family: Family | None) -> Solver | None:
    """Return the solver of a neighbouring family, if it is fast enough to fit again."""
    solver = None if family is None else solver_for(ForwardKL(), family, fit.target.access)
    return solver if solver is not None and solver.refits else None


def _on_fresh_draws(fit: JudgedFit, d: Diagnostics) -> tuple[Estimate, Diagnostics]:
    """By quadrature on the line, else on fresh draws."""
    target = fit.target
    free, q = in_free_coordinates(target, model_target(fit.model, target))
    if on_the_line(free):
        with contextlib.suppress(WhichklError):  # heavy tails: Monte Carlo below reports how far it can be trusted
            return quadrature.kl(free, q), d
    if Access.LOG_PROB in target.access:
        what = "forward KL on fresh draws"
        value = fit.measured(what, lambda: monte_carlo.forward_kl(free, q, MAX_DRAWS, fit.seed + 2), None)
        if value is not None:
            return value, d
    x = target.draws(MAX_DRAWS, fit.seed + 2)
    mine = _Losses(-log_likelihood(fit.model, x), f"mean over {len(x):,} fresh draws")
    larger = next_richer(fit.family, d)

    def gained() -> Estimate | None:
        solver = _refitting_solver(fit, larger)
        other = None if larger is None or solver is None else refit(target, larger, solver, fit.seed)
        return mine.gain_of(None if other is None else -log_likelihood(other, x))

    return mine.cross_entropy(), replace(
        d, held_out=mine.cross_entropy(), richer_gain=fit.measured(f"the gain of `{larger}`", gained, None)
    )


def _on_held_rows(fit: JudgedFit, d: Diagnostics) -> tuple[Estimate, Diagnostics]:
    """On the rows that the solver left out; neighbouring families on models of one smaller sample, all on the same rows."""
    target = fit.target
    found = unseen(target, fit.family, fit.solver, fit.solution, fit.seed)
    if found is None:
        raise TypeError("nothing was held out")
    block, model = found

    def loss_of(one: Any) -> Tensor | None:
        return None if one is None else -log_likelihood(one, block.x, block.context).detach()

    what = "rows" if target.repeats is None else "distinct rows"
    w = block.w if target.weights is not None or target.repeats is not None else None
    groups = None if target.repeats is None else torch.arange(len(block), device=block.w.device)
    loss = -log_likelihood(model, block.x, block.context).detach()
    mine = _Losses(loss, f"{len(block):,} {what} held out", w, groups=groups)
    lowest = simplest(fit.family)
    near = [next_richer(fit.family, d), simpler(fit.family), None if lowest == simpler(fit.family) else lowest]

    def gained() -> list[Estimate | None]:
        solvers = [_refitting_solver(fit, one) if fit.solver.refits else None for one in near]
        if not any(solvers):
            return [None] * len(near)
        sample, start = _training_sample(fit), None if fit.solution.held is None else fit.solution.held.model

        def loss_on_sample(family: Family | None, solver: Solver | None, tolerance: float) -> Tensor | None:
            if family is None or solver is None:
                return None
            return loss_of(refit(sample, family, solver.near(start, tolerance), fit.seed, Work(_ONE_THREAD)))

        families, tolerances = [fit.family, *near], (0.0, _MAX_NATS_LEFT, 0.0, 0.0)
        each = [partial(loss_on_sample, *one) for one in zip(families, [fit.solver, *solvers], tolerances, strict=True)]
        base, *others = Threads().map(lambda loss: loss(), each)
        return [None if base is None else replace(mine, loss=base).gain_of(other) for other in others]

    richer, simple, lower = fit.measured("the gain of neighbouring families", gained, [None] * len(near))
    d = replace(d, held_out=mine.cross_entropy(), richer_gain=richer, held=block)
    return mine.value(fit, block.x), _with_simpler(d, simple, lower, lowest)


def _by_cross_fitting(fit: JudgedFit, d: Diagnostics) -> tuple[Estimate, Diagnostics]:
    """On every row, under a model that was fitted without it; neighbouring families on the same rows."""
    target, family, seed = fit.target, fit.family, fit.seed
    # Every fold has its own starts: near the fit to all rows EM would stop too soon, and its losses would flatter it.
    own = cross_fitted_losses(target, family, fit.solver, seed, None if fit.solver.refits else 1)
    if own is None:
        return in_sample(target, fit.model), d
    order, loss, how = own
    groups = None if target.repeats is None else target.repeats.group
    of_rows = (None if one is None else one[order] for one in (target.weights, target.chains, groups))
    mine = _Losses(loss, how, *of_rows)
    most = None if len(order) <= MAX_ROWS_FOR_ALL_FOLDS or target.chains is not None else 1

    def gain_of(near: Family | None, level: float) -> Estimate | None:
        """Compare on a few folds, and on the others only if these don't decide."""
        solver = _refitting_solver(fit, near)
        if near is None or solver is None:
            return None
        is_whole = target.chains is not None or fit.thorough
        few = None if is_whole else -(-_MIN_COMPARED_ROWS * FOLDS // len(order))
        for count in dict.fromkeys((few, most)):
            theirs = cross_fitted_losses(target, near, solver, seed, count)
            gain = mine.gain_of(None if theirs is None else theirs[1])
            if gain is None or abs(gain.value - level) > _STANDARD_ERRORS * gain.stderr:
                break
        return gain

    def gained(near: Family | None, level: float = 0.0) -> Estimate | None:
        return fit.measured(f"the gain of `{near}`", lambda: gain_of(near, level), None)

    d = replace(d, held_out=mine.cross_entropy(), richer_gain=gained(next_richer(family, d), MAX_KL))
    simple, lowest = gained(simpler(family)), simplest(family)
    is_worth_it = simple is not None and simple.value > 0 and lowest not in (None, simpler(family))
    d = _with_simpler(d, simple, gained(lowest) if is_worth_it else None, lowest)
    value = mine.value(fit, samples_of(target)[order])
    doubt = fit.measured("whether the rows are too few", lambda: _doubt_of_rows(fit, mine, order), None)
    if doubt is None:
        return value, d
    why, are_few = doubt
    value = replace(value, reliable=False, notes=(*value.notes, why))
    return value, replace(d, rows_too_few=why if are_few else None)


def _doubt_of_rows(fit: JudgedFit, mine: _Losses, order: Tensor) -> tuple[str, bool] | None:
    """Say why unseen losses may not be the fit's, and whether the rows are too few; None if neither, or for one component."""
    best, value = fit.solution.best.model, mine.cross_entropy()
    if not isinstance(best, MixtureSameFamily) or best.mixture_distribution.logits.shape[-1] == 1:
        return None
    x, free = (samples_of(one)[order] for one in (fit.target, fit.target.unconstrained()))
    fitted = -log_likelihood(fit.model, x)
    rows = value.ess or value.n or len(x)
    return doubt_of_rows(best, free, mine.loss, fitted, rows / _numbers_of(fit), mine.weights)


def _numbers_of(fit: JudgedFit) -> int:
    """Return how many numbers were fitted: triangular factors hold zeros, which weren't."""
    return sum(int(value.count_nonzero()) for value in fit.family.parameters(fit.solution.best.model).values())


def _with_simpler(d: Diagnostics, simple: Estimate | None, lower: Estimate | None, lowest: Family | None) -> Diagnostics:
    """Add the gain of the next simpler family, or of the simplest one where that gains more."""
    if lower is not None and (simple is None or lower.value > simple.value):
        return replace(d, simpler_gain=lower, simpler=str(lowest))
    return replace(d, simpler_gain=simple)


def _training_sample(fit: JudgedFit) -> Target:
    """Some of the rows that weren't held out, evenly from all parts, in the coordinates of the target."""
    target, is_carried = fit.target, fit.family.carried
    stride = stride_of(target, solver_for(ForwardKL(), fit.family, target.access))
    rows = replace(rows_of(target.unconstrained() if is_carried else target, fit.seed, fit.work.workers), stride=stride)
    block, _ = thinned(rows, _MAX_COMPARED_ROWS)
    what, few = "rows to fit neighbouring families to", max(_COMPARED_ROWS, _ROWS_PER_NUMBER * _numbers_of(fit))
    block = block.thinned(fit.at_most(what, len(block), few))
    x: Any = target.bijection.forward(block.x) if is_carried else block.x
    if block.context is not None:
        x = (block.context, x[:, 0] if target.scalar else x)
    weights = block.w if target.weights is not None else None
    return Target(samples=x, weights=weights, names=target.names, support=target.bijection.constraints)
