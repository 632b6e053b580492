"""Cosine cycles: stochastic descent from several starts as one batch, until a whole cycle gains nothing; resumable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.files.journal import Journal, tensors_behind
from whichkl.solvers.descent import warm_cosine
from whichkl.solvers.solver import Optimum, Solution, Solver, check_counts, check_positive
from whichkl.solvers.work import Work

_STEPS_PER_ROUND = 50
"""Number of steps between two measurements of the loss."""
_WARM_UP_STEPS = 20
"""Largest number of steps in which the learning rate rises at the beginning of a cycle."""
_RATE_FACTOR_PER_CYCLE = 0.7
"""The factor of the learning rate from one cycle to the next."""
_STEPS_IN_AVERAGE = 100
"""The number of steps after which a weight's share in the moving average has fallen by a factor e."""
_NEAR_BEST = 3.0
"""Nats. A start that ends a cycle this much above the best start isn't followed further."""
_BETAS, _EPSILON = (0.9, 0.99), 1e-8
"""Adam's constants."""
_ENTRY = "cycles"
"""Name of the journal's entry."""


class Problem(Protocol):
    """A loss of several sets of weights at once."""

    def gradient(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s p"]:
        """Return unbiased gradients of the losses at weights, one row per start in `which`; NaN where a gradient isn't finite."""

    def losses(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s m"]:
        """Return log q − log p on m draws of each model; the same seed gives the same noise."""


@dataclass
class Descent:
    """The state of every start: its weights, Adam's moments, the moving average of the weights, and the best average."""

    now: Float[Tensor, "s p"]
    first: Float[Tensor, "s p"]
    second: Float[Tensor, "s p"]
    average: Float[Tensor, "s p"]
    best: Float[Tensor, "s p"]
    loss: Float[Tensor, " s"]
    """Mean of log q − log p under the best weights, on the fixed draws of this cycle."""
    before: Float[Tensor, "s p"]
    """The best weights when this cycle began."""
    steps: Float[Tensor, " s"]
    """Steps since the moments were last reset."""
    factor: Float[Tensor, " s"]
    """The factor of the learning rate, which falls after rounds that diverged."""
    skipped: Float[Tensor, " s"]
    size: Float[Tensor, " s"]
    """Length of the last gradient."""
    active: Bool[Tensor, " s"]
    settled: Bool[Tensor, " s"]
    gain: Float[Tensor, " s"]
    """Nats that the last whole cycle gained."""
    rounds: Float[Tensor, " 1"]
    history: Float[Tensor, " r"]
    """The least loss after each round, on the draws of its cycle."""

    @classmethod
    def at(cls, start: Float[Tensor, "s p"]) -> Descent:
        """Begin at these weights."""
        zero, infinite = torch.zeros_like(start[:, 0]), torch.full_like(start[:, 0], math.inf)
        weights = {name: start.clone() for name in ("now", "average", "best", "before")}
        moments = {name: torch.zeros_like(start) for name in ("first", "second")}
        numbers = {name: zero.clone() for name in ("steps", "skipped")} | {"factor": zero + 1}
        unknown = {name: infinite.clone() for name in ("loss", "size", "gain")}
        flags = {"active": torch.ones_like(zero, dtype=torch.bool), "settled": torch.zeros_like(zero, dtype=torch.bool)}
        return cls(**weights, **moments, **numbers, **unknown, **flags, rounds=zero[:1].clone(), history=zero[:0].clone())

    def reset(self, rows: Tensor, **weights: Tensor) -> None:
        """Forget Adam's moments of some starts, and set further fields of theirs."""
        for name, value in {"first": 0.0, "second": 0.0, "steps": 0.0, **weights}.items():
            getattr(self, name)[rows] = value

    def save(self, journal: Journal) -> None:
        """Write down everything that the next round depends on."""
        journal.save(_ENTRY, {one.name: getattr(self, one.name) for one in fields(self)}, {})

    def resume(self, journal: Journal) -> None:
        """Take up what `save` wrote, if anything."""
        like = {one.name: getattr(self, one.name) for one in fields(self)}
        found = journal.load(_ENTRY, lambda tensors, _: tensors_behind("", tensors, {**like, "history": tensors["history"]}))
        for name, value in (found or {}).items():
            setattr(self, name, value.to(self.now.device))


@dataclass(frozen=True)
class CycleSolver(Solver):
    """A solver of reverse KL by Adam in cosine cycles. Each starts from the best weights so far, with a lower learning rate.

    A start has settled when a whole cycle gained less than `tolerance` nats, or less than two standard errors of that gain, which
    is measured on the same draws before and after.

    Args:
        steps: number of steps of a cycle.
        cycles: largest number of cycles.
        draws: number of draws of q per step.
        learning_rate: peak learning rate of the first cycle; by default the solver's own.
        clip: largest length of a gradient.
        tolerance: nats that a cycle must gain for another one to follow.
        judged_on: number of draws by which the best weights are chosen.
        starts: number of starts.
        skips: largest number of steps without a finite gradient; a start with more is given up.

    Raises:
        InputError: a field is out of range.

    Source: Kingma & Ba (2015); Loshchilov & Hutter (2017) for the cycles.
    """

    refits = False
    direction = "reverse"

    steps: int = 400
    cycles: int = 6
    draws: int = 128
    learning_rate: float | None = None
    clip: float = 5.0
    tolerance: float = 0.01
    judged_on: int = 2_048
    starts: int = 4
    skips: int = 50

    def __post_init__(self) -> None:
        """Check the fields."""
        check_counts(self, steps=1, cycles=1, draws=1, judged_on=1, starts=1, skips=1)
        check_positive(self, "learning_rate", "clip", "tolerance")

    def quick(self) -> Self:
        """Return a solver of one short cycle."""
        return replace(self, steps=max(1, self.steps // 4), cycles=1)

    def descend(self, problem: Problem, start: Float[Tensor, "s p"], rate: float, seed: int, work: Work) -> Descent:
        """Descend from all starts; `rate` is the peak learning rate of the first cycle unless the solver has another."""
        state, per_cycle = Descent.at(start), max(1, math.ceil(self.steps / _STEPS_PER_ROUND))
        rate, warm = self.learning_rate or rate, min(_WARM_UP_STEPS / self.steps, 0.1)
        if work.journal is not None:
            state.resume(work.journal)
        for number in range(int(state.rounds), self.cycles * per_cycle):
            if not bool(state.active.any()) or (number and work.is_spent):
                break
            cycle, within = divmod(number, per_cycle)
            loss, cycle_seed = float(state.loss.min()), _seed(seed, 2 * cycle + 1)
            work.tell("descending" if math.isinf(loss) else f"descending, ELBO {-loss:.4g}", number / (self.cycles * per_cycle))
            if within == 0:
                on = state.active.nonzero()[:, 0]
                best = state.best[on]
                state.reset(on, now=best, average=best, before=best, loss=_mean_loss(problem, best, on, cycle_seed))
            for i in range(min(_STEPS_PER_ROUND, self.steps - within * _STEPS_PER_ROUND)):
                done = (within * _STEPS_PER_ROUND + i) / self.steps
                now = rate * _RATE_FACTOR_PER_CYCLE**cycle * warm_cosine(done, warm, 1 / (warm * self.steps + 1))
                rows = state.active.nonzero()[:, 0]
                if len(rows):  # a start may have been given up since the last step
                    self._step(problem, state, rows, now, _seed(seed, 2 * (number * _STEPS_PER_ROUND + i)))
            rows = state.active.nonzero()[:, 0]
            if len(rows):
                self._judge(problem, state, rows, cycle_seed)
            state.rounds += 1
            state.history = torch.cat([state.history, state.loss.min()[None]])
            if len(rows) and within == per_cycle - 1:
                self._end(problem, state, rows, cycle_seed)
            if work.journal is not None:
                state.save(work.journal)
        return state

    def _step(self, problem: Problem, state: Descent, rows: Tensor, rate: float, seed: int) -> None:
        """Take one step with every start in `rows` whose gradient is finite."""
        gradient = problem.gradient(state.now[rows], rows.tolist(), seed)
        good = gradient.isfinite().all(-1)
        state.skipped[rows[~good]] += 1
        state.active &= state.skipped <= self.skips
        rows, gradient = rows[good], gradient[good]
        size = torch.linalg.vector_norm(gradient, dim=-1)
        state.size[rows] = size
        gradient = gradient * (self.clip / size.clamp(min=self.clip))[:, None]
        steps = state.steps[rows] + 1
        state.steps[rows] = steps
        first = _BETAS[0] * state.first[rows] + (1 - _BETAS[0]) * gradient
        second = _BETAS[1] * state.second[rows] + (1 - _BETAS[1]) * gradient.square()
        state.first[rows], state.second[rows] = first, second
        first = first / (1 - _BETAS[0] ** steps)[:, None]
        second = second / (1 - _BETAS[1] ** steps)[:, None]
        # A gradient that is zero but for rounding, as at q = p, must not be scaled up to whole steps.
        now = state.now[rows] - (rate * state.factor[rows])[:, None] * first / (second.sqrt() + _EPSILON)
        state.now[rows] = now
        share = 1 / (1 + steps / 10).clamp(max=_STEPS_IN_AVERAGE)
        state.average[rows] = torch.lerp(state.average[rows], now, share[:, None])

    def _judge(self, problem: Problem, state: Descent, rows: Tensor, seed: int) -> None:
        """Keep averages that are the best so far; put a start that diverged back to its best weights, at half the rate."""
        loss = _mean_loss(problem, state.average[rows], rows, seed)
        better = loss < state.loss[rows]
        state.best[rows[better]] = state.average[rows[better]]
        state.loss[rows[better]] = loss[better]
        lost = rows[~(loss <= state.loss[rows] + 1)]
        state.reset(lost, now=state.best[lost], average=state.best[lost], factor=state.factor[lost] / 2)

    def _end(self, problem: Problem, state: Descent, rows: Tensor, seed: int) -> None:
        """Mark the starts that have settled, and those that aren't worth another cycle."""
        before, after = (problem.losses(one[rows], rows.tolist(), seed) for one in (state.before, state.best))
        gained = before - after
        gain, error = gained.mean(-1), gained.std(-1) / math.sqrt(gained.shape[-1])
        gain = gain.nan_to_num(math.inf, math.inf)
        state.gain[rows] = gain
        state.settled[rows] = gain <= torch.maximum(2 * error.nan_to_num(0.0), torch.full_like(gain, self.tolerance))
        state.active &= ~state.settled & (state.loss <= state.loss.min() + _NEAR_BEST)

    def finish(self, optima: Sequence[Optimum], state: Descent, winner: int, *notes: str) -> Solution:
        """Return the solution, with notes on skipped steps and on a descent that hasn't settled."""
        said, skipped = list(notes), int(state.skipped.sum())
        if skipped:
            said.append(f"{skipped} steps were skipped because their gradient wasn't finite")
        if not optima[0].converged:
            said.append(
                f"the last cycle still gained {float(state.gain[winner]):.2g} nats: give "
                f"solver={type(self).__name__}(cycles={2 * self.cycles}) or more cycles to see whether it gains further"
            )
        steps, residual = min(int(state.rounds) * _STEPS_PER_ROUND, self.steps * self.cycles), float(state.size[winner])
        return Solution(tuple(optima), steps, residual, notes=tuple(said), history=tuple(state.history.tolist()))


def judging_seed(seed: int) -> int:
    """Return the seed of the draws on which the ends of a descent are compared, which the descent hasn't seen."""
    return (seed + 77) % 2**31


def _seed(seed: int, number: int) -> int:
    """Return the seed for the draws of a step (even numbers) or of a cycle (odd numbers)."""
    return (1_000_003 * (seed + 1) + 7_919 * number) % 2**31


def _mean_loss(problem: Problem, theta: Tensor, rows: Tensor, seed: int) -> Float[Tensor, " s"]:
    return problem.losses(theta, rows.tolist(), seed).mean(-1).nan_to_num(math.inf, math.inf)
