"""Distillation: a student that was trained on its teacher, and what unseen examples say of it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import nn

from whichkl._checks import InputError, IntegrityError, cannot, plain, write_whole
from whichkl.distillation.calibration import BINS
from whichkl.distillation.networks import state_of
from whichkl.distillation.scores import Contrast, Scores
from whichkl.modes import plain_modes

_FORMAT = 1
_NAME = "distillation.json"


@dataclass(frozen=True)
class Distillation:
    """What `distill` returns; it prints as a page."""

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
    """Trained on, each as often as it came."""
    best_epoch: int
    """The epoch whose weights are the answer; 0 for those at the start."""
    history: tuple[tuple[float, float], ...] = field(repr=False)
    """Mean loss while training (NaN at the start), and on the examples to stop by, after each epoch from 0."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Student against teacher, a measure a line."""
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
        widths = [max(map(len, column)) for column in zip(*table, strict=True)] if len(table) > 1 else []
        if widths:
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
        """Return everything but the weights, as JSON can hold it."""
        fields = {
            name: getattr(self, name) for name in ("loss", "settings", "status", "epochs", "examples", "best_epoch", "notes")
        }
        fields["history"] = [list(one) for one in self.history]
        found: dict[str, Any] = plain({**fields, "notes": list(self.notes), "scores": self.scores.to_dict()})
        return found

    @plain_modes()
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `distillation.json`, and the student's weights as safetensors under the name that it gives.

        Raises:
            InputError: the folder holds something other than a distillation.
            ResourceError: it can't be written.
        """
        path = Path(folder)
        if path.is_dir() and any(not _ours(one.name) for one in path.iterdir()):
            raise InputError(cannot(f"save a distillation in `{path}`", "it holds something else", "Name a new or empty folder"))
        weights = save({name: value.cpu().contiguous() for name, value in state_of(self.student).items()})
        hashed = hashlib.sha256(weights).hexdigest()
        name = f"student-{hashed[:16]}.safetensors"
        fields = {"format": _FORMAT, **self.to_dict(), "weights": name, "sha256": hashed}
        text = json.dumps({**fields, "checksum": _checksum(fields)}, indent=1, allow_nan=False)
        write_whole(path / name, weights)
        write_whole(path / _NAME, text.encode())
        for one in path.iterdir():
            if one.name not in (name, _NAME):
                one.unlink(missing_ok=True)

    @classmethod
    @plain_modes()
    def load(cls, folder: str | os.PathLike[str], *, student: nn.Module) -> Distillation:
        """Read a saved distillation.

        Args:
            folder: what `save` was given.
            student: a module of the same architecture; it is copied, and the copy takes the weights.

        Raises:
            InputError: there is none in that folder, or the weights aren't those of such a module.
            IntegrityError: a file was changed, cut short, or written by a newer version.
        """
        path = Path(folder)
        try:
            fields = json.loads((path / _NAME).read_bytes())
            if fields["format"] > _FORMAT:
                raise IntegrityError(cannot(f"load `{path}`", "a newer version wrote it", "Upgrade whichkl"))
            if _checksum(fields) != fields["checksum"] or not _ours(fields["weights"]):
                because = f"{_NAME} isn't what was saved (its checksum differs)"
                raise IntegrityError(cannot(f"load `{path}`", because, "Distill anew"))
            weights = (path / fields["weights"]).read_bytes()
            if hashlib.sha256(weights).hexdigest() != fields["sha256"]:
                because = f"{fields['weights']} isn't what was saved (SHA-256 differs)"
                raise IntegrityError(cannot(f"load `{path}`", because, "Distill anew"))
        except FileNotFoundError as error:
            raise InputError(
                cannot(f"load `{path}`", "there is no distillation in it", "Name a folder that `save` wrote")
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, (InputError, IntegrityError)):
                raise
            raise IntegrityError(cannot(f"load `{path}`", f"{_NAME} isn't what was saved", "Distill anew")) from error
        module = copy.deepcopy(student)
        try:
            module.load_state_dict(load(weights))
        except RuntimeError as error:
            because = f"its weights aren't those of such a `{type(student).__name__}` ({' '.join(str(error).split())[:200]})"
            raise InputError(cannot(f"load `{path}`", because, "Pass the architecture that was trained")) from error
        history = tuple((float(a), float(b)) for a, b in fields["history"])
        rest = {name: fields[name] for name in ("loss", "settings", "status", "epochs", "examples", "best_epoch")}
        return cls(module.eval(), Scores.from_dict(fields["scores"]), **rest, history=history, notes=tuple(fields["notes"]))


def _ours(name: str) -> bool:
    return name == _NAME or (name.startswith("student-") and name.endswith(".safetensors") and "/" not in name)


def _checksum(fields: dict[str, Any]) -> str:
    rest = {name: value for name, value in fields.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
