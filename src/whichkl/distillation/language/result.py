"""LanguageDistillation: a student language model that was trained on its teacher, with what was measured of it."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from whichkl._checks import InputError, cannot, plain, require
from whichkl.distillation.language.held_out_loss import HeldOutLoss
from whichkl.distillation.language.sequence_kl import SequenceKL
from whichkl.distillation.language.verdict import Verdict, verdict_of
from whichkl.distillation.networks import in_short, with_weights
from whichkl.files.saving import FORMAT, Saved
from whichkl.printable import HTML
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers.descent import state_of

LANGUAGE_DISTILLATION = Saved("a language distillation", "language_distillation.json", "student", "Distil again")
Measured = SequenceKL | HeldOutLoss
"""Both KLs of sequences, or what a teacher that is no model lets one measure."""


@dataclass(frozen=True)
class Midway:
    """What was measured on the way, with the student as it was then."""

    step: int
    flops: float
    found: Measured

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {**vars(self), "found": self.found.to_dict()}


@dataclass(frozen=True)
class Continuation:
    """How a held-out prompt goes on, as text, or as token ids where there is no tokenizer."""

    prompt: str
    data: str | None
    """The data's completion; None where there is none."""
    teacher: str | None
    """A draw of the teacher; None where it can't be drawn from."""
    before: str
    """A draw of the student as it was given."""
    after: str
    """A draw of the trained student."""


class Settings(TypedDict):
    """The settings that a printed result needs; the others are kept as they are."""

    objective: str
    prefixes: Mapping[str, float]
    credit: str


class LanguageFields(TypedDict):
    """Everything except the weights, as in `language_distillation.json`."""

    format: int
    before: Measured
    after: Measured
    settings: Settings
    steps: int
    flops: float
    cpu_seconds: float
    history: tuple[float, ...]
    midway: tuple[Midway, ...]
    examples: tuple[Continuation, ...]
    notes: tuple[str, ...]
    model: Mapping[str, Any] | None


@dataclass(frozen=True)
class LanguageDistillation(HTML):
    """A trained student, how far from its teacher it is on prompts that it wasn't trained on, and what it cost."""

    student: nn.Module
    """The trained copy."""
    before: Measured
    """Of the student as it was given."""
    after: Measured
    settings: Mapping[str, Any]
    steps: int
    flops: float
    """(6 Nₛ + 2 Nₜ) per trained token and 2 N per generated or prefilled one; N are all parameters of a model."""
    cpu_seconds: float
    """CPU time of training; what was measured before, after and on the way isn't in it."""
    history: tuple[float, ...]
    """The logged losses: means over tokens."""
    midway: tuple[Midway, ...] = ()
    examples: tuple[Continuation, ...] = ()
    notes: tuple[str, ...] = ()
    tokenizer: Any = field(default=None, repr=False, compare=False)
    journal: Any = field(default=None, repr=False, compare=False)
    """Where the run recorded its progress. It isn't needed once this is saved: `journal.clear()` removes it."""

    @property
    def curve(self) -> tuple[Midway, ...]:
        """What was measured before training, on the way and after it."""
        return (Midway(0, 0.0, self.before), *self.midway, Midway(self.steps, self.flops, self.after))

    @property
    def verdict(self) -> Verdict:
        """What training changed, and what speaks against the figures."""
        return verdict_of(self.before, self.after)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the weights as JSON can hold it."""
        left_out = ("student", "before", "after", "midway", "examples", "tokenizer", "journal")
        fields = {name: value for name, value in vars(self).items() if name not in left_out}
        parts: dict[str, Any] = {name: asdict(getattr(self, name)) for name in ("before", "after")}
        parts |= {name: [asdict(one) for one in getattr(self, name)] for name in ("midway", "examples")}
        found: dict[str, Any] = plain({**fields, **parts})
        return found

    def __repr__(self) -> str:
        return f"LanguageDistillation({self.settings['objective']}, {self.steps} steps, {self.after!r})"

    def __str__(self) -> str:
        """Both KLs before and after, then the measures of the trained student."""
        lines = [f"{described(self.settings)}: {self.spent}"]
        for name in ("forward_kl", "reverse_kl"):
            was, now = getattr(self.before, name), getattr(self.after, name)
            if now is not None:
                lines.append(f"  {name + now.constant:<11} {was.number} → {now.number} nats a {self.after.per}")
        return "\n".join([*lines, str(self.after), *(f"  · {note}" for note in self.notes)])

    @property
    def spent(self) -> str:
        """Steps, FLOPs and CPU seconds of the training, in words."""
        steps = f"{self.steps:,} step{'s' * (self.steps != 1)}"
        return f"{steps}, {self.flops:.3g} FLOPs, {self.cpu_seconds:,.{int(self.cpu_seconds < 10)}f} CPU seconds"

    def model_card(self) -> str:
        """Return a model card as Markdown: what the student is, what was measured and how, and every setting."""
        text: str = importlib.import_module("whichkl.reporting.language_report").model_card(self)
        return text

    @plain_modes()
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `language_distillation.json`, and the student's weights as safetensors under the name that it gives.

        The folder of a student of transformers can also be loaded by `from_pretrained`: its configuration, the tokenizer's
        files and a model card are in it. An earlier language distillation in that folder is replaced in one step; those files
        follow, one by one.

        Raises:
            InputError: the folder holds something other than a language distillation.
            ResourceError: it can't be written.
        """
        LANGUAGE_DISTILLATION.write(Path(folder), self._files(with_copies=True))

    def files(self) -> dict[str, bytes]:
        """Return the result as `save` writes it, by name, without the files for transformers."""
        return self._files(with_copies=False)

    def _files(self, *, with_copies: bool) -> dict[str, bytes]:
        fields = {"format": FORMAT, **self.to_dict(), "model": _configuration(self.student)}
        tensors = state_of(self.student)
        if not with_copies or fields["model"] is None:
            return LANGUAGE_DISTILLATION.files(fields, tensors)
        return LANGUAGE_DISTILLATION.files(fields, tensors, partial(self._copies, list(tensors)))

    def _copies(self, names: list[str], weights: str) -> dict[str, bytes]:
        """Return what `from_pretrained` reads, by name; its index names our file of weights."""
        student: Any = self.student
        with tempfile.TemporaryDirectory() as folder:
            student.config.save_pretrained(folder)
            if student.can_generate():
                student.generation_config.save_pretrained(folder)
            if hasattr(self.tokenizer, "save_pretrained"):
                self.tokenizer.save_pretrained(folder)
            found = {one.name: one.read_bytes() for one in Path(folder).iterdir() if one.is_file()}
        total = sum(one.numel() * one.element_size() for one in student.state_dict().values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(names, weights)}
        found["model.safetensors.index.json"] = json.dumps(index, indent=1).encode()
        return {**found, "README.md": self.model_card().encode()}

    @classmethod
    @plain_modes()
    def load(
        cls, folder: str | os.PathLike[str], *, student: nn.Module | None = None, tokenizer: Any = None
    ) -> LanguageDistillation:
        """Read a saved language distillation.

        Args:
            folder: what `save` was given.
            student: a module of the same architecture, which is copied, and the copy takes the weights; None makes one from
                the saved configuration of a model of transformers.
            tokenizer: for a later `save`.

        Raises:
            InputError: there is none in that folder, or the weights aren't those of such a module.
            IntegrityError: a file was changed, cut short, or written by a newer version, or holds what none can hold.
            ResourceError: a file can't be read.
        """
        path = Path(folder)
        fields, tensors = LANGUAGE_DISTILLATION.read(path, LanguageFields)
        cuts = [one.cut for one in (fields["before"], fields["after"]) if isinstance(one, SequenceKL)]
        kinds = {type(one) for one in (fields["before"], fields["after"], *(one.found for one in fields["midway"]))}
        if fields["steps"] < 0 or len(kinds) > 1 or any(set(one) != {"teacher", "student"} for one in cuts):
            raise LANGUAGE_DISTILLATION.damaged(path, "its steps or cut draws can't be those of a language distillation")
        module = _made(path, fields["model"]) if student is None else copy.deepcopy(student)
        instead = "Pass `student=`, the architecture that was trained"
        module = with_weights(module, tensors, LANGUAGE_DISTILLATION, path, instead)
        kept = {name: value for name, value in fields.items() if name in cls.__dataclass_fields__}
        return cls(module, **kept, tokenizer=tokenizer)


def described(settings: Mapping[str, Any]) -> str:
    """Return the objective and the prefixes in words."""
    shares = {name: share for name, share in settings["prefixes"].items() if share}
    where = f"prefixes of {', '.join(f'{share:g} {name}' for name, share in shares.items())}"
    if len(shares) == 1:
        where = f"the {next(iter(shares))}'s prefixes"
    credit = ", credit of sequences" if settings["credit"] == "sequence" else ""
    return f"{settings['objective']} on {where}{credit}"


def _configuration(student: Any) -> dict[str, Any] | None:
    """Return what makes an equal model of transformers; None for any other module."""
    transformers = sys.modules.get("transformers")  # where it isn't loaded, the student is none of its models
    if transformers is None or not isinstance(student, transformers.PreTrainedModel):
        return None
    generation = student.generation_config.to_dict() if student.can_generate() else None
    return {"config": json.loads(student.config.to_json_string(use_diff=False)), "generation_config": generation}


def _made(path: Path, fields: Mapping[str, Any] | None) -> Any:
    """Make the model of a saved configuration. Code that came with a model isn't run."""
    do = f"load `{path}`"
    if fields is None:
        because = "its student isn't a plain model of transformers"
        raise InputError(cannot(do, because, "Pass `student=`, a module of the architecture that was trained"))
    transformers = require("transformers", "lm")
    try:
        config = transformers.AutoConfig.for_model(**fields["config"])
        module: Any = transformers.AutoModelForCausalLM.from_config(config)
        if fields["generation_config"] is not None:
            module.generation_config = transformers.GenerationConfig.from_dict(fields["generation_config"])
    except Exception as error:
        because = f"transformers can't make its model ({in_short(error)})"
        raise InputError(cannot(do, because, "Pass `student=`, a module of the architecture that was trained")) from error
    return module
