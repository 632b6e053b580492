"""Distillation: a student that was trained on its teacher, with its scores on unseen examples."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from whichkl._checks import plain
from whichkl.distillation.networks import with_weights
from whichkl.distillation.scores import BINS, Contrast, Scores
from whichkl.files.journal import Journal
from whichkl.files.saving import FORMAT, Saved, checksum
from whichkl.printable import HTML, brief
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers.descent import state_of

_checksum = checksum
DISTILLATION = Saved("a distillation", "distillation.json", "student", "Distil again")


class DistillationFields(TypedDict):
    """Everything except the weights, as in `distillation.json`."""

    format: int
    loss: str
    settings: Mapping[str, Any]
    status: str
    epochs: int
    examples: int
    best_epoch: int
    history: tuple[tuple[float, ...], ...]
    notes: tuple[str, ...]
    scores: Scores


@dataclass(frozen=True)
class Distillation(HTML):
    """What `distill` returns; it prints as a page."""

    __repr__ = brief

    student: nn.Module = field(repr=False)
    """The trained copy, in evaluation mode."""
    scores: Scores = field(repr=False)
    loss: str
    """What was minimised, with its weights."""
    settings: dict[str, Any] = field(repr=False)
    status: str
    """``"stopped early"``, or ``"finished"`` at the end of the schedule."""
    epochs: int
    examples: int
    """Number of examples trained on, counted once per pass."""
    best_epoch: int
    """The epoch whose weights are the answer; 0 for those at the start."""
    history: tuple[tuple[float, float], ...] = field(repr=False)
    """Mean loss while training (NaN at the start), and on the examples to stop by, after each epoch from 0."""
    notes: tuple[str, ...] = ()
    journal: Journal | None = field(default=None, repr=False, compare=False)
    """Where training recorded its progress. It isn't needed once this is saved: `journal.clear()` removes it."""

    def __str__(self) -> str:
        """Student against teacher, one measure per line."""
        s = self.scores
        lines = [
            f"Distilled by {self.loss}.",
            f"It {self.status} after {self.epochs} of {self.settings['epochs']} epochs; the weights are those of epoch "
            f"{self.best_epoch}, with {self.history[self.best_epoch][1]:.4g} on the examples to stop by.",
            "",
            f"On {s.rows:,} examples that neither training nor stopping saw:",
        ]
        table = [("", "student", "teacher", "student − teacher")]
        for name, one in self.contrasts:
            table.append((name, one.student.number, one.teacher.number, "–" if one.difference is None else one.difference.number))
        if len(table) > 1:
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        lines += [
            f"  agreement with the teacher  {s.agreement.number}",
            f"  KL(teacher‖student), forward  {s.forward_kl.number} nats",
            f"  KL(student‖teacher), reverse  {s.reverse_kl.number} nats",
        ]
        return "\n".join(lines + [f"  · {note}" for note in self.notes])

    @property
    def contrasts(self) -> list[tuple[str, Contrast]]:
        """The measures that need labels, by what they are called; none where there were no labels."""
        s = self.scores
        named = (("accuracy", s.accuracy), ("−log q of the label", s.nll), (f"ECE, {BINS} bins", s.ece))
        return [(name, one) for name, one in named if one is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the weights, as JSON can hold it."""
        names = ("loss", "settings", "status", "epochs", "examples", "best_epoch", "notes", "history")
        found: dict[str, Any] = plain({**{name: getattr(self, name) for name in names}, "scores": self.scores.to_dict()})
        return found

    @plain_modes()
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `distillation.json`, and the student's weights as safetensors under the name that it gives.

        An earlier distillation in that folder is replaced in one step. Several processes may save into one folder.

        Raises:
            InputError: the folder holds something other than a distillation.
            ResourceError: it can't be written.
        """
        DISTILLATION.write(Path(folder), self.files())

    def files(self) -> dict[str, bytes]:
        """Return what `save` writes, by name."""
        return DISTILLATION.files({"format": FORMAT, **self.to_dict()}, state_of(self.student))

    @classmethod
    @plain_modes()
    def load(cls, folder: str | os.PathLike[str], *, student: nn.Module) -> Distillation:
        """Read a saved distillation.

        Args:
            folder: what `save` was given.
            student: a module of the same architecture; it is copied, and the copy takes the weights.

        Raises:
            InputError: there is none in that folder, or the weights aren't those of such a module.
            IntegrityError: a file was changed, cut short, or written by a newer version, or holds what no distillation can hold.
            ResourceError: a file can't be read.
        """
        path = Path(folder)
        fields, tensors = DISTILLATION.read(path, DistillationFields)
        is_whole = all(len(losses) == 2 for losses in fields["history"]) and "epochs" in fields["settings"]
        if not is_whole or not 0 <= fields["best_epoch"] < len(fields["history"]):
            raise DISTILLATION.damaged(path, "its epochs can't be those of a distillation")
        module = with_weights(copy.deepcopy(student), tensors, DISTILLATION, path, "Pass the architecture that was trained")
        kept = {name: value for name, value in fields.items() if name in DistillationFields.__annotations__ and name != "format"}
        return cls(module, **kept)
