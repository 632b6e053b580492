"""Distill: train a student classifier on a teacher's probabilities by any row divergence, and score it on unseen examples."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot
from whichkl.distillation.examples import Examples, InMemory, Loaded, divided, examples_of
from whichkl.distillation.losses import RowDivergence
from whichkl.distillation.losses.specs import row_divergence_of, spec_of
from whichkl.distillation.networks import Teacher, checked, copied, digest, logits_of
from whichkl.distillation.result import Distillation
from whichkl.distillation.scores import Scores, scored
from whichkl.distillation.teacher_target import Student, TeacherTarget
from whichkl.distillation.training import Loss, Run, checked_labels
from whichkl.files.journal import Journal
from whichkl.process.seeds import seeded
from whichkl.process.torch_modes import plain_modes
from whichkl.progress import with_progress
from whichkl.solvers.descent import grouped, state_of

_MIN_FALL = 0.002
"""Smallest fall of the loss in the second half of training for which more epochs are recommended."""
_COUNTS = {"epochs": (1, 10), "batch": (1, 10), "patience": (1, 10), "seed": (0, 0)}
"""Settings that are whole numbers: the least, and an example."""
_OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


@typed
@with_progress("distilling")
@plain_modes()
def distill(
    *,
    teacher: Student,
    student: Student,
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
    return _distilled(teacher, student, data, stopping, held_out, loss, settings, journal, tell or (lambda step, done: None))


def _distilled(
    teacher: Student,
    student: Student,
    data: Any,
    stopping: Any,
    held_out: Any,
    loss: Loss,
    settings: dict[str, Any],
    journal: str | os.PathLike[str] | None,
    say: Callable[[str, float], None],
) -> Distillation:
    """Split the examples, train and score."""
    say("reading the examples", math.nan)
    seed = settings["seed"]
    # copies: neither the user's teacher nor the user's student is changed
    frozen, pupil = Teacher(teacher), copied(student, "student", seed)
    train, stop, unseen = parts = _parts(data, stopping, held_out, settings["batch"], seed)
    run = _new_run(pupil, loss, settings)
    log = None if journal is None else Journal.of(journal, _identity(frozen, run, parts))
    _train(run, frozen, train, stop, log, say)
    pupil.load_state_dict(run.best)
    pupil.eval()
    say("scoring the student", math.nan)
    status = "stopped early" if run.is_stopped and run.round < settings["epochs"] else "finished"
    trained = (run.round, run.seen, run.best_round, tuple(run.history))
    return Distillation(pupil, _scores(frozen, pupil, unseen), str(loss), settings, status, *trained, _notes(run), log)


def _new_run(student: nn.Module, loss: Loss, settings: dict[str, Any]) -> Run:
    """Return a run by Adam or AdamW, with weight decay on matrices and kernels alone (Loshchilov & Hutter, 2019)."""
    if not any(one.requires_grad for one in student.parameters()):
        because = "none of its parameters asks for a gradient"
        raise InputError(cannot("train this student", because, "Make them `nn.Parameter`s that do"))
    if settings["optimizer"] not in _OPTIMIZERS:
        raise InputError(cannot(f"use optimizer={settings['optimizer']!r}", "it isn't known", "Use adamw or adam"))
    optimizer = _OPTIMIZERS[settings["optimizer"]](grouped(student, settings["weight_decay"]), lr=1e-3)
    return Run(student, optimizer, settings["clip"], loss=loss, settings=settings)


def _train(
    run: Run, teacher: Teacher, train: Examples, stop: Examples, log: Journal | None, say: Callable[[str, float], None]
) -> None:
    if log is None or not run.read(log):
        start = run.judge(stop, teacher)
        if math.isnan(start):
            because = "its logits are NaN at the start"
            raise InputError(cannot("train this student", because, "Look at its weights, and at the scale of the inputs"))
        if math.isinf(start):
            spec = spec_of(run.loss.divergence)
            because = f"`{spec}` is infinite at the start: one side gives a class probability 0, and the other doesn't"
            instead = "Use one that is bounded, such as `jensen_shannon` or `skew_forward_kl`"
            raise InputError(cannot("minimise this objective", because, instead))
    while not run.is_done and not run.is_given_up:
        say(f"training, loss {run.best_loss:.4g} on unseen examples", run.round / run.settings["epochs"])
        run.judge(stop, teacher, run.train(train, teacher))
        if log is not None:
            run.write(log)


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
    return [one for one in (split[0], split[1] or given[0], split[2] or given[1]) if one is not None]


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
    if run.is_given_up:
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


def _identity(teacher: Teacher, run: Run, parts: list[Examples]) -> dict[str, Any]:
    """What identifies a journal: the networks and their weights, the examples, and the settings."""
    networks = [[repr(one), digest(state_of(one))] for one in (teacher.module, run.module)]
    fixed, loaded = [one.identity for one in parts], [isinstance(one, Loaded) for one in parts]
    return {**run.settings, "networks": networks, "examples": fixed, "loaded": loaded}


def _check(settings: dict[str, Any]) -> None:
    """Refuse numbers out of range."""
    for name, (least, example) in _COUNTS.items():
        value = settings[name]
        if value is None and name in ("batch", "patience"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            because = f"it isn't a whole number of at least {least}"
            raise InputError(cannot(f"use {name}={value!r}", because, f"Give, say, {name}={example}"))
    for name in ("learning_rate", "clip", "temperature"):
        if not 0 < settings[name] < math.inf:
            raise InputError(cannot(f"use {name}={settings[name]!r}", "it isn't a positive number", "Give, say, 1.0"))
    decay, weight = settings["weight_decay"], settings["hard_label_weight"]
    if not 0 <= decay < math.inf:
        raise InputError(cannot(f"use weight_decay={decay!r}", "it is negative or not a number", "Give 0 or more"))
    if not 0 <= weight <= 1:
        because = "it is the share of the labels' cross-entropy in the loss"
        raise InputError(cannot(f"use hard_label_weight={weight}", because, "Give a number from 0 to 1"))


@dataclass(frozen=True, eq=False)
class DistillationTarget(TeacherTarget):
    """What students are to learn from; `whichkl.compare` takes it with ``families={name: student}``.

    The seed of a cell fixes the split, the order of the examples and, where a student is a function that makes one, its
    starting weights; all cells of a seed are scored on the same examples.

    Args:
        teacher: as in `distill`.
        data: as in `distill`.
        settings: further arguments of `distill`, such as `epochs`, `held_out` or `temperature`.

    >>> import torch
    >>> target = DistillationTarget(torch.nn.Linear(2, 2), torch.zeros(40, 2), {"epochs": 3})
    >>> target.distill(lambda: torch.nn.Linear(2, 2), "forward_kl", seed=1).epochs
    3
    """

    source: ClassVar[str] = "distillation"

    teacher: Student
    data: Any
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse settings that `compare` sets."""
        if wrong := {"teacher", "student", "data", "objective", "seed", "journal", "tell"} & set(self.settings):
            because = f"`compare` sets {', '.join(sorted(wrong))} itself"
            raise InputError(cannot("use these settings", because, "Leave them out"))

    def distill(self, student: Student, objective: str | RowDivergence, seed: int) -> Distillation:
        """Train one student."""
        return distill(teacher=self.teacher, student=student, objective=objective, seed=seed, **self._seen)

    def columns(self, result: Distillation) -> dict[str, Any]:
        """Return both KLs, the measures of labels, and how training ended."""
        s = result.scores
        row: dict[str, Any] = {
            "status": "stopped" if any("given up" in note for note in result.notes) else "converged",
            "solver": "distill",
            "iterations": result.epochs,
            "evaluations": result.examples,
            "rows": result.examples,
            "notes": "; ".join(result.notes),
            "jeffreys": s.forward_kl.value + s.reverse_kl.value,
            "agreement": s.agreement.value,
            "agreement_stderr": s.agreement.stderr,
        }
        for name, one in (("forward_kl", s.forward_kl), ("reverse_kl", s.reverse_kl)):
            row |= {name: one.value, f"{name}_stderr": one.stderr, f"{name}_reliable": one.reliable}
        for name in ("accuracy", "nll", "ece"):
            one = getattr(s, name)
            if one is not None:
                row |= {name: one.student.value, f"{name}_stderr": one.student.stderr, f"{name}_teacher": one.teacher.value}
        return row

    def name_of(self, objective: str | RowDivergence) -> str:
        """Return the text of a row divergence."""
        return spec_of(row_divergence_of(objective))

    @cached_property
    def _seen(self) -> dict[str, Any]:
        """The arguments of `distill`, the teacher's logits of fixed examples in them, so that no cell computes them again."""
        found: dict[str, Any] = {**self.settings, "data": self.data}
        teacher, batch = Teacher(self.teacher), self.settings.get("batch")
        for name, value in found.items():
            if not _is_plain(value):
                found[name] = examples = examples_of(value, batch, name)
                if isinstance(examples, InMemory):
                    examples.seen_by(teacher)
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from others, as JSON can hold it."""
        teacher = Teacher(self.teacher).module
        fields: dict[str, Any] = {"teacher": repr(teacher), "weights": digest(state_of(teacher))[:16]}
        fields["data"] = examples_of(self.data, None).identity
        for name, value in self.settings.items():
            fields[name] = value if _is_plain(value) else examples_of(value, None, name).identity
        return fields


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
