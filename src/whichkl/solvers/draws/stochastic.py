"""Stochastic: minibatch gradient descent on the likelihood, for families that are networks; resumable, stopped early."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, ClassVar

import torch

from whichkl._checks import InputError, cannot
from whichkl.families.family import Family, log_likelihood
from whichkl.families.network_family import NetworkFamily
from whichkl.objectives import Direction
from whichkl.process.seeds import seeded
from whichkl.solvers.descent import grouped, warm_cosine
from whichkl.solvers.draws.batches import Data, data_of, generator_for
from whichkl.solvers.draws.proposal_correction import train_from_proposal, wastes_rows
from whichkl.solvers.draws.training import Criterion, Likelihood, Training
from whichkl.solvers.solver import Held, Optimum, Solution, Solver, check_counts, check_positive
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_RATES = (5e-4, 1.5e-3, 5e-3)
"""Learning rates to try on deep networks of this library."""
_RATES_OF_OTHERS = (*_RATES, 1.5e-2, 5e-2, 0.15)
"""Learning rates to try on users' modules and linear models, whose weights can be far from their optimum."""
TRIAL = 100
"""Number of steps of a trial of a learning rate."""
_MAX_WARM_UP_STEPS = 100
"""Largest number of steps in which the learning rate rises; it rises over 5 % of a shorter schedule."""
_MAX_RESTARTS = 5
"""Largest number of rounds that may diverge; each halves the learning rate."""
_FLAT = (0.002, 0.05)
"""Nats. A loss that falls by at most half a standard error, kept within this range, in the second half counts as flat."""


@dataclass(frozen=True)
class Stochastic(Solver):
    """argmin KL(p‖q) over a network's weights: AdamW on batches, warm-up and cosine decay, clipped gradients.

    The weights are averaged over about the last hundred steps. A tenth of the rows (at most 20,000) are validation rows. The
    average with the least loss on them is the answer, and training stops when it hasn't improved for `patience` of the schedule.
    Rows in memory are shuffled fully; a stream's parts are shuffled, and its rows within a buffer. The learning rate is chosen by
    short trials. A round that ends worse than the start returns to the best weights, at half the rate. Gradient descent finds a
    local optimum, which depends on the seed.

    Args:
        steps: approximate number of batches in the schedule, if `epochs` isn't given.
        epochs: number of passes over the rows; by default from `steps`, at least 2 and at most 200.
        batch: number of rows per batch; by default a 64th of the rows, at least 32 and at most 1,024.
        learning_rate: peak learning rate; by default chosen by trials of 100 steps.
        weight_decay: for the matrices of this library's networks; a user's module has none.
        clip: largest norm of a gradient of the mean loss.
        patience: share of the schedule without improvement after which training stops.
        skips: largest number of batches whose loss isn't finite; with more, training is given up.

    Raises:
        InputError: a field is out of range.

    Source: Loshchilov & Hutter (2017, 2019); averages, Polyak & Juditsky (1992); early stopping, Prechelt (1998).

    >>> Stochastic(epochs=10).quick().epochs
    3
    """

    name = "stochastic"
    refits = False
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
        check_counts(self, steps=1, epochs=1, batch=1, skips=1)
        check_positive(self, "learning_rate", "clip", "patience")
        if not 0 <= self.weight_decay < math.inf:
            because = f"`weight_decay={self.weight_decay!r}` is negative or not a number"
            raise InputError(cannot(f"use `{type(self).__name__}`", because, "Give 0 or more"))

    def quick(self) -> Stochastic:
        """Return a solver with a quarter of the schedule."""
        epochs = None if self.epochs is None else -(-self.epochs // 4)
        return replace(self, steps=max(1, self.steps // 4), epochs=epochs)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Train on p's rows; if few of these count by their weights, see `proposal_correction`."""
        if wastes_rows(target):
            return train_from_proposal(self, target, family, seed, work, stride)
        return self.train(target, family, seed, work, stride)

    def train(self, target: Target, family: Family, seed: int, work: Work, stride: int) -> Solution:
        """Train on p's rows, and return the weights with the least loss on the validation rows."""
        if not isinstance(family, NetworkFamily):
            raise TypeError(family)
        work.tell("reading the rows", math.nan)
        data, criterion = self._problem(target, family, seed, work, stride)
        total = self._total(data, criterion)
        rounds = max(1, math.ceil(total / data.batches.steps))
        run = self._begin(family, criterion, data, seed)
        if work.journal is None or not run.read(work.journal):
            run.rate = self.learning_rate or self._best_rate(family, criterion, data, seed, work)
            run.judge(data.read(data.validation))
            run.start_loss = run.best_loss
        while run.round < rounds and not (run.round and criterion.evaluations.is_spent):
            if self._is_early(run, rounds) or self._has_failed(run):
                break
            work.tell(f"training, loss {run.best_loss:.4g} on unseen rows", run.round / rounds)
            self._round(run, data, total, seed)
            if work.journal is not None:
                run.write(work.journal)
        if not math.isfinite(run.best_loss):
            because = run.trouble or f"its {criterion.what} is infinite or NaN on unseen rows"
            raise InputError(cannot(f"train `{family}`", because, criterion.instead))
        return self._solution(run, data, rounds, total, target)

    def _problem(self, target: Target, family: NetworkFamily, seed: int, work: Work, stride: int) -> tuple[Data, Criterion]:
        """Return the rows, and the criterion that is minimised on them."""
        data = data_of(target, family, seed, work, stride, self.batch)
        return data, Likelihood(family, data.kept, target.stream is not None)

    def _begin(self, family: NetworkFamily, criterion: Criterion, data: Data, seed: int) -> Training:
        """Build the module, the same one for a seed, and refuse it if it isn't a law of such rows."""
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
                raise InputError(cannot(f"train `{family}`", because, "Correct the module")) from error
        if not value.requires_grad:
            because = "its `log_prob` doesn't depend on its weights"
            raise InputError(cannot(f"train `{family}`", because, "Build the law of parameters in `forward`"))
        # A family whose weights have a meaning, such as a user's module, has no weight decay.
        groups = grouped(module, self.weight_decay if family.decays else 0.0)
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
        return Training(module, optimizer, self.clip, family=family, criterion=criterion, model=model)

    def _best_rate(self, family: NetworkFamily, criterion: Criterion, data: Data, seed: int, work: Work) -> float:
        """Train for `TRIAL` steps at each rate from the same start; return the one with the least loss on unseen rows."""
        found = []
        rates = self._rates(family)
        for i, rate in enumerate(rates):
            work.tell("trying learning rates", i / len(rates))
            run = self._begin(family, criterion, data, seed)
            generator = generator_for(seed, -2)
            with seeded(seed):
                for step, block in enumerate(islice(cycle(data.batches.round(0)), TRIAL)):
                    run.step(data.read(block), rate * min(1.0, (step + 1) / (TRIAL / 10)), generator)
            found.append((run.judge(data.read(data.validation)), rate))
        return min(found)[1]

    def _rates(self, family: NetworkFamily) -> tuple[float, ...]:
        """Return the learning rates to try."""
        deep: Any = getattr(family, "hidden", None)
        return _RATES if family.decays and deep else _RATES_OF_OTHERS

    def _round(self, run: Training, data: Data, total: int, seed: int) -> None:
        """Train for one round, judge it, and return to the best weights if it diverged."""
        batches, warm = data.batches, min(_MAX_WARM_UP_STEPS / total, 0.05)
        left = total - run.round * batches.steps
        generator = generator_for(seed, 2**20 + run.round)
        with seeded((seed + 7_919 * (run.round + 1)) % 2**32):
            for i, block in enumerate(islice(batches.round(run.round), left if left < batches.steps else None)):
                done = min(run.round * batches.steps + i, (run.round + 1) * batches.steps, total) / total
                run.step(data.read(block), run.rate * warm_cosine(done, warm, 1 / (warm * total + 1)), generator)
                if run.skipped > self.skips or run.criterion.evaluations.is_spent:
                    break
        loss = run.judge(data.read(data.validation))
        run.round += 1
        if run.best and not loss <= run.start_loss + 1:
            run.restore()

    def _total(self, data: Data, criterion: Criterion) -> int:
        """Return the steps of the schedule."""
        per_epoch = data.batches.per_epoch * data.batches.steps
        epochs = self.epochs or min(max(2, round(self.steps / per_epoch)), 200)
        return max(1, round(epochs * per_epoch))

    def _is_early(self, run: Training, rounds: int) -> bool:
        return run.since >= max(5, math.ceil(self.patience * rounds))

    def _has_failed(self, run: Training) -> bool:
        return run.skipped > self.skips or run.factor < 0.5**_MAX_RESTARTS

    def _solution(self, run: Training, data: Data, rounds: int, total: int, target: Target) -> Solution:
        """Return the best weights, with notes on a training that failed, skipped batches, or ended while the loss still fell."""
        run.module.load_state_dict(run.best)
        model = run.family.finished(run.module, data.shape)
        failed, is_spent = self._has_failed(run), run.criterion.evaluations.is_spent
        fall = run.history[(len(run.history) - 1) // 2] - run.best_loss
        is_flat = run.round >= rounds and not is_spent and fall <= min(max(_FLAT[0], run.best_error / 2), _FLAT[1])
        converged = not failed and (self._is_early(run, rounds) or is_flat)
        notes = [*run.criterion.notes, *run.family.remarks(data.summary, target.names)]
        if failed:
            why = f"{run.skipped} batches were skipped ({run.trouble})" if run.skipped else "its loss rose again and again"
            notes.append(f"training was given up in round {run.round} of {rounds}: {why}; the best weights before are kept")
        elif run.skipped:
            notes.append(f"{run.skipped} batches were skipped: {run.trouble}")
        if not (failed or converged):
            epochs = round(total / (data.batches.per_epoch * data.batches.steps))
            notes.append(
                f"the loss still fell by {fall:.2g} nats in the second half of {epochs} epochs: give "
                f"solver={type(self).__name__}(epochs={2 * epochs}) or more epochs to see whether it falls further"
            )
        loss = run.criterion.scale * run.criterion.final(model, run.best_loss)
        best = Optimum(model, loss, converged, is_global=True)
        held = None if data.held is None else Held(data.held, model)
        steps, history = min(total, run.round * data.batches.steps), tuple(run.criterion.scale * one for one in run.history)
        return Solution((best,), steps, run.gradient, held=held, notes=tuple(notes), history=history)
