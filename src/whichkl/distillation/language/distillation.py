"""language_model: distil a language model with a direction and prefixes, and measure both KLs of sequences before and after."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from whichkl._arguments import typed
from whichkl._checks import InputError, as_int, cannot, check_seed, require
from whichkl.distillation.language.causal import CausalModel, evaluating, is_base_of
from whichkl.distillation.language.examples import Example, read_examples
from whichkl.distillation.language.held_out_loss import HeldOutLoss, held_out_loss
from whichkl.distillation.language.objective import Prefixes, check_numbers, shares_of
from whichkl.distillation.language.result import Continuation, LanguageDistillation
from whichkl.distillation.language.rollouts import continued
from whichkl.distillation.language.sequence_kl import SequenceKL, sequence_kl
from whichkl.distillation.language.stored_teacher import StoredTeacher
from whichkl.distillation.language.teacher_access import Teacher, TokenScores, settled, teacher_of
from whichkl.distillation.networks import copied, digest
from whichkl.divergences.divergence import RowDivergence
from whichkl.files.journal import Journal
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
    prefixes: Prefixes = None,
    credit: str = "token",
    hard_label_weight: float = 0.0,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    vocabulary: int | None = None,
    held_out: Any = 0.1,
    evaluations: int = 0,
    args: Any = None,
    budget: float | None = None,
    journal: str | os.PathLike[str] | None = None,
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
        evaluations: how often both KLs are measured on the way, at equal parts of the run. Each costs as much as the comparison
            at its end.
        args: `transformers.TrainingArguments`, or a dict of those that differ from the default: a learning rate of 10⁻³ that
            falls to 0, and three passes, or as many as the budget buys; nothing is saved.
        budget: FLOPs of the training; two runs of one budget can be compared. It stops before the step that, at the mean cost of
            those before, would exceed them; `notes` state a share that is far from all. The learning rate follows the share that
            is spent; whole `warmup_steps` are thousandths of it.
        journal: a folder where the run records its progress; `output_dir` of `args` isn't used then. If interrupted, call again
            with the same arguments to resume; the result is the same to the last bit on the same machine. In one process only.
        seed: fixes the split, the order, prefixes and draws.
        memo: see `sequence_kl`; calls that share one measure an untrained student once.
        tell: called with the present step, and the fraction of it that is done.

    Raises:
        InputError: see `LanguageTrainer` and `sequence_kl`; or too few examples are left on a side.
        IntegrityError: a checkpoint isn't what was written.
        ResourceError: the forecast of the memory is above what is free, or the journal can't be written.
    """
    require("transformers", "lm")
    from whichkl.distillation.language.record import Record
    from whichkl.distillation.language.run import Run
    from whichkl.distillation.language.training_arguments import arguments_of

    seed, say = check_seed(seed), tell or (lambda step, done: None)
    shares = shares_of(prefixes)
    numbers = {"hard_label_weight": hard_label_weight, "temperature": temperature}
    check_numbers(**numbers, max_new_tokens=max_new_tokens, budget=budget)
    if not 0 <= as_int(evaluations) <= 100:
        raise InputError(cannot(f"use `evaluations={evaluations}`", "it is a number from 0 to 100", "Give, say, evaluations=3"))
    q = CausalModel(copied(CausalModel(student, "student").module, "student", seed), "student")
    teacher = q.module if is_base_of(teacher, student) else teacher
    p = teacher_of(teacher, q)
    with evaluating(p, q):
        ends = settled(p, q, tokenizer, vocabulary)
    read = partial(read_examples, tokenizer=tokenizer, tokens=q.tokens, end=ends[0])
    if isinstance(held_out, (int, float)):
        train, unseen = _split(read(data), held_out, seed)
    else:
        train, unseen = read(data), _shuffled(read(held_out, word="held-out example"), seed)
    if isinstance(p, StoredTeacher):  # names an example by its place in the data, which the trainer doesn't know
        p.lookup([*train, *unseen], max_new_tokens)
    compared = unseen[:_MAX_PROMPTS]
    measure = _measure(p, q, compared, tokenizer, ends, vocabulary, max_new_tokens, seed, memo, say)
    examples = list({tuple(one.prompt): one for one in reversed(compared)}.values())[::-1][:_SHOWN]  # one of each prompt
    draw = partial(_draws, examples=examples, ends=ends, most=max_new_tokens, seed=seed)
    choices: dict[str, Any] = {"objective": objective, "prefixes": shares, "credit": credit, **numbers}
    choices |= {"max_new_tokens": max_new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments_of(args, folder, seed, budget)
        fixed = {**choices, "held_out": len(unseen), "seed": seed, "budget": budget, "evaluations": evaluations}
        fixed["args"] = {name: one for name, one in settings.to_dict().items() if not name.startswith(_NOT_OF_THE_RUN)}
        log = None if journal is None else Journal.of(journal, _identity(p, q, (train, unseen), ends, fixed))
        run = Run(q, Record(log), measure, evaluations, say)
        trainer = run.trainer_of(
            settings,
            teacher=teacher,
            train_dataset=[one.to_dict() if one.completion else {"prompt": one.prompt} for one in train],
            processing_class=tokenizer,
            vocabulary=vocabulary,
            budget=budget,
            **choices,
        )
        before = run.record.measured("before", run.measured)
        shown = [draw(one) for one in (p, q)]
        run.train()
    after = run.record.measured("after", run.measured)
    shown.append(draw(q))
    used = {**fixed, "objective": trainer.objective, "prefixes": trainer.shares, "examples": len(train)}
    used |= {"learning_rate": settings.learning_rate, "batch": settings.per_device_train_batch_size}
    used |= {"args": _changed(settings), "teacher": _named(p), "student": _named(q), "memory": run.memory}
    return LanguageDistillation(
        q.module,
        before,
        after,
        used,
        **run.figures,
        notes=(*_overlap(train, compared), *_notes(budget, **run.figures)),
        examples=_continuations(examples, shown, tokenizer),
        tokenizer=tokenizer,
        journal=None if log is None else run.record,
    )


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
    has_completions = all(one.completion for one in unseen)
    prompts = [one.to_dict() if has_completions else one.prompt for one in unseen]
    return lambda: sequence_kl(teacher=p.module, student=q.module, prompts=prompts, **settings)


def _identity(
    teacher: Teacher, student: CausalModel, parts: Sequence[Sequence[Example]], ends: Sequence[int], choices: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what identifies a journal: the models and their weights, the examples, and the settings."""
    if isinstance(teacher, TokenScores):
        because = "the teacher is a function, and it can't be distinguished from another one"
        raise InputError(cannot("keep a journal", because, "Leave `journal=` out, or pass another kind of teacher"))
    models: dict[str, Any] = {}
    for who, one in (("teacher", teacher), ("student", student)):
        models[who] = type(one).__name__
        if isinstance(one, CausalModel):
            weights = {name: value for name, value in one.module.state_dict().items() if isinstance(value, torch.Tensor)}
            models[who] = [repr(one.module), str(getattr(one.module, "config", "")), digest(weights)]
        elif isinstance(one, StoredTeacher):
            models[who] = one.manifest
    examples = [[[one.prompt, one.completion] for one in part] for part in parts]
    return {**choices, **models, "examples": examples, "vocabulary": [student.tokens, list(ends)]}


def _changed(args: Any) -> dict[str, Any]:
    """Return the training arguments that aren't those by default, as JSON can hold them."""
    default = {one.name: one.default for one in args.__dataclass_fields__.values()}
    found = {name: value for name, value in args.to_dict().items() if not name.startswith(_NOT_OF_THE_RUN)}
    return {k: v for k, v in found.items() if k in default and v != default[k] and isinstance(v, (bool, int, float, str))}


def _named(model: Teacher) -> str:
    """Return the class and the size of a model, or what else a teacher is."""
    if isinstance(model, CausalModel):
        module: nn.Module = model.module
        return f"{type(module).__name__}, {sum(one.numel() for one in module.parameters()):,} parameters"
    return "the data's text" if model is None else model.what if isinstance(model, StoredTeacher) else type(model).__name__


def _draws(model: Teacher, examples: Sequence[Example], ends: Sequence[int], most: int, seed: int) -> list[list[int] | None]:
    """Draw a continuation of each prompt, to be shown; none from a teacher that can't be drawn from."""
    if not isinstance(model, CausalModel):
        return [None for _ in examples]
    with evaluating(model):
        drawn = continued(model, [one.prompt for one in examples], ends, most, seed)
    return [row[a:b] for row, a, b in zip(drawn.ids.tolist(), drawn.begin.tolist(), drawn.end.tolist(), strict=True)]


def _continuations(examples: Sequence[Example], drawn: Sequence[Any], tokenizer: Any) -> tuple[Continuation, ...]:
    """Write prompts, completions and draws as text, special tokens included."""

    def text(ids: Sequence[int] | None) -> Any:
        if ids is None:
            return None
        if not hasattr(tokenizer, "decode"):
            return " ".join(map(str, ids))
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return tuple(
        Continuation(text(one.prompt), text(one.completion), *map(text, three))
        for one, *three in zip(examples, *drawn, strict=True)
    )


def _notes(budget: float | None, *, steps: int, flops: float, **_: Any) -> tuple[str, ...]:
    """Note a training that spent another amount than its budget, by more than a step less or a hundredth more."""
    if budget is None or not steps or (flops + flops / steps > budget and flops <= 1.01 * budget):
        return ()
    spent = f"training spent {flops / budget:.0%} of its budget"
    return (f"{spent}: let `args` allow more steps",) if flops < budget else (f"{spent}, since it ends with a whole step",)


def _overlap(train: Sequence[Example], compared: Sequence[Example]) -> tuple[str, ...]:
    """Note held-out examples that are training examples too."""
    known = {(tuple(one.prompt), tuple(one.completion or ())) for one in train}
    both = sum((tuple(one.prompt), tuple(one.completion or ())) in known for one in compared)
    said = f"{both:,} of {len(compared):,} held-out examples are training examples, too: on others the student may be worse"
    return (said,) if both else ()


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
