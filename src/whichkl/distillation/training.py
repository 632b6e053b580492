"""Training: the state of a student's run, its epochs, and how it is saved and resumed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from whichkl._checks import InputError, cannot
from whichkl.distillation.examples import Batch, Examples
from whichkl.distillation.networks import Teacher, logits_of, state_of
from whichkl.distillation.objective import Loss
from whichkl.files.journal import Journal, optimizer_state, tensors_behind
from whichkl.process.seeds import seeded
from whichkl.process.torch_modes import own_defaults

_ENTRY = "distillation"
_MIN_SECONDS_BETWEEN_ENTRIES = 1.0
"""Shortest time between two entries of the journal: short epochs would spend their time on the disk."""
_SAVED_FIELDS: dict[str, type] = {
    "epoch": int,
    "best_loss": float,
    "best_epoch": int,
    "since": int,
    "seen": int,
    "skipped": int,
    "trouble": str,
}


@dataclass
class Run:
    """A student under training, its optimizer, and the best weights so far."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    clip: float
    epoch: int = 0
    """Epochs done."""
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    """The mean loss of the examples to stop by, under the best weights."""
    best_epoch: int = 0
    since: int = 0
    """Epochs since it last fell."""
    seen: int = 0
    """Number of examples trained on, counted once per pass."""
    skipped: int = 0
    trouble: str = ""
    """Why the first skipped batch was skipped."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """The mean loss while training, and on the examples to stop by, of each epoch; first of all that of the start."""
    saved: float = -math.inf

    def train(self, examples: Examples, teacher: Teacher, epochs: int, rate: float, seed: int, skips: int) -> float:
        """Train one epoch; return the mean loss of its batches."""
        self.student.train()
        total, rows, count = 0.0, 0, examples.count
        with seeded((seed + 7_919 * (self.epoch + 1)) % 2**32):
            for i, batch in enumerate(examples.batches(teacher, (seed + 104_729 * (self.epoch + 1)) % 2**32)):
                done = (self.epoch + (0.0 if count is None else i / count)) / epochs
                value = self._step(batch, rate * schedule(done))
                if math.isfinite(value):
                    total, rows = total + value * len(batch.teacher), rows + len(batch.teacher)
                if self.skipped > skips:
                    break
        self.epoch += 1
        return total / rows if rows else math.nan

    def judge(self, examples: Examples, teacher: Teacher, trained: float = math.nan) -> float:
        """Measure the loss on the examples for stopping, and keep the weights where it is the lowest so far."""
        self.student.eval()
        parts = []
        with torch.no_grad(), seeded(0):
            for batch in examples.batches(teacher):
                parts.append(self._rows(batch))
        loss = float(torch.cat(parts).double().mean())
        if loss < self.best_loss:
            self.best_loss, self.best_epoch, self.since = loss, self.epoch, 0
            self.best = state_of(self.student)
        else:
            self.since += 1
        self.history.append((trained, loss))
        return loss

    def save(self, journal: Journal, *, last: bool) -> None:
        """Save everything that the next epoch depends on; at most once a second, except for the last."""
        if not last and time.monotonic() - self.saved < _MIN_SECONDS_BETWEEN_ENTRIES:
            return
        tensors = {f"now.{name}": value for name, value in state_of(self.student).items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value.clone() for name, value in state.items()}
        numbers: dict[str, Any] = {name: getattr(self, name) for name in _SAVED_FIELDS}
        journal.save(_ENTRY, tensors, {**numbers, "history": [[str(a), str(b)] for a, b in self.history]})
        self.saved = time.monotonic()

    def resume(self, journal: Journal) -> bool:
        """Restore what `save` wrote; return whether there was anything."""
        state = state_of(self.student)
        weights = [one for group in self.optimizer.param_groups for one in group["params"]]

        def read(tensors: dict[str, Tensor], notes: dict[str, Any]) -> tuple[Any, ...]:
            numbers = {name: kind(notes[name]) for name, kind in _SAVED_FIELDS.items()}
            numbers |= {
                "history": [(float(a), float(b)) for a, b in notes["history"]],
                "best": tensors_behind("best.", tensors, state),
            }
            return tensors_behind("now.", tensors, state), optimizer_state("adam.", tensors, weights), numbers

        found = journal.load(_ENTRY, read)
        if found is None:
            return False
        now, adam, numbers = found
        self.student.load_state_dict(now)
        self.optimizer.load_state_dict({"state": adam, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for name, value in numbers.items():
            setattr(self, name, value)
        return True

    def _step(self, batch: Batch, rate: float) -> float:
        """Take one step, or skip a batch whose loss or gradient isn't finite; return the loss."""
        self.seen += len(batch.teacher)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._rows(batch).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            return self._skip(f"its loss was {'NaN' if math.isnan(value) else 'infinite'}")
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.student.parameters(), self.clip))
        if not math.isfinite(norm):
            return self._skip("its gradient was NaN or infinite")
        with own_defaults():  # it counts its steps in a tensor
            self.optimizer.step()
        return value

    def _rows(self, batch: Batch) -> Tensor:
        student = logits_of(self.student, batch.x, "student")
        if student.shape != batch.teacher.shape:
            because = f"it returns shape {tuple(student.shape)}, the teacher {tuple(batch.teacher.shape)}"
            raise InputError(cannot("train this student", because, "Give both the same classes"))
        labels = batch.labels
        if self.loss.hard_label_weight > 0:
            labels = checked_labels(labels, student.shape[-1]).to(student.device)
        return self.loss.rows(batch.teacher.to(student.device), student, labels)

    def _skip(self, why: str) -> float:
        self.skipped += 1
        self.trouble = self.trouble or why
        return math.nan


def new_run(student: nn.Module, loss: Loss, optimizer: str, decay: float, clip: float) -> Run:
    """Return a run by Adam or AdamW, with weight decay on matrices and kernels alone (Loshchilov & Hutter, 2019).

    Raises:
        InputError: no weight asks for a gradient, or the optimizer isn't known.
    """
    free = [one for one in student.parameters() if one.requires_grad]
    if not free:
        because = "none of its parameters asks for a gradient"
        raise InputError(cannot("train this student", because, "Make them `nn.Parameter`s that do"))
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    if optimizer not in kinds:
        raise InputError(cannot(f"use optimizer={optimizer!r}", "it isn't known", "Use adamw or adam"))
    groups: list[dict[str, Any]] = [{"params": [one for one in free if one.ndim > 1], "weight_decay": decay}]
    groups += [{"params": [one for one in free if one.ndim <= 1], "weight_decay": 0.0}]
    return Run(student, kinds[optimizer]([group for group in groups if group["params"]], lr=1e-3), loss, clip)


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


def schedule(done: float) -> float:
    """Rise over 2 % of the steps, then fall as a cosine to a hundredth. Source: Loshchilov & Hutter (2017).

    >>> round(schedule(0.02), 3), round(schedule(1.0), 3)
    (1.0, 0.01)
    """
    if done < 0.02:
        return 0.1 + 0.9 * done / 0.02
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (done - 0.02) / 0.98)) / 2
