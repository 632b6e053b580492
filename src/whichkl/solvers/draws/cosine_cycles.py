"""Cycles: stochastic descent from several starts as one batch, in cosine cycles until a whole one gains nothing; resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.files.journal import Journal, tensors_behind
from whichkl.solvers.descent import warm_cosine
from whichkl.solvers.work import Work

Gradient = Callable[[Float[Tensor, "s p"], list[int], int], Float[Tensor, "s p"]]
"""Weights, a row a start, which starts these are, a seed → an unbiased gradient of each loss; NaN where it can't be had."""
Losses = Callable[[Float[Tensor, "s p"], list[int], int], Float[Tensor, "s m"]]
"""The same → log q − log p on m draws; the same seed gives the same noise."""

_ROUND = 50
_WARM = 20
_SLOWER = 0.7
"""What the rate is multiplied by from cycle to cycle."""
_MEMORY = 100
_CLOSE = 3.0
"""Starts that end a cycle so many nats above the best one aren't followed further."""
_BETAS, _TINY = (0.9, 0.99), 1e-8
_ENTRY = "cycles"


@dataclass
class Descent:
    """Where every start is: its weights, Adam's moments, the average of the last hundred steps or so, the best average."""

    now: Float[Tensor, "s p"]
    first: Float[Tensor, "s p"]
    second: Float[Tensor, "s p"]
    average: Float[Tensor, "s p"]
    best: Float[Tensor, "s p"]
    loss: Float[Tensor, " s"]
    """Mean of log q − log p on the fixed draws of this cycle, under the best weights."""
    before: Float[Tensor, "s p"]
    """The best weights when this cycle began."""
    steps: Float[Tensor, " s"]
    """Steps since the moments were last forgotten."""
    factor: Float[Tensor, " s"]
    """What the rate was multiplied by, after rounds that diverged."""
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
        zero, row = torch.zeros_like(start), torch.zeros_like(start[:, 0])
        no = torch.zeros_like(row, dtype=torch.bool)
        endless = row + math.inf
        return cls(
            *(start.clone(), zero, zero.clone(), start.clone(), start.clone(), endless, start.clone()),
            *(row, row + 1, row.clone(), endless.clone(), ~no, no, endless.clone(), row[:1].clone(), row[:0].clone()),
        )

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
class Cycles:
    """Adam in cosine cycles, each from the best weights of the one before, and slower.

    A start has settled where a whole cycle gained less than `tolerance` nats, or less than two standard errors of that
    gain, which is measured on the same draws before and after.

    Args:
        gradient: of the loss of each start.
        losses: on the draws by which starts are judged; new ones every cycle.
        rate: of the first cycle, at its peak.
        steps: of a cycle.
        most: cycles.
        clip: the largest length of a gradient.
        tolerance: nats.
        skips: steps with a gradient that isn't finite, after which a start is given up.

    Source: Kingma & Ba (2015); Loshchilov & Hutter (2017) for the cycles.
    """

    gradient: Gradient
    losses: Losses
    rate: float
    steps: int
    most: int
    clip: float
    tolerance: float
    skips: int

    def run(self, start: Float[Tensor, "s p"], seed: int, work: Work) -> Descent:
        """Descend from all starts."""
        state, per_cycle = Descent.at(start), max(1, math.ceil(self.steps / _ROUND))
        if work.journal is not None:
            state.resume(work.journal)
        while (
            bool(state.active.any()) and int(state.rounds) < self.most * per_cycle and not (int(state.rounds) and work.is_spent)
        ):
            cycle, within = divmod(int(state.rounds), per_cycle)
            loss = float(state.loss.min())
            shown = "" if math.isinf(loss) else f", ELBO {-loss:.4g}"
            work.tell(f"descending{shown}", int(state.rounds) / (self.most * per_cycle))
            judged_by = _seed(seed, 2 * cycle + 1)
            if within == 0:
                self._begin(state, judged_by)
            count = min(_ROUND, self.steps - within * _ROUND)
            for i in range(count):
                done = (within * _ROUND + i) / self.steps
                self._step(state, self.rate * _SLOWER**cycle * _schedule(done, self.steps), _seed(seed, 2 * _at(state, i)))
            self._judge(state, judged_by)
            state.rounds += 1
            state.history = torch.cat([state.history, state.loss.min()[None]])
            if within == per_cycle - 1:
                self._end(state, judged_by)
            if work.journal is not None:
                state.save(work.journal)
        return state

    def _begin(self, state: Descent, seed: int) -> None:
        """Go on from the best weights, on new draws to judge by."""
        on = state.active
        for name in ("now", "average", "before"):
            getattr(state, name)[on] = state.best[on]
        for name in ("first", "second", "steps"):
            getattr(state, name)[on] = 0.0
        state.loss[on] = self.losses(state.best[on], on.nonzero()[:, 0].tolist(), seed).mean(-1).nan_to_num(math.inf, math.inf)

    def _step(self, state: Descent, rate: float, seed: int) -> None:
        """One step of every active start whose gradient is finite."""
        rows = state.active.nonzero()[:, 0]
        if len(rows) == 0:
            return
        gradient = self.gradient(state.now[rows], rows.tolist(), seed)
        good = gradient.isfinite().all(-1)
        state.skipped[rows[~good]] += 1
        state.active &= state.skipped <= self.skips
        rows, gradient = rows[good], gradient[good]
        if len(rows) == 0:
            return
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
        # A gradient that is zero but for rounding, as at q = p, mustn't be blown up to whole steps.
        now = state.now[rows] - (rate * state.factor[rows])[:, None] * first / (second.sqrt() + _TINY)
        state.now[rows] = now
        share = 1 / (1 + steps / 10).clamp(max=_MEMORY)
        state.average[rows] = torch.lerp(state.average[rows], now, share[:, None])

    def _judge(self, state: Descent, seed: int) -> None:
        """Keep averages that are the best so far; send a start that diverged back to its best weights, more slowly."""
        rows = state.active.nonzero()[:, 0]
        if len(rows) == 0:
            return
        loss = self.losses(state.average[rows], rows.tolist(), seed).mean(-1).nan_to_num(math.inf, math.inf)
        better = loss < state.loss[rows]
        state.best[rows[better]] = state.average[rows[better]]
        state.loss[rows[better]] = loss[better]
        lost = rows[~(loss <= state.loss[rows] + 1)]
        state.now[lost] = state.average[lost] = state.best[lost]
        state.first[lost] = state.second[lost] = 0.0
        state.steps[lost] = 0.0
        state.factor[lost] /= 2

    def _end(self, state: Descent, seed: int) -> None:
        """Say which starts have settled, and which aren't worth another cycle."""
        rows = state.active.nonzero()[:, 0]
        if len(rows) == 0:
            return
        which = rows.tolist()
        gained = self.losses(state.before[rows], which, seed) - self.losses(state.best[rows], which, seed)
        gain, error = gained.mean(-1), gained.std(-1) / math.sqrt(gained.shape[-1])
        gain = gain.nan_to_num(math.inf, math.inf)
        state.gain[rows] = gain
        state.settled[rows] = gain <= torch.maximum(2 * error.nan_to_num(0.0), torch.full_like(gain, self.tolerance))
        state.active &= ~state.settled & (state.loss <= state.loss.min() + _CLOSE)


def _at(state: Descent, i: int) -> int:
    """The number of a step among all."""
    return int(state.rounds) * _ROUND + i


def _seed(seed: int, number: int) -> int:
    """A seed for the draws of a step (even numbers) or of a cycle (odd ones)."""
    return (1_000_003 * (seed + 1) + 7_919 * number) % 2**31


def _schedule(done: float, total: int) -> float:
    """Rise over `_WARM` steps, then fall as a cosine to a hundredth."""
    warm = min(_WARM / total, 0.1)
    return warm_cosine(done, warm, 1 / (warm * total + 1))
