"""language_model: distil a language model with a direction and prefixes, and measure both KLs of sequences before and after."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot, check_seed, plain, require
from whichkl.distillation.language.causal import CausalModel, evaluating, is_base_of
from whichkl.distillation.language.examples import Example, read_examples
from whichkl.distillation.language.held_out_loss import HeldOutLoss, held_out_loss
from whichkl.distillation.language.sequence_kl import SequenceKL, sequence_kl
from whichkl.distillation.language.teacher_access import Teacher, settled, teacher_of
from whichkl.divergences.divergence import RowDivergence
from whichkl.printable import HTML
from whichkl.process.torch_modes import plain_modes

_MAX_PROMPTS = 500
"""Largest number of held-out prompts on which sequences are compared."""
_ENDLESS = 100_000
"""Passes that no budget lets a training come to."""


@dataclass(frozen=True)
class LanguageDistillation(HTML):
    """A trained student, how far from its teacher it is on prompts that it wasn't trained on, and what it cost."""

    student: nn.Module
    """The trained copy."""
    before: SequenceKL | HeldOutLoss
    """Of the student as it was given: both KLs of sequences, or what a teacher that is no model lets one measure."""
    after: SequenceKL | HeldOutLoss
    settings: Mapping[str, Any]
    steps: int
    flops: float
    """(6 Nₛ + 2 Nₜ) per trained token and 2 N per generated or prefilled one; N are all parameters of a model."""
    cpu_seconds: float
    history: tuple[float, ...]
    """The logged losses: means over tokens."""

    def to_dict(self) -> dict[str, Any]:
        """Return all but the weights as JSON can hold it."""
        fields = {name: value for name, value in vars(self).items() if name not in ("student", "before", "after")}
        both: dict[str, Any] = plain({**fields, "before": asdict(self.before), "after": asdict(self.after)})
        return both

    def __repr__(self) -> str:
        return f"LanguageDistillation({self.settings['objective']}, {self.steps} steps, {self.after!r})"

    def __str__(self) -> str:
        """Both KLs before and after, then the measures of the trained student."""
        shares = ", ".join(f"{share:g} {name}" for name, share in self.settings["prefixes"].items() if share)
        head = f"{self.settings['objective']} on prefixes of {shares}: {self.steps} steps, {self.flops:.2g} FLOPs"
        lines = [f"{head}, {self.cpu_seconds:.0f} CPU seconds"]
        for name in ("forward_kl", "reverse_kl"):
            was, now = getattr(self.before, name), getattr(self.after, name)
            if now is not None:
                lines.append(f"  {name + now.constant:<12}{was.number} → {now.number} nats a {self.after.per}")
        return "\n".join([*lines, str(self.after)])


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
    vocabulary: int | None = None,
    held_out: Any = 0.1,
    args: Any = None,
    budget: float | None = None,
    seed: int = 0,
    memo: dict[Any, Any] | None = None,
    tell: Callable[[str, float], None] | None = None,
) -> LanguageDistillation:
    """Train a copy of a student language model on a teacher, and compare their continuations of held-out prompts.

    Args:
        teacher: p, a causal language model of transformers; or a `StoredTeacher`, `TokenScores`, or None for the data's text
            alone. Those allow fewer objectives (see `LanguageTrainer`) and fewer measures (`HeldOutLoss`).
        student: q; a copy is trained.
        tokenizer: that of both; None where the data are token ids.
        data: texts, {'prompt': …, 'completion': …}, {'messages': […]}, or token ids in their place.
        objective: see `LanguageTrainer`; so are the next five.
        prefixes: shares of ``"data"``, ``"student"`` and ``"teacher"``.
        credit: ``"token"`` or ``"sequence"``.
        hard_label_weight: of the data's cross-entropy.
        temperature: divides both logits.
        max_new_tokens: where continuations are cut.
        vocabulary: the number of tokens, where there is no tokenizer and widths differ by padding.
        held_out: the share of the examples whose prompts are for the comparison alone, or other examples for it, in the form of
            `data`. At most 500 of them are used.
        args: `transformers.TrainingArguments`; by default a learning rate of 10⁻³ that falls to 0, and three passes, or as
            many as the budget buys; nothing is saved.
        budget: FLOPs after which training stops; two runs of one budget can be compared. The learning rate follows the share
            of it that is spent.
        seed: fixes the split, the order, prefixes and draws.
        memo: see `sequence_kl`; calls that share one measure an untrained student once.
        tell: called with the present step, and the fraction of it that is done.

    Raises:
        InputError: see `LanguageTrainer` and `sequence_kl`; or too few examples are left on a side.
    """
    transformers = require("transformers", "lm")
    from whichkl.distillation.language.trainer import LanguageTrainer

    seed, say = check_seed(seed), tell or (lambda step, done: None)
    shares = dict({"data": 1.0} if prefixes is None else prefixes)
    if budget is not None and not (isinstance(budget, (int, float)) and 0 < budget < math.inf):
        raise InputError(cannot(f"use `budget={budget!r}`", "it is a positive number of FLOPs", "Give, say, budget=1e15"))
    q = CausalModel(copy.deepcopy(student), "student")
    teacher = q.module if is_base_of(teacher, student) else teacher
    p = teacher_of(teacher, q)
    with evaluating(p, q):
        ends = settled(p, q, tokenizer, vocabulary)
    examples = read_examples(data, tokenizer, q.tokens, ends[0])
    if isinstance(held_out, (int, float)):
        train, unseen = _split(examples, held_out, seed)
    else:
        train, unseen = examples, _shuffled(read_examples(held_out, tokenizer, q.tokens, ends[0]), seed)
    measure = _measure(p, q, unseen[:_MAX_PROMPTS], tokenizer, ends, vocabulary, max_new_tokens, seed, memo, say)
    with tempfile.TemporaryDirectory() as folder:
        settings = args or transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=3 if budget is None else _ENDLESS, learning_rate=1e-3, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=10, seed=seed,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )  # fmt: skip
        trainer = LanguageTrainer(
            teacher=teacher,
            student=q.module,
            objective=objective,
            prefixes=shares,
            credit=credit,
            hard_label_weight=hard_label_weight,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            args=settings,
            train_dataset=[one.to_dict() if one.completion else {"prompt": one.prompt} for one in train],
            processing_class=tokenizer,
            vocabulary=vocabulary,
            budget=budget,
            tell=lambda done: say("training", done),
        )
        trainer.remove_callback(transformers.PrinterCallback)  # the losses are in the result
        before = measure()
        begin = time.process_time()
        trainer.train()
        spent = time.process_time() - begin
    logged = tuple(float(one["loss"]) for one in trainer.state.log_history if "loss" in one)
    used = {"objective": trainer.objective, "prefixes": trainer.shares, "credit": credit, "temperature": temperature}
    used |= {"hard_label_weight": hard_label_weight, "max_new_tokens": max_new_tokens, "held_out": len(unseen), "seed": seed}
    used |= {"budget": budget, "learning_rate": settings.learning_rate, "batch": settings.per_device_train_batch_size}
    q.module.eval()
    return LanguageDistillation(q.module, before, measure(), used, trainer.state.global_step, trainer.flops, spent, logged)


def _measure(
    p: Teacher,
    q: CausalModel,
    unseen: list[Example],
    tokenizer: Any,
    ends: tuple[int, ...],
    vocabulary: int | None,
    most: int,
    seed: int,
    memo: dict[Any, Any] | None,
    say: Callable[[str, float], None],
) -> Callable[[], SequenceKL | HeldOutLoss]:
    """Return the call that compares the student as it then is with its teacher."""
    if not isinstance(p, CausalModel):
        return partial(held_out_loss, p, q, unseen, ends=ends, most=most, seed=seed, tell=partial(say, "held-out loss"))
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocabulary": vocabulary,
        "max_new_tokens": most,
        "seed": seed,
        "memo": memo,
        "tell": say,
    }
    prompts = [one.prompt for one in unseen]
    return lambda: sequence_kl(teacher=p.module, student=q.module, prompts=prompts, **settings)


def _split(examples: list[Example], held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Set a share of the examples aside, at random; examples of one prompt stay together."""
    if isinstance(held_out, bool) or not 0 < held_out < 1:
        raise InputError(cannot(f"use `held_out={held_out!r}`", "a share lies between 0 and 1", "Use, say, held_out=0.1"))
    groups: dict[tuple[int, ...], list[Example]] = {}
    for one in examples:
        groups.setdefault(tuple(one.prompt), []).append(one)
    known = _shuffled(list(groups.values()), seed)
    count = round(held_out * len(groups))
    unseen, train = ([one for group in part for one in group] for part in (known[:count], known[count:]))
    if count < 2 or not train:
        because = f"{count} of {len(groups)} distinct prompts are held out, and {len(groups) - count} are left"
        raise InputError(cannot("hold prompts out", because, "Give more examples, or another `held_out=`"))
    return train, unseen


def _shuffled(values: list[Any], seed: int) -> list[Any]:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed), device="cpu")
    return [values[k] for k in order.tolist()]
