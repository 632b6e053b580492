"""Training: the loss, the epochs of a student's run, and how it is saved and resumed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.examples import Batch, Examples
from whichkl.distillation.losses import RowDivergence, of_logits
from whichkl.distillation.losses.specs import spec_of
from whichkl.distillation.networks import Teacher, logits_of
from whichkl.files.journal import Journal
from whichkl.process.seeds import seeded
from whichkl.solvers import descent
from whichkl.solvers.descent import warm_cosine

_MAX_SKIPPED_BATCHES = 20
"""Most batches whose loss isn't a number; after more, training is given up."""
_MIN_SECONDS_BETWEEN_ENTRIES = 1.0
"""Shortest time between two entries of the journal: short epochs would spend their time on the disk."""


@dataclass(frozen=True)
class Loss:
    """(1 − w) · D(teacher, student) + w · cross-entropy of the labels, w = `hard_label_weight`, a number a row.

    D is taken with both logits divided by the temperature, and multiplied by its square only where `temperature_squared` says
    so; the cross-entropy is always at temperature 1. Source: Hinton, Vinyals & Dean (2015).
    """

    divergence: RowDivergence
    hard_label_weight: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = False

    def rows(self, teacher: Float[Tensor, "n c"], student: Float[Tensor, "n c"], labels: Int[Tensor, " n"] | None) -> Tensor:
        """Return the loss of each row, in nats where temperature² isn't in it."""
        w, soft, hard = self.hard_label_weight, None, None
        if w < 1:
            how: dict[str, Any] = {"temperature": self.temperature, "temperature_squared": self.temperature_squared}
            soft = of_logits(self.divergence, teacher=teacher, student=student, reduction="none", **how)
        if w > 0 and labels is not None:
            wide = student if student.dtype == torch.float64 else student.float()
            hard = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
        if soft is None or hard is None:
            return soft if hard is None else hard  # type: ignore[return-value]
        return (1 - w) * soft + w * hard

    def __str__(self) -> str:
        """Such as ``0.7 · T² · forward_kl at T = 4 + 0.3 · cross-entropy of the labels``."""
        w = self.hard_label_weight
        if w == 1:
            return "cross-entropy of the labels"
        weight = "" if w == 0 else f"{1 - w:.4g} · "
        factor = "T² · " if self.temperature_squared else ""
        at = "" if self.temperature == 1 else f" at T = {self.temperature:g}"
        return f"{weight}{factor}{spec_of(self.divergence)}{at}" + ("" if w == 0 else f" + {w:.4g} · cross-entropy of the labels")


@dataclass
class Run(descent.Run):
    """A student under training; its rounds are epochs."""

    entry: ClassVar[str] = "distillation"
    numbers: ClassVar[dict[str, type]] = {**descent.Run.numbers, "best_round": int, "seen": int}

    loss: Loss = field(kw_only=True)
    settings: dict[str, Any] = field(kw_only=True)
    """The arguments of `distill`."""
    best_round: int = 0
    """Epochs after which the best weights were found."""
    seen: int = 0
    """Number of examples trained on, counted once per pass."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """The mean loss while training, and on the examples to stop by, of each epoch; first of all that of the start."""
    saved: float = -math.inf

    @property
    def is_stopped(self) -> bool:
        """Whether the loss hasn't fallen for as many epochs as the patience allows."""
        patience = self.settings["patience"]
        return patience is not None and self.since >= patience

    @property
    def is_done(self) -> bool:
        """Whether no epoch is left."""
        return self.round >= self.settings["epochs"] or self.is_stopped

    @property
    def is_given_up(self) -> bool:
        """Whether more batches than are allowed couldn't be used."""
        return self.skipped > _MAX_SKIPPED_BATCHES

    def train(self, examples: Examples, teacher: Teacher) -> float:
        """Train one epoch; return the mean loss of its batches."""
        self.module.train()
        total, rows, count = 0.0, 0, examples.count
        epochs, rate, seed = (self.settings[name] for name in ("epochs", "learning_rate", "seed"))
        # two primes, so that dropout and the order of the examples have unrelated seeds in each epoch
        with seeded((seed + 7_919 * (self.round + 1)) % 2**32):
            for i, batch in enumerate(examples.batches(teacher, (seed + 104_729 * (self.round + 1)) % 2**32)):
                done = (self.round + (0.0 if count is None else i / count)) / epochs
                self.seen += len(batch.teacher)
                value = self.descend(partial(self._mean, batch), rate * warm_cosine(done, 0.02, 0.1))
                if math.isfinite(value):
                    total, rows = total + value * len(batch.teacher), rows + len(batch.teacher)
                if self.is_given_up:
                    break
        self.round += 1
        return total / rows if rows else math.nan

    def judge(self, examples: Examples, teacher: Teacher, trained: float = math.nan) -> float:
        """Measure the loss on the examples for stopping, and keep the weights where it is the lowest so far."""
        self.module.eval()
        with torch.no_grad(), seeded(0):
            parts = [self._rows(batch) for batch in examples.batches(teacher)]
        loss = float(torch.cat(parts).double().mean())
        if self.keep(loss):
            self.best_round = self.round
        self.history.append((trained, loss))
        return loss

    def write(self, journal: Journal) -> None:
        """Save everything that the next epoch depends on; at most once a second, except for the last."""
        if self.is_done or time.monotonic() - self.saved >= _MIN_SECONDS_BETWEEN_ENTRIES:
            self.save(journal, {}, {"history": [[str(a), str(b)] for a, b in self.history]})
            self.saved = time.monotonic()

    def read(self, journal: Journal) -> bool:
        """Restore what `write` wrote; return whether there was anything."""
        return self.resume(journal, lambda _, notes: {"history": [(float(a), float(b)) for a, b in notes["history"]]})

    def _mean(self, batch: Batch) -> Tensor:
        return self._rows(batch).mean()

    def _rows(self, batch: Batch) -> Tensor:
        student = logits_of(self.module, batch.x, "student")
        if student.shape != batch.teacher.shape:
            because = f"it returns shape {tuple(student.shape)}, the teacher {tuple(batch.teacher.shape)}"
            raise InputError(cannot("train this student", because, "Give both the same classes"))
        labels = batch.labels
        if self.loss.hard_label_weight > 0:
            labels = checked_labels(labels, student.shape[-1]).to(student.device)
        return self.loss.rows(batch.teacher.to(student.device), student, labels)


def checked_labels(labels: Tensor | None, classes: int) -> Tensor:
    """Refuse missing labels, and labels of a class that the logits don't have."""
    if labels is None:
        because = "the data have none"
        raise InputError(cannot("mix in hard labels", because, "Pass (x, labels), or hard_label_weight=0"))
    if len(labels) and int(labels.max()) >= classes:
        because = f"one is {int(labels.max())}, and there are {classes} classes, numbered from 0"
        raise InputError(cannot("use these labels", because, "Correct them, or the number of logits"))
    return labels
