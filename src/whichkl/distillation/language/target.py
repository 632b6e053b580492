"""LanguageTarget: a teacher with data and settings, from which students are compared, and what its access allows."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import tempfile
from collections.abc import Mapping
from typing import Any

from torch import nn

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot, plain, require
from whichkl.access import Access
from whichkl.advice import Advice, Advised
from whichkl.distillation.language.advice import language_advice
from whichkl.distillation.language.causal import check_tokenizer
from whichkl.distillation.language.distillation import language_model
from whichkl.distillation.language.examples import listed_examples
from whichkl.distillation.language.held_out_loss import HeldOutLoss
from whichkl.distillation.language.objective import LanguageObjective, check_together
from whichkl.distillation.language.result import LanguageDistillation
from whichkl.distillation.language.sequence_kl import SequenceKL
from whichkl.distillation.language.stored_teacher import StoredTeacher
from whichkl.distillation.language.teacher_access import TeacherAccess, TokenScores, check_access, teacher_of
from whichkl.distillation.networks import copied, digest
from whichkl.distillation.teacher_target import Student, TeacherTarget
from whichkl.divergences import Estimate
from whichkl.solvers.descent import state_of

_OF_COMPARE = ("student", "objective", "prefixes", "credit", "seed", "journal", "memo", "tell")
"""Arguments of `language_model` that `compare` sets."""
_NO_PART = ("output_dir", "logging_dir", "run_name", "report_to", "hub_token", "push_to_hub", "seed", "data_seed")
"""Training arguments that change no weight, or that a cell sets."""


class LanguageTarget(TeacherTarget, Advised):
    """What student language models are to learn from; `whichkl.compare` takes it with ``families={name: student}``.

    An objective is a divergence with the prefixes that it is taken on: ``"forward_kl@data"``, ``"reverse_kl@student"``,
    ``"jeffreys:0.3@0.5data+0.5student"``, ``"reverse_kl@student:sequence"``. All arms start from the student that is given, and
    spend `budget` FLOPs where there is one. The seed of a cell fixes the order, the draws and which prompts are held out; all
    cells of a seed are compared on the same prompts, with the same continuations of the teacher.

    Args:
        teacher: as in `language_model`; what can be asked of it decides which objectives there are (`whichkl.advise`).
        data: as in `language_model`.
        tokenizer: as in `language_model`.
        keep_students: whether a study keeps the trained students, each as large as its weights;
            ``LanguageDistillation.load(cell.folder / "fit")`` returns one. Without them `distill` trains the same one again.
        settings: further arguments of `language_model`, such as `max_new_tokens`, `held_out`, `args` and `budget`.

    Raises:
        InputError: a setting isn't known, or is one that `compare` sets; or it is no teacher, no tokenizer, or no examples.

    >>> LanguageTarget(teacher=nn.Linear(2, 2), data=[[1, 2, 3]], max_new_tokens=8).access.cell
    'both'
    """

    source = "language model"

    @typed
    def __init__(self, *, teacher: Any, data: Any, tokenizer: Any = None, keep_students: bool = True, **settings: Any) -> None:
        if wrong := [name for name in _OF_COMPARE if name in settings]:
            because = f"`compare` sets {', '.join(wrong)} itself"
            raise InputError(cannot("use these settings", because, "Leave them out"))
        known = [one for one in inspect.signature(language_model).parameters if one not in _OF_COMPARE]
        if unknown := [name for name in settings if name not in known]:
            because = f"`{unknown[0]}` is no argument of `language_model`"
            raise InputError(cannot("use these settings", because, f"Choose among {', '.join(known)}"))
        teacher_of(teacher)  # refuses what is no teacher
        check_tokenizer(tokenizer)
        self.teacher, self.data, self.tokenizer, self.settings = teacher, listed_examples(data), tokenizer, settings
        self.budget, self.keep_students = settings.get("budget"), keep_students
        self._seed: int | None = None
        self._memo: dict[Any, Any] = {}

    @property
    def access(self) -> Access:
        """What can be done with the teacher's law of sequences."""
        return TeacherAccess.of(self.teacher).access

    def name_of(self, objective: Any) -> str:
        """Return the text of an objective.

        Raises:
            InputError: it can't be read, or this teacher doesn't allow it.
        """
        found = LanguageObjective.of(objective)
        self._allow(found)
        return found.name

    def _allow(self, found: LanguageObjective) -> None:
        """Refuse an objective that the settings or the teacher don't allow."""
        settings = {name: self.settings[name] for name in ("hard_label_weight", "temperature") if name in self.settings}
        check_together(found.divergence, found.shares, found.credit, settings.get("hard_label_weight", 0.0))
        check_access(TeacherAccess.of(self.teacher), found.divergence, found.shares, **settings)
        if found.shares["data"] and any(_is_prompt(one) for one in self.data):
            because = "some examples are prompts without completions"
            instead = "Use prefixes of the teacher or the student, or add completions"
            raise InputError(cannot("train on prefixes of the data", because, instead))

    def advice(self) -> Advice:
        """Return which objectives are possible on which prefixes, what each pair minimises, and why others aren't."""
        return language_advice(TeacherAccess.of(self.teacher), self._allow)

    def distill(self, student: Student, objective: Any, seed: int) -> LanguageDistillation:
        """Train a copy of a student."""
        if seed != self._seed:
            self._seed, self._memo = seed, {}
        settings = dict(self.settings)
        args = settings.get("args")
        if isinstance(args, Mapping):
            settings["args"] = {**args, "seed": seed, "data_seed": seed}
        elif args is not None:
            settings["args"] = copy.copy(args)
            settings["args"].seed = settings["args"].data_seed = seed
        return language_model(
            teacher=self.teacher,
            student=student if isinstance(student, nn.Module) else copied(student, "student", seed),
            tokenizer=self.tokenizer,
            data=self.data,
            seed=seed,
            memo=self._memo,
            **LanguageObjective.of(objective).arguments,
            **settings,
        )

    def columns(self, result: LanguageDistillation) -> dict[str, Any]:
        """Return what was measured of the student before and after, and what training cost."""
        after, before = result.after, result.before
        row: dict[str, Any] = {"status": "finished", "solver": "language_model", "iterations": result.steps}
        row |= {"flops": result.flops, "cpu_seconds": result.cpu_seconds}
        estimates, per = _estimates(after), "" if after.per == "sequence" else "_per_token"
        for name, one in estimates.items():
            column = f"{name}{per}" if name.endswith("_kl") else name
            row |= {column: one.value, f"{column}_stderr": one.stderr, f"{column}_reliable": one.reliable}
            row |= {f"{column}_up_to": one.up_to, f"{column}_before": _estimates(before)[name].value}
        if isinstance(after, SequenceKL):
            row |= {"jeffreys": after.forward_kl.value + after.reverse_kl.value}
            row |= {"cut": after.cut["student"], "cut_teacher": after.cut["teacher"]}
            for name, both in after.measures.items():
                row |= {name: both.student.value, f"{name}_stderr": both.student.stderr, f"{name}_teacher": both.teacher.value}
                if name in ("entropy", "length") and both.difference is not None:
                    row |= {f"{name}_gap": abs(both.difference.value), f"{name}_gap_stderr": both.difference.stderr}
        notes = list(result.notes) + [note for one in estimates.values() for note in one.notes]
        return {**row, "notes": "; ".join(dict.fromkeys(notes))}

    def files(self, result: LanguageDistillation) -> dict[str, bytes]:
        """Return the files of a result that a study keeps, by name."""
        return super().files(result) if self.keep_students else {}

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from others, as JSON can hold it."""
        fields = {**_of_teacher(self.teacher), "tokenizer": _hash_of_tokenizer(self.tokenizer), "data": _hash(self.data)}
        for name, value in self.settings.items():
            if hasattr(value, "to_dict"):
                fields[name] = {key: one for key, one in value.to_dict().items() if key not in _NO_PART}
            else:
                fields[name] = value if value is None or isinstance(value, (bool, int, float, str)) else _hash(value)
        fields["keep_students"] = self.keep_students
        return {**fields, "transformers": require("transformers", "lm").__version__}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was drawn: a worker draws again."""
        return {**vars(self), "_seed": None, "_memo": {}}


def check_arguments(args: Any) -> None:
    """Refuse training arguments that every cell of a study would refuse."""
    from whichkl.distillation.language.training_arguments import arguments_of, checked_arguments

    with tempfile.TemporaryDirectory() as folder:
        checked_arguments(arguments_of(args, folder, 0, None), {}, is_stream=False)


def _estimates(found: SequenceKL | HeldOutLoss) -> dict[str, Estimate]:
    """Return the estimates of a student alone, by name."""
    names = ("forward_kl", "reverse_kl", "forward_kl_per_token", "reverse_kl_per_token", "agreement", "nll")
    every = {name: getattr(found, name, None) for name in names}
    return {name: one for name, one in every.items() if one is not None}


def _is_prompt(example: Any) -> bool:
    """Whether an example has no completion."""
    if not isinstance(example, Mapping):
        return False
    messages = example.get("messages")
    return example.get("completion") is None if not messages else messages[-1].get("role") != "assistant"


def _of_teacher(teacher: Any) -> dict[str, Any]:
    if isinstance(teacher, nn.Module):
        return {"teacher": repr(teacher), "weights": digest(state_of(teacher))[:16]}
    if isinstance(teacher, StoredTeacher):
        return {"teacher": repr(teacher), "weights": _hash(teacher.to_dict())}
    if isinstance(teacher, TokenScores):  # what a function would return can't be hashed
        return {"teacher": f"scores by {getattr(teacher.score, '__qualname__', type(teacher.score).__name__)}"}
    return {"teacher": "text"}


def _hash(values: Any) -> str:
    text = json.dumps(plain(values), sort_keys=True, default=lambda one: one.tolist() if hasattr(one, "tolist") else repr(one))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hash_of_tokenizer(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return _hash([whole, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)])
