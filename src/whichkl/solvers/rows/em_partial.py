"""Partial EM: a few components move while the others stay, at the cost of those few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.rows.em_starts import Move
from whichkl.solvers.rows.em_steps import Background, Densities, Frame, State, expectation, m_step
from whichkl.solvers.rows.rows import Rows
from whichkl.solvers.rows.squarem import squarem_cycle


class Moved(NamedTuple):
    """Mixtures after cycles of their own components, the most likely first."""

    state: State
    likelihood: Float[Tensor, " s"]
    """Mean log likelihoods, a step ago."""
    gain: Float[Tensor, " s"]
    """By how much the last cycle raised them."""
    iterations: int


def partial_cycles(rows: Rows, frame: Frame, here: State, moves: Sequence[Move], cycles: int) -> Moved:
    """Take cycles of EM in which each mixture's new components move, and those that it shares with `here` stay.

    The shared ones are evaluated once for all mixtures, and the new ones divide the weight that the shared ones leave. Tied
    covariances come apart meanwhile.

    Source: partial EM, Ueda, Nakano, Ghahramani & Hinton (2000).
    """
    states = moves[0].state.joined(*(move.state for move in moves[1:]))
    each = torch.arange(len(moves), device="cpu")[:, None]
    new = torch.tensor([move.new for move in moves], device="cpu", dtype=torch.int64)
    dtype = torch.float32 if len(rows.parts) > 1 and states.fits_single else torch.float64
    diagonal = frame.covariance == "diagonal"
    kept = torch.zeros(len(moves), here.probs.shape[1], dtype=dtype, device="cpu")
    for i, move in enumerate(moves):
        kept[i, list(move.kept)] = 1
    background = Background(Densities.of(here, dtype, diagonal=diagonal), kept)
    some = states.each(lambda field: field[each, new])
    share = some.probs.sum(1, keepdim=True)

    def update(state: State) -> tuple[Float[Tensor, " s"], State]:
        densities = Densities.of(replace(state, probs=state.probs * share), dtype, diagonal=diagonal)
        sums = rows.total(partial(expectation, densities, frame, background=background))
        covariance = "diagonal" if diagonal else "full"
        return sums["likelihood"] / sums["weight"], m_step(sums, state, frame.floor, covariance)

    likelihood = torch.full((len(moves),), -math.inf, dtype=torch.float64, device="cpu")
    before, some, iterations = likelihood, replace(some, probs=some.probs / share), 0
    for _ in range(cycles):
        before = likelihood
        begin, likelihood, some, steps, _ = squarem_cycle(some, update, before, -math.inf)
        before, iterations = torch.maximum(before, begin), iterations + steps
    some = replace(some, probs=some.probs * share)
    states = states.each(lambda field, moved: field.index_put((each, new), moved), some)
    order = likelihood.argsort(descending=True)
    return Moved(states.take(order), likelihood[order], (likelihood - before)[order], iterations)
