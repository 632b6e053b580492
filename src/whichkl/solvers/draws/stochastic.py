"""Stochastic: minibatch gradient descent on the likelihood, for families that are networks; resumable, stopped early."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, ClassVar

from whichkl._checks import InputError, cannot
from whichkl.families.family import Family, log_likelihood
from whichkl.families.network_family import NetworkFamily
from whichkl.objectives import Direction
from whichkl.process.seeds import seeded
from whichkl.solvers.descent import warm_cosine
from whichkl.solvers.draws.batches import Data, data_of, generator_for
from whichkl.solvers.draws.criterion import Criterion, Likelihood
from whichkl.solvers.draws.training import Training, start_training
from whichkl.solvers.solver import Held, Optimum, Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_RATES = (5e-4, 1.5e-3, 5e-3)
_RATES_OF_FEW = (*_RATES, 1.5e-2, 5e-2, 0.15)
"""The weights of a user's module, and of a linear model, may have a long way to go."""
TRIAL = 100
"""Steps of a trial of a learning rate."""
_WARM = 100
_RESTARTS = 5
_FLAT = (0.002, 0.05)
"""Nats by which a loss may fall in the second half of the schedule and count as flat: half a standard error, within these."""


@dataclass(frozen=True)
class Stochastic(Solver):
    """argmin KL(p‖q) over a network's weights: AdamW on batches, warm-up and cosine decay, clipped gradients.

    The weights are averaged over the last hundred steps or so. A tenth of the rows (20,000 at most) is set aside: the averages
    that do best on them are the answer, and training stops when they haven't been bettered for `patience` of the schedule.
    Rows in memory are shuffled fully, a stream's parts by their order and its rows within a buffer. A learning rate is chosen
    by short trials. A round that ends worse than the start goes back to the best weights, at half the rate. Gradient descent
    finds a local optimum, which depends on the seed.

    Args:
        steps: about how many batches the schedule has, where `epochs` doesn't say.
        epochs: passes over the rows; by `steps` unless said, but 2 at least and 200 at most.
        batch: rows of a batch; a 64th of the rows unless said, 32 at least and 1,024 at most.
        learning_rate: its peak; by trials of 100 steps unless said.
        weight_decay: of the matrices of this library's networks; never of a user's module.
        clip: the largest norm of a gradient of the mean loss.
        patience: the part of the schedule without improvement after which training stops.
        skips: batches with a loss that isn't finite, before it's given up.

    Raises:
        InputError: a field is out of range.

    Source: Loshchilov & Hutter (2017, 2019); averages, Polyak & Juditsky (1992); early stopping, Prechelt (1998).

    >>> Stochastic(epochs=10).quick().epochs
    3
    """

    name: ClassVar[str] = "stochastic"
    refits: ClassVar[bool] = False
    direction: ClassVar[Direction] = "forward"
    families: ClassVar[tuple[type[Family], ...]] = (NetworkFamily,)

    steps: int = 4_000
    epochs: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.01
    clip: float = 5.0
    patience: float = 0.2
    skips: int = 20

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("steps", "epochs", "batch", "skips"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                because = f"`{name}={value!r}` isn't a whole number of at least 1"
                raise InputError(cannot("use `Stochastic`", because, f"Give, say, {name}=10"))
        for name in ("learning_rate", "clip", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                because = f"`{name}={value!r}` isn't a positive number"
                raise InputError(cannot("use `Stochastic`", because, f"Leave `{name}` out"))
        if not 0 <= self.weight_decay < math.inf:
            because = f"`weight_decay={self.weight_decay!r}` is negative or not a number"
            raise InputError(cannot("use `Stochastic`", because, "Give 0 or more"))

    def quick(self) -> Stochastic:
        """A quarter of the schedule."""
        epochs = None if self.epochs is None else -(-self.epochs // 4)
        return replace(self, steps=max(1, self.steps // 4), epochs=epochs)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Train on p's rows, and return the weights that did best on the rows set aside."""
        if not isinstance(family, NetworkFamily):
            raise TypeError(family)
        work.tell("looking at the rows", math.nan)
        data, criterion = self._problem(target, family, seed, work, stride)
        total = self._total(data, criterion)
        rounds = max(1, math.ceil(total / data.batches.steps))
        run = self._begin(family, criterion, data, seed)
        rate = None if work.journal is None else run.read(work.journal)
        if rate is None:
            rate = self.learning_rate or self._best_rate(family, criterion, data, seed, work)
            run.judge(data.read(data.validation))
            run.start_loss = run.best_loss
        while run.round < rounds and not self._is_over(run, rounds) and not (run.round and criterion.is_spent):
            work.tell(f"training, loss {run.best_loss:.4g} on unseen rows", run.round / rounds)
            self._round(run, data, rate, total, seed)
            if work.journal is not None:
                run.write(work.journal, rate)
        if not math.isfinite(run.best_loss):
            because = run.trouble or f"its {criterion.what} is infinite or NaN on unseen rows"
            raise InputError(cannot(f"train `{family}`", because, criterion.instead))
        return self._solution(run, data, rounds, total, target)

    def _problem(self, target: Target, family: NetworkFamily, seed: int, work: Work, stride: int) -> tuple[Data, Criterion]:
        """Return the rows, and what is minimised on them."""
        data = data_of(target, family, seed, work, stride, self.batch)
        return data, Likelihood(family, data.kept, target.stream is not None)

    def _begin(self, family: NetworkFamily, criterion: Criterion, data: Data, seed: int) -> Training:
        """Build the module, the same for a seed, and refuse it where it isn't a law of such rows."""
        x = data.validation.x
        with seeded(seed):
            module = family.start(data.summary, data.shape).to(x.device)
            few = data.validation.take(slice(0, 32))  # type: ignore[arg-type]
            try:
                model: Any = family.wrap(module.train(), data.shape)
                value = log_likelihood(model, few.x, few.context)
            except InputError:
                raise
            except (ValueError, RuntimeError, IndexError, TypeError) as error:
                because = f"it fails on {len(few)} rows of shape {tuple(few.x.shape)} ({' '.join(str(error).split())[:200]})"
                raise InputError(cannot(f"train `{family}`", because, "Correct it")) from error
        if not value.requires_grad:
            because = "its `log_prob` doesn't depend on its weights"
            raise InputError(cannot(f"train `{family}`", because, "Build the law of parameters in `forward`"))
        return start_training(family, criterion, module, model, self.weight_decay, self.clip)

    def _best_rate(self, family: NetworkFamily, criterion: Criterion, data: Data, seed: int, work: Work) -> float:
        """Train for `TRIAL` steps at each rate from the same start; return the one with the least loss on unseen rows."""
        found = []
        rates = self._rates(family)
        for i, rate in enumerate(rates):
            work.tell("trying learning rates", i / len(rates))
            run = self._begin(family, criterion, data, seed)
            generator = generator_for(seed, -2)
            with seeded(seed):
                for step, block in enumerate(islice(_endless(data), TRIAL)):
                    run.step(data.read(block), rate * min(1.0, (step + 1) / (TRIAL / 10)), generator)
            found.append((run.judge(data.read(data.validation)), rate))
        return min(found)[1]

    def _rates(self, family: NetworkFamily) -> tuple[float, ...]:
        """Return the learning rates to try."""
        deep: Any = getattr(family, "hidden", None)
        return _RATES if family.decays and deep else _RATES_OF_FEW

    def _round(self, run: Training, data: Data, rate: float, total: int, seed: int) -> None:
        """Train for one round, judge it, and go back to the best weights where it diverged."""
        batches = data.batches
        left = total - run.round * batches.steps
        generator = generator_for(seed, 2**20 + run.round)
        with seeded((seed + 7_919 * (run.round + 1)) % 2**32):
            for i, block in enumerate(islice(batches.round(run.round), left if left < batches.steps else None)):
                done = min(run.round * batches.steps + i, (run.round + 1) * batches.steps, total) / total
                run.step(data.read(block), rate * _schedule(done, total), generator)
                if run.skipped > self.skips or run.criterion.is_spent:
                    break
        loss = run.judge(data.read(data.validation))
        run.round += 1
        if run.best and not loss <= run.start_loss + 1:
            run.restore(slower=0.5)

    def _total(self, data: Data, criterion: Criterion) -> int:
        """Return the steps of the schedule."""
        per_epoch = data.batches.per_epoch * data.batches.steps
        epochs = self.epochs or min(max(2, round(self.steps / per_epoch)), 200)
        return max(1, round(epochs * per_epoch))

    def _is_over(self, run: Training, rounds: int) -> bool:
        return self._is_stopped(run, rounds) or run.skipped > self.skips or run.factor < 0.5**_RESTARTS

    def _is_stopped(self, run: Training, rounds: int) -> bool:
        return run.since >= max(5, math.ceil(self.patience * rounds))

    def _solution(self, run: Training, data: Data, rounds: int, total: int, target: Target) -> Solution:
        """Say how it ended: early, flat, or stopped in the middle of a fall."""
        run.module.load_state_dict(run.best)
        model = run.family.finished(run.module, data.shape)
        failed = run.skipped > self.skips or run.factor < 0.5**_RESTARTS
        early = self._is_stopped(run, rounds)
        before = run.history[(len(run.history) - 1) // 2]
        flat = (
            run.round >= rounds
            and not run.criterion.is_spent
            and before - run.best_loss <= min(max(_FLAT[0], run.best_error / 2), _FLAT[1])
        )
        notes = [*run.criterion.notes, *run.family.remarks(data.summary, target.names)]
        if failed:
            why = f"{run.skipped} batches were skipped ({run.trouble})" if run.skipped else "its loss rose again and again"
            notes.append(f"training was given up in round {run.round} of {rounds}: {why}; the best weights before are kept")
        if run.skipped and not failed:
            notes.append(f"{run.skipped} batches were skipped: {run.trouble}")
        if not (failed or early or flat):
            fall, epochs = before - run.best_loss, round(total / (data.batches.per_epoch * data.batches.steps))
            also = f"the loss still fell by {fall:.2g} nats in the second half of {epochs} epochs"
            notes.append(f"{also}: give solver={type(self).__name__}(epochs={2 * epochs}), or more, to see whether it goes on")
        loss = run.criterion.scale * run.criterion.final(model, run.best_loss)
        best = Optimum(model, loss, converged=(early or flat) and not failed, is_global=True)
        held = None if data.held is None else Held(data.held, model)
        steps = min(total, run.round * data.batches.steps)
        return Solution(
            (best,),
            iterations=steps,
            residual=run.gradient,
            held=held,
            notes=tuple(notes),
            history=tuple(run.criterion.scale * one for one in run.history),
        )


def _endless(data: Data) -> Any:
    """The batches of the first round, again and again."""
    return cycle(data.batches.round(0))


def _schedule(done: float, total: int) -> float:
    """Rise over 5 % of the steps (100 at most), then fall as a cosine to a hundredth. Source: Loshchilov & Hutter (2017)."""
    warm = min(_WARM / total, 0.05)
    return warm_cosine(done, warm, 1 / (warm * total + 1))
