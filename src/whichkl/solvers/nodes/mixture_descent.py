"""Mixture descent: an ensemble of mixtures goes down to its optima, with few evaluations of p."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from whichkl.solvers.nodes.ensemble import Ensemble
from whichkl.solvers.nodes.expansion import Entropy, left_of
from whichkl.solvers.nodes.points import Nodes, log_density

_MAX_CALLS_PER_ROUND = 10
"""Largest number of calls of L-BFGS before the coordinates are whitened again, and in a step on an expansion."""
_FIRST_TETHER, _MAX_STEPS, _MAX_REFUSED = 0.5, 12, 3
"""Tether of the first step on the expansion of log p, the largest number of steps, and of those in a row that may fail."""
_MIN_PROGRESS, _LARGE_GAIN = 0.5, 0.05
"""Share of the gradient that may be left after a step on the expansion, unless it gained this many nats."""
_SMALL_RESIDUAL = 1e-4
"""Length of the gradient below which a round must gain something to be followed by another."""


def descend(
    state: Ensemble,
    tolerance: float,
    rounds: int,
    trail: list[float],
    min_gain: float = -math.inf,
    *,
    expands: bool = False,
    max_calls: int = _MAX_CALLS_PER_ROUND,
) -> Ensemble:
    """Descend by at most `rounds` rounds of L-BFGS, each in coordinates that are whitened again; `trail` gets each round's loss.

    A mixture has arrived when its gradient is at most `tolerance`, or small where a round gained less than `min_gain` nats. If it
    `expands`, a round begins with steps on the expansion of log p.
    """
    active = (state.residual > tolerance) & state.loss.isfinite()
    counts = state.target.evaluations
    for _ in range(rounds):
        rows = active.nonzero()[:, 0]
        cost = len(rows) * state.cost
        if len(rows) == 0 or not counts.affords(cost):
            break
        some = state.take(rows)
        trial = _step_while_foretold(some, tolerance, max_calls) if expands else some
        is_left = trial.residual > tolerance
        if bool(is_left.any()):
            left = trial.take(is_left)
            left = left.descended(counts.calls(len(left.loss) * state.cost, max_calls), tolerance**2 / 2)
            trial = trial.put(is_left.nonzero()[:, 0], left)
        gain = some.loss - trial.loss
        # Near the end rounding hides a gain, and the gradient decides.
        better = (gain > 0) | ((gain > -1e-9) & (trial.residual < some.residual))
        state = state.put(rows[better], trial.take(better))
        active[rows] = better & (trial.residual > tolerance) & ((gain > min_gain) | (trial.residual > _SMALL_RESIDUAL))
        trail.append(float(state.loss.min()) * state.objective.curvature)
    return state


def _step_while_foretold(state: Ensemble, tolerance: float, max_calls: int) -> Ensemble:
    """Take steps on the expansion of log p about the nodes, one evaluation of them each; how far each goes follows their success.

    Near a Gaussian p a few steps end where L-BFGS needs dozens of calls, since log q, which is what bends there, costs nothing.
    """
    counts = state.target.evaluations
    rows = ((state.residual > tolerance) & state.loss.isfinite()).nonzero()[:, 0]
    here, tether = state.take(rows), state.loss.new_full((len(rows),), _FIRST_TETHER)
    refused = torch.zeros_like(rows)
    for _ in range(min(_MAX_STEPS, max_calls)):
        if len(rows) == 0 or not counts.affords(len(rows) * state.cost):
            break
        ahead, foretold = here.stepped(tether, _MAX_CALLS_PER_ROUND)
        ahead = ahead.measured()
        here, ahead = here.recalling(ahead), ahead.recalling(here)  # a step that failed teaches, too
        gain = here.loss - ahead.loss
        risen = (gain > 0) | ((gain > -1e-9) & (ahead.residual < here.residual))
        state = state.put(rows[risen], ahead.take(risen))
        share = gain / foretold
        tether = torch.where(share > 0.75, tether / 8, torch.where(share > 0.25, tether, 8 * tether))
        # A step that hardly gets nearer costs more than a call of L-BFGS and is worth no more.
        is_worth_it = risen & ((ahead.residual < _MIN_PROGRESS * here.residual) | (gain > _LARGE_GAIN))
        refused = torch.where(is_worth_it, 0, refused + 1)
        here = here.put(risen.nonzero()[:, 0], ahead.take(risen))
        kept = (refused < _MAX_REFUSED) & (here.residual > tolerance)
        rows, tether, refused, here = rows[kept], tether[kept], refused[kept], here.take(kept)
    return state


def with_more_entropy(state: Ensemble, nodes: Nodes) -> Ensemble:
    """Return the mixtures with more nodes for log q, to the share that makes the error of the nodes of the best one least.

    After a quadratic is taken off, which nodes integrate exactly, log p is u and log q is v at the nodes of the best mixture. The
    error of the common nodes is that of u − (1 − share) v, which is least at 1 − share = E[u v] / E[v²]. A share stays.
    """
    if state.entropy is not None:
        return replace(state, entropy=Entropy(nodes, state.entropy.share)).measured()
    best = state.take(state.loss.argmin()[None])
    if best.expansion is None:
        raise TypeError("nothing was expanded")
    x = best.expansion.x.clone().requires_grad_(True)
    with torch.enable_grad():
        log_q = log_density(x, best.logits, best.loc, best.tril)
        (slope,) = torch.autograd.grad(log_q.sum(), x)
    u, v = (
        left_of(*one, best.tril, best.nodes) for one in ((best.expansion.value, best.expansion.score), (log_q.detach(), slope))
    )
    weight = (best.logits.exp()[..., None] * best.nodes.w).flatten(1)
    size = float((weight * v * v).sum())
    share = 1 - min(1.0, max(0.0, float((weight * u * v).sum()) / size)) if size > 0 else 0.0
    return replace(state, entropy=Entropy(nodes, share)).measured()
