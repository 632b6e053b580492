"""Training: the epochs of a student's run, and how it is saved and resumed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whichkl._checks import InputError, cannot
from whichkl.distillation.examples import Batch, Examples
from whichkl.distillation.networks import Teacher, logits_of
from whichkl.distillation.objective import Loss
from whichkl.files.journal import Journal
from whichkl.process.seeds import seeded
from whichkl.solvers import descent
from whichkl.solvers.descent import grouped, warm_cosine

_MIN_SECONDS_BETWEEN_ENTRIES = 1.0
"""Shortest time between two entries of the journal: short epochs would spend their time on the disk."""


@dataclass
class Run(descent.Run):
    """A student under training; its rounds are epochs."""

    entry: ClassVar[str] = "distillation"
    numbers: ClassVar[dict[str, type]] = {**descent.Run.numbers, "best_round": int, "seen": int}

    loss: Loss = field(kw_only=True)
    best_round: int = 0
    """Epochs after which the best weights were found."""
    seen: int = 0
    """Number of examples trained on, counted once per pass."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """The mean loss while training, and on the examples to stop by, of each epoch; first of all that of the start."""
    saved: float = -math.inf

    def train(self, examples: Examples, teacher: Teacher, epochs: int, rate: float, seed: int, skips: int) -> float:
        """Train one epoch; return the mean loss of its batches."""
        self.module.train()
        total, rows, count = 0.0, 0, examples.count
        with seeded((seed + 7_919 * (self.round + 1)) % 2**32):
            for i, batch in enumerate(examples.batches(teacher, (seed + 104_729 * (self.round + 1)) % 2**32)):
                done = (self.round + (0.0 if count is None else i / count)) / epochs
                self.seen += len(batch.teacher)
                value = self.descend(partial(self._mean, batch), rate * warm_cosine(done, 0.02, 0.1))
                if math.isfinite(value):
                    total, rows = total + value * len(batch.teacher), rows + len(batch.teacher)
                if self.skipped > skips:
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

    def write(self, journal: Journal, *, last: bool) -> None:
        """Save everything that the next epoch depends on; at most once a second, except for the last."""
        if last or time.monotonic() - self.saved >= _MIN_SECONDS_BETWEEN_ENTRIES:
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


def new_run(student: nn.Module, loss: Loss, optimizer: str, decay: float, clip: float) -> Run:
    """Return a run by Adam or AdamW, with weight decay on matrices and kernels alone (Loshchilov & Hutter, 2019).

    Raises:
        InputError: no weight asks for a gradient, or the optimizer isn't known.
    """
    if not any(one.requires_grad for one in student.parameters()):
        because = "none of its parameters asks for a gradient"
        raise InputError(cannot("train this student", because, "Make them `nn.Parameter`s that do"))
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    if optimizer not in kinds:
        raise InputError(cannot(f"use optimizer={optimizer!r}", "it isn't known", "Use adamw or adam"))
    return Run(student, kinds[optimizer](grouped(student, decay), lr=1e-3), clip, loss=loss)


def checked_labels(labels: Tensor | None, classes: int) -> Tensor:
    """Refuse missing labels, and labels of a class that the logits don't have.

    Raises:
        InputError: either.
    """
    if labels is None:
        because = "the data have none"
        raise InputError(cannot("mix in hard labels", because, "Pass (x, labels), or hard_label_weight=0"))
    if len(labels) and int(labels.max()) >= classes:
        because = f"one is {int(labels.max())}, and there are {classes} classes, numbered from 0"
        raise InputError(cannot("use these labels", because, "Correct them, or the number of logits"))
    return labels
