"""Distill: train a student classifier on a teacher's probabilities by any row divergence, and score it on unseen examples."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from whichkl._checks import InputError, cannot
from whichkl.distillation.examples import Examples, Loaded, divided, examples_of
from whichkl.distillation.losses import RowDivergence
from whichkl.distillation.networks import Teacher, checked, copied, digest, logits_of
from whichkl.distillation.objective import Loss, row_divergence_of, spec_of
from whichkl.distillation.result import Distillation
from whichkl.distillation.scores import Scores, scored
from whichkl.distillation.training import Run, checked_labels, new_run
from whichkl.files.journal import Journal
from whichkl.process.seeds import seeded
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers.descent import state_of

_MAX_SKIPPED_BATCHES = 20
"""Most batches whose loss isn't a number; after more, training is given up."""
_MIN_FALL = 0.002
"""Smallest fall of the loss in the second half of training for which more epochs are recommended."""


@plain_modes()
def distill(
    *,
    teacher: nn.Module | Callable[[], nn.Module],
    student: nn.Module | Callable[[], nn.Module],
    data: Any,
    objective: str | RowDivergence = "forward_kl",
    hard_label_weight: float = 0.0,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    stopping: Any = 0.1,
    held_out: Any = 0.2,
    epochs: int = 40,
    batch: int | None = None,
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    clip: float = 5.0,
    patience: int | None = 8,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    tell: Callable[[str, float], None] | None = None,
) -> Distillation:
    """Train a copy of a student on a frozen copy of a teacher, and score it on examples that neither training nor stopping saw.

    The loss of a row is (1 − w) · D(teacher, student) + w · cross-entropy of its label, w = `hard_label_weight`. Adam with
    warm-up and cosine decay; the weights that do best on the examples to stop by are the answer.

    Args:
        teacher: a module that returns logits (n, classes), or has them as `.logits`; or a function that makes one. Its copy is
            in evaluation mode. Logits of tensors are computed once, those of a loader's batches each time.
        student: the same; a function is called under the seed, that of a teacher under seed 0.
        data: tensors or arrays, (x, labels) or x alone; a `DataLoader` or `Dataset` of them. Tensors and standard loaders are
            shuffled.
        objective: a row divergence, or its name, with its parameter after a colon: ``"jeffreys:0.3"``.
        hard_label_weight: w, in [0, 1].
        temperature: divides both logits inside D.
        temperature_squared: whether to multiply D by temperature², which keeps the size of its gradient as the temperature
            grows.
        stopping: the share of the data that decides when to stop, or other data for it.
        held_out: the share of the data that is scored, or other data for it. Where the teacher was trained on `data`, give
            data that it hasn't seen either.
        epochs: passes over the examples that the schedule has.
        batch: examples of a batch; 64, or what the loader says.
        optimizer: ``"adamw"`` or ``"adam"``.
        learning_rate: its peak.
        weight_decay: of matrices and kernels.
        clip: the largest norm of a gradient of the mean loss.
        patience: epochs without improvement after which training stops; None for never.
        seed: fixes the split, the order, dropout, and what functions make.
        journal: a folder where training records its progress. If interrupted, call again with the same arguments to resume; the
            result is the same to the last bit.
        tell: called with the present step, and the fraction of it that is done.

    Raises:
        InputError: a module, the data or an argument can't be used, or the loss isn't finite.
        ResourceError: the journal can't be written.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    >>> result = distill(teacher=nn.Linear(4, 3), student=lambda: nn.Linear(4, 3), data=x, epochs=30, learning_rate=0.05)
    >>> result.scores.rows, result.scores.forward_kl.value < 0.01
    (40, True)
    """
    loss = Loss(row_divergence_of(objective), float(hard_label_weight), float(temperature), temperature_squared)
    settings: dict[str, Any] = {
        "objective": spec_of(loss.divergence),
        "hard_label_weight": loss.hard_label_weight,
        "temperature": loss.temperature,
        "temperature_squared": temperature_squared,
        "epochs": epochs,
        "batch": batch,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "clip": clip,
        "patience": patience,
        "seed": seed,
    }
    _check(settings)
    say = tell or (lambda step, done: None)
    say("reading the examples", math.nan)
    frozen, pupil = Teacher(teacher), copied(student, "student", seed)
    parts = _parts(data, stopping, held_out, batch, seed)
    run = new_run(pupil, loss, optimizer, weight_decay, clip)
    log = None if journal is None else Journal.of(journal, _identity(settings, frozen, run, parts))
    _train(run, frozen, parts, settings, log, say)
    pupil.load_state_dict(run.best)
    pupil.eval()
    say("scoring the student", math.nan)
    scores = _scores(frozen, pupil, parts[2])
    status = "stopped early" if _is_stopped(run, patience) else "finished"
    trained = (run.round, run.seen, run.best_round, tuple(run.history))
    return Distillation(pupil, scores, str(loss), settings, status, *trained, _notes(run), log)


def _train(
    run: Run,
    teacher: Teacher,
    parts: list[Examples],
    settings: dict[str, Any],
    log: Journal | None,
    say: Callable[[str, float], None],
) -> None:
    train, stop, _ = parts
    epochs, patience = settings["epochs"], settings["patience"]
    if log is None or not run.read(log):
        start = run.judge(stop, teacher)
        if not math.isfinite(start):
            raise InputError(_infinite(start, run.loss))
    while run.round < epochs and not _is_stopped(run, patience) and run.skipped <= _MAX_SKIPPED_BATCHES:
        say(f"training, loss {run.best_loss:.4g} on unseen examples", run.round / epochs)
        trained = run.train(train, teacher, epochs, settings["learning_rate"], settings["seed"], _MAX_SKIPPED_BATCHES)
        run.judge(stop, teacher, trained)
        if log is not None:
            run.write(log, last=run.round >= epochs or _is_stopped(run, patience))


def _is_stopped(run: Run, patience: int | None) -> bool:
    return patience is not None and run.since >= patience


def _infinite(start: float, loss: Loss) -> str:
    if math.isnan(start):
        return cannot(
            "train this student", "its logits are NaN at the start", "Look at its weights, and at the scale of the inputs"
        )
    because = (
        f"`{spec_of(loss.divergence)}` is infinite at the start: one side gives a class probability 0, and the other doesn't"
    )
    return cannot("minimise this objective", because, "Use one that is bounded, such as `jensen_shannon` or `skew_forward_kl`")


def _parts(data: Any, stopping: Any, held_out: Any, batch: int | None, seed: int) -> list[Examples]:
    """Return the examples for training, for stopping and for scoring."""
    shares: list[float | None] = []
    given: list[Examples | None] = []
    for name, value in (("stopping", stopping), ("held_out", held_out)):
        is_share = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_share and not 0 < value < 1:
            raise InputError(cannot(f"use {name}={value}", "a share lies between 0 and 1", "Give, say, 0.2, or other data"))
        shares.append(float(value) if is_share else None)
        given.append(None if is_share else examples_of(value, batch, name))
    split = divided(examples_of(data, batch), (shares[0], shares[1]), seed)
    found = [split[0], split[1] or given[0], split[2] or given[1]]
    return [one for one in found if one is not None]


def _scores(teacher: Teacher, student: nn.Module, examples: Examples) -> Scores:
    p, q, y = [], [], []
    with torch.no_grad(), seeded(0):
        for batch in examples.batches(teacher):
            p.append(batch.teacher.cpu())
            q.append(checked(logits_of(student, batch.x, "student"), "student").cpu())
            y.append(None if batch.labels is None else checked_labels(batch.labels, p[-1].shape[-1]).cpu())
    labels = None if any(one is None for one in y) else torch.cat([one for one in y if one is not None])
    return scored(teacher=torch.cat(p), student=torch.cat(q), labels=labels)


def _notes(run: Run) -> tuple[str, ...]:
    notes = []
    if run.skipped > _MAX_SKIPPED_BATCHES:
        notes.append(f"training was given up after {run.skipped} batches that couldn't be used ({run.trouble})")
    elif run.skipped:
        notes.append(f"{run.skipped} batches were skipped: {run.trouble}")
    if run.best_round == 0:
        notes.append("training never did better than the weights that it started from, which are the answer")
    elif run.best_round == run.round and len(run.history) > 2:
        before = min(loss for _, loss in run.history[: (len(run.history) + 1) // 2])
        if before - run.best_loss > max(_MIN_FALL, 0.05 * before):
            notes.append(f"the loss still fell from {before:.3g} to {run.best_loss:.3g} in the second half: give more `epochs`")
    return tuple(notes)


def _identity(settings: dict[str, Any], teacher: Teacher, run: Run, parts: list[Examples]) -> dict[str, Any]:
    """What identifies a journal: the networks and their weights, the examples, and the settings."""
    networks = [[repr(one), digest(state_of(one))] for one in (teacher.module, run.module)]
    fixed = [one.identity for one in parts]
    return {**settings, "networks": networks, "examples": fixed, "loaded": [isinstance(one, Loaded) for one in parts]}


def _check(settings: dict[str, Any]) -> None:
    """Refuse numbers out of range."""
    for name in ("epochs", "batch", "patience"):
        value = settings[name]
        optional = name != "epochs" and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(cannot(f"use {name}={value!r}", "it isn't a whole number of at least 1", f"Give, say, {name}=10"))
    if isinstance(settings["seed"], bool) or not isinstance(settings["seed"], int) or settings["seed"] < 0:
        raise InputError(cannot(f"use seed={settings['seed']!r}", "it isn't a whole number of at least 0", "Give, say, seed=0"))
    for name in ("learning_rate", "clip", "temperature"):
        if not 0 < settings[name] < math.inf:
            raise InputError(cannot(f"use {name}={settings[name]!r}", "it isn't a positive number", "Give, say, 1.0"))
    if not 0 <= settings["weight_decay"] < math.inf:
        raise InputError(
            cannot(f"use weight_decay={settings['weight_decay']!r}", "it is negative or not a number", "Give 0 or more")
        )
    if not 0 <= settings["hard_label_weight"] <= 1:
        because = "it is the share of the labels' cross-entropy in the loss"
        raise InputError(cannot(f"use hard_label_weight={settings['hard_label_weight']}", because, "Give a number from 0 to 1"))
