"""language_model: distil a language model with a direction and prefixes, and measure both KLs of sequences before and after."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from whichkl._arguments import typed
from whichkl._checks import InputError, as_int, cannot, check_seed, require
from whichkl.distillation.language.causal import CausalModel, agree, evaluating
from whichkl.distillation.language.examples import Example, read_examples
from whichkl.distillation.language.result import Continuation, LanguageDistillation, Midway
from whichkl.distillation.language.rollouts import continued
from whichkl.distillation.language.sequence_kl import SequenceKL, sequence_kl
from whichkl.distillation.networks import digest
from whichkl.divergences.divergence import RowDivergence
from whichkl.files.journal import Journal
from whichkl.files.reading import checked
from whichkl.process.torch_modes import plain_modes

_MAX_PROMPTS = 500
"""Largest number of held-out prompts on which sequences are compared."""
_SHOWN = 5
"""Number of held-out prompts whose continuations are shown."""
_NOT_OF_THE_RUN = ("output_dir", "run_name", "disable_tqdm", "report_to", "save_", "hub_", "push_to_hub", "log_level")
"""Beginnings of names of training arguments that don't change what is trained."""


@plain_modes()
@typed
def language_model(
    *,
    teacher: Any,
    student: Any,
    tokenizer: Any = None,
    data: Any,
    objective: str | RowDivergence = "forward_kl",
    prefixes: Mapping[str, float] | None = None,
    credit: str = "token",
    hard_label_weight: float = 0.0,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    held_out: float = 0.1,
    evaluations: int = 0,
    args: Any = None,
    budget: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    seed: int = 0,
    tell: Callable[[str, float], None] | None = None,
) -> LanguageDistillation:
    """Train a copy of a student language model on a teacher, and compare their continuations of held-out prompts.

    Args:
        teacher: p, a causal language model of transformers.
        student: q; a copy is trained.
        tokenizer: that of both; None where the data are token ids.
        data: texts, {'prompt': …, 'completion': …}, {'messages': […]}, or token ids in their place.
        objective: see `LanguageTrainer`; so are the next five.
        prefixes: shares of ``"data"``, ``"student"`` and ``"teacher"``.
        credit: ``"token"`` or ``"sequence"``.
        hard_label_weight: of the data's cross-entropy.
        temperature: divides both logits.
        max_new_tokens: where continuations are cut.
        held_out: the share of the examples whose prompts are for the comparison alone.
        evaluations: how often both KLs are measured on the way, at equal parts of the run. Each costs as much as the comparison
            at its end.
        args: `transformers.TrainingArguments`; by default three passes at a learning rate of 10⁻³ with nothing saved.
        budget: FLOPs after which training stops; two runs of one budget can be compared.
        journal: a folder where the run records its progress; `output_dir` of `args` isn't used then. If interrupted, call again
            with the same arguments to resume; the result is the same to the last bit on the same machine. In one process only.
        seed: fixes the split, the order, prefixes and draws.
        tell: called with the present step, and the fraction of it that is done.

    Raises:
        InputError: see `LanguageTrainer` and `sequence_kl`; or too few examples are left on a side.
        IntegrityError: a checkpoint isn't what was written.
        ResourceError: the forecast of the memory is above what is free, or the journal can't be written.
    """
    require("transformers", "lm")
    from whichkl.distillation.language.record import Record

    seed, say = check_seed(seed), tell or (lambda step, done: None)
    shares = dict({"data": 1.0} if prefixes is None else prefixes)
    if budget is not None and not (isinstance(budget, (int, float)) and 0 < budget < math.inf):
        raise InputError(cannot(f"use `budget={budget!r}`", "it is a positive number of FLOPs", "Give, say, budget=1e15"))
    if not 0 <= as_int(evaluations) <= 100:
        raise InputError(cannot(f"use `evaluations={evaluations}`", "it is a number from 0 to 100", "Give, say, evaluations=3"))
    p, q = CausalModel(teacher, "teacher"), CausalModel(copy.deepcopy(student), "student")
    with evaluating(p, q):
        ends = agree(p, q, tokenizer)
    train, unseen = _split(read_examples(data, tokenizer, p.tokens, ends[0]), held_out, seed)
    compared: dict[str, Any] = {"teacher": teacher, "tokenizer": tokenizer, "max_new_tokens": max_new_tokens, "seed": seed}
    compared["prompts"] = [one.prompt for one in unseen[:_MAX_PROMPTS]]
    choices: dict[str, Any] = {"objective": objective, "prefixes": shares, "credit": credit, "temperature": temperature}
    choices |= {"hard_label_weight": hard_label_weight, "max_new_tokens": max_new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        settings = _arguments(args, folder, seed)
        fixed = {**choices, "held_out": held_out, "seed": seed, "budget": budget, "evaluations": evaluations}
        log = None if journal is None else Journal.of(journal, _identity((p, q), (train, unseen), ends, settings, fixed))
        run = _Run(q, Record(log), settings, compared, evaluations, say)
        before = run.record.measured("before", run.measure)
        shown = [_draws(one, unseen[:_SHOWN], ends, max_new_tokens, seed) for one in (p, q)]
        run.train(
            teacher=teacher,
            train_dataset=[one.to_dict() if one.completion else {"prompt": one.prompt} for one in train],
            processing_class=tokenizer,
            budget=budget,
            **choices,
        )
    after = run.record.measured("after", run.measure)
    shown.append(_draws(q, unseen[:_SHOWN], ends, max_new_tokens, seed))
    done = run.done
    used = {**fixed, "objective": done["objective"], "prefixes": done["prefixes"], "examples": len(train)}
    used |= {"learning_rate": settings.learning_rate, "batch": settings.per_device_train_batch_size}
    used |= {"args": _changed(settings), "teacher": _named(teacher), "student": _named(student)}
    return LanguageDistillation(
        q.module,
        before,
        after,
        used,
        done["steps"],
        done["flops"],
        done["cpu_seconds"],
        tuple(done["losses"]),
        midway=tuple(run.midway),
        examples=_continuations(unseen[:_SHOWN], shown, tokenizer),
        notes=tuple(done["notes"]),
        tokenizer=tokenizer,
        journal=None if log is None else run.record,
    )


@dataclass
class _Run:
    """The training inside `language_model`, and what is measured on the way."""

    student: CausalModel
    record: Any
    settings: Any
    compared: dict[str, Any]
    evaluations: int
    say: Callable[[str, float], None]
    midway: list[Midway] = field(default_factory=list)
    done: dict[str, Any] = field(default_factory=dict)
    spent: float = 0.0
    """CPU seconds before this process took over, less those of measurements on the way."""

    def measure(self) -> SequenceKL:
        """Compare the student, as it is now, with its teacher."""
        self.student.module.eval()
        return sequence_kl(student=self.student.module, tell=self.say, **self.compared)

    def train(self, **choices: Any) -> None:
        """Train the student, from the last checkpoint if there is one."""
        found = self.record.trained(self.student.module)
        if found is None:
            found = self._trained(choices)
            self.record.keep_trained(self.student.module, found)
        self.done, self.midway = found, _read(found["midway"])
        self.student.module.eval()

    def _trained(self, choices: dict[str, Any]) -> dict[str, Any]:
        from whichkl.distillation.language.trainer import LanguageTrainer

        resumed = self.record.latest()
        if resumed is not None:
            self.midway, self.spent = _read(resumed[1]["midway"]), float(resumed[1]["cpu_seconds"])
        with _kept_random_states(), _without_bars():
            trainer = LanguageTrainer(student=self.student.module, args=self._with_checkpoints(), tell=self._told, **choices)
            if self.record.journal is not None and trainer.accelerator.num_processes > 1:
                because = f"{trainer.accelerator.num_processes} processes train"
                instead = "Use `LanguageTrainer`, and `save_steps` of its `args`"
                raise InputError(cannot("keep a journal", because, instead))
            trainer.remove_callback(require("transformers", "lm").PrinterCallback)  # it prints every loss
            self.trainer, self.begin = trainer, time.process_time()
            if self.record.journal is not None:
                trainer.add_callback(self.record.keeper(self._so_far))
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed[0]))
        losses = [float(one["loss"]) for one in trainer.state.log_history if "loss" in one]
        counts = {"steps": trainer.state.global_step, "flops": float(trainer.flops), "tokens_generated": trainer.tokens_generated}
        used = {"objective": trainer.objective, "prefixes": trainer.shares, "losses": losses, "notes": []}
        return {**counts, **used, **self._so_far()}

    def _with_checkpoints(self) -> Any:
        """Return the training arguments, with checkpoints in the journal if there is one."""
        if self.record.folder is None:
            return self.settings
        own = copy.copy(self.settings)
        own.output_dir, own.save_total_limit, own.save_only_model = str(self.record.folder), None, False
        return own

    def _so_far(self) -> dict[str, Any]:
        spent = self.spent + time.process_time() - self.begin
        return {"cpu_seconds": spent, "midway": [{**asdict(one), "found": one.found.to_dict()} for one in self.midway]}

    def _told(self, done: float) -> None:
        """Report progress, and measure where another part of the run is done."""
        self.say("training", done)
        if done < 1 and len(self.midway) < math.floor(done * (self.evaluations + 1)):
            begin = time.process_time()
            with evaluating(self.student):
                found = self.measure()
            self.midway.append(Midway(self.trainer.state.global_step, float(self.trainer.flops), found))
            self.spent -= time.process_time() - begin


def _read(midway: Sequence[Any]) -> list[Midway]:
    return list(checked(tuple[Midway, ...], midway))


@contextlib.contextmanager
def _kept_random_states() -> Iterator[None]:
    """Restore the global random states, which a trainer sets, after the block."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Switch off the bars that transformers shows for every file that it writes or reads, inside the block."""
    logging = require("transformers.utils.logging", "lm")
    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def _arguments(args: Any, folder: str, seed: int) -> Any:
    if args is not None:
        return args
    return require("transformers", "lm").TrainingArguments(
        output_dir=folder, num_train_epochs=3, learning_rate=1e-3, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=10, dataloader_pin_memory=torch.accelerator.is_available(), seed=seed,
    )  # fmt: skip


def _identity(
    models: Sequence[CausalModel], parts: Sequence[Sequence[Example]], ends: Sequence[int], args: Any, choices: Mapping[str, Any]
) -> dict[str, Any]:
    """What identifies a journal: the models and their weights, the examples, and the settings."""
    weights = [digest({k: v for k, v in one.module.state_dict().items() if isinstance(v, torch.Tensor)}) for one in models]
    modules = [repr(one.module) + str(getattr(one.module, "config", "")) for one in models]
    examples = [[[one.prompt, one.completion] for one in part] for part in parts]
    fields = {name: value for name, value in args.to_dict().items() if not name.startswith(_NOT_OF_THE_RUN)}
    vocabulary = [models[0].tokens, list(ends)]
    return {**choices, "models": modules, "weights": weights, "examples": examples, "args": fields, "vocabulary": vocabulary}


def _changed(args: Any) -> dict[str, Any]:
    """Return the training arguments that aren't those by default, as JSON can hold them."""
    default = {one.name: one.default for one in args.__dataclass_fields__.values()}
    found = {name: value for name, value in args.to_dict().items() if not name.startswith(_NOT_OF_THE_RUN)}
    return {k: v for k, v in found.items() if k in default and v != default[k] and isinstance(v, (bool, int, float, str))}


def _named(model: nn.Module) -> str:
    """Return the class and the size of a model."""
    return f"{type(model).__name__}, {sum(one.numel() for one in model.parameters()):,} parameters"


def _draws(model: CausalModel, examples: Sequence[Example], ends: Sequence[int], most: int, seed: int) -> list[list[int]]:
    """Draw a continuation of each prompt, to be shown."""
    with evaluating(model):
        drawn = continued(model, [one.prompt for one in examples], ends, most, seed)
    return [row[a:b] for row, a, b in zip(drawn.ids.tolist(), drawn.begin.tolist(), drawn.end.tolist(), strict=True)]


def _continuations(examples: Sequence[Example], drawn: Sequence[Any], tokenizer: Any) -> tuple[Continuation, ...]:
    """Write prompts, completions and draws as text, special tokens included."""

    def text(ids: Sequence[int]) -> str:
        if not hasattr(tokenizer, "decode"):
            return " ".join(map(str, ids))
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return tuple(
        Continuation(text(one.prompt), None if one.completion is None else text(one.completion), *map(text, three))
        for one, *three in zip(examples, *drawn, strict=True)
    )


def _split(examples: list[Example], held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Set a share of the examples aside, at random; examples of one prompt stay together."""
    if isinstance(held_out, bool) or not 0 < held_out < 1:
        raise InputError(cannot(f"use `held_out={held_out!r}`", "a share lies between 0 and 1", "Use, say, held_out=0.1"))
    groups: dict[tuple[int, ...], list[Example]] = {}
    for one in examples:
        groups.setdefault(tuple(one.prompt), []).append(one)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    count = round(held_out * len(groups))
    known = list(groups.values())
    unseen, train = ([one for k in part for one in known[k]] for part in (order[:count], order[count:]))
    if count < 2 or not train:
        because = f"{count} of {len(groups)} distinct prompts are held out, and {len(groups) - count} are left"
        raise InputError(cannot("hold prompts out", because, "Give more examples, or another `held_out=`"))
    return train, unseen
