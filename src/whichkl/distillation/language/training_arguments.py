"""Training arguments: what of `TrainingArguments`, and of `Trainer`, has no meaning for a divergence of a teacher is refused."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from whichkl._checks import InputError, cannot
from whichkl.user_code import said_of

_ENDLESS = 100_000
"""Passes that no budget lets a training come to."""
_OWN = ("the student is the model that is trained", "Pass it as `student=`")
_NO_LOGITS = ("an evaluation keeps no logits", "Leave it out; `sequence_kl`, or a callback, measures more")
_REFUSED = {
    "model": _OWN,
    "model_init": _OWN,
    "data_collator": ("examples are padded here", "Leave it out"),
    "compute_loss_func": ("the loss is a divergence of the teacher", "Pass a RowDivergence as `objective=`"),
    "compute_metrics": _NO_LOGITS,
    "preprocess_logits_for_metrics": _NO_LOGITS,
}
"""Arguments of `Trainer`, why each has no part here, and what to do."""


def check_kind(args: Any) -> None:
    """Refuse what aren't training arguments."""
    if args is not None and not isinstance(args, transformers.TrainingArguments):
        because = f"they are a `{type(args).__name__}`"
        raise InputError(cannot("use these `args`", because, "Pass transformers.TrainingArguments(output_dir=…)"))


def check_names(others: Mapping[str, Any], trainer: type) -> None:
    """Refuse further arguments that no trainer of transformers takes."""
    known = inspect.signature(transformers.Trainer.__init__).parameters
    for name in others:
        if name not in known:
            near = difflib.get_close_matches(name, [*inspect.signature(trainer).parameters, *known], 1)
            instead = f"Use `{near[0]}=`" if near else "Leave it out"
            raise InputError(cannot(f"use `{name}=`", "no trainer takes such an argument", instead))


def checked_arguments(args: Any, others: dict[str, Any], is_stream: bool) -> Any:
    """Return a copy of the training arguments, with what this trainer fixes.

    Raises:
        InputError: they aren't `TrainingArguments`, or something asks for what the loss hasn't.
    """
    for name, (because, instead) in _REFUSED.items():
        if others.get(name) is not None:
            raise InputError(cannot(f"use `{name}=` here", because, instead))
        others.pop(name, None)
    check_kind(args)
    args = transformers.TrainingArguments() if args is None else copy.copy(args)
    parallel = args.parallelism_config
    sequence = parallel is not None and (parallel.cp_enabled or parallel.sp_enabled)
    for is_refused, name, because, instead in (
        (
            args.label_smoothing_factor,
            "label_smoothing_factor",
            "the teacher's laws take the place of smoothed labels",
            "Set it to 0; `hard_label_weight=` mixes in labels",
        ),
        (not 0 <= args.learning_rate < math.inf, "learning_rate", f"it is {args.learning_rate}", "Set it to, say, 1e-3"),
        *(
            (getattr(args, name) < 1, name, f"it is {getattr(args, name)}", "Set it to 1 or more")
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        ),
        (
            args.train_sampling_strategy == "group_by_length",
            "train_sampling_strategy",
            "lengths aren't known before continuations are drawn",
            "Leave it out, or sort the examples and use 'sequential'",
        ),
        (
            sequence,
            "parallelism_config",
            "a sequence is split over processes, and continuations are drawn whole",
            "Split batches or weights: DDP, FSDP",
        ),
        (
            is_stream and args.max_steps < 1,
            "train_dataset",
            "it is a stream without a length, and `max_steps` isn't set",
            "Set TrainingArguments(max_steps=…), or pass a list",
        ),
    ):
        if is_refused:
            raise InputError(cannot(f"use this `{name}`", because, instead))
    args.remove_unused_columns = False
    args.label_names = ["begin"]  # without labels an evaluation would report no loss
    args.logging_nan_inf_filter = False  # it would show the last finite loss in the place of one that isn't a number
    if args.n_gpu > 1:
        args._n_gpu = 1  # threads of one process can't share a student whose hidden states are captured
    if is_stream:  # each process reads its own share: their batches have different widths
        args.accelerator_config = copy.copy(args.accelerator_config)
        args.accelerator_config.dispatch_batches = False
    return args


def arguments_of(args: Any, folder: str, seed: int, budget: float | None) -> Any:
    """Return the training arguments: the given ones, or the default with what a dict changes.

    Raises:
        InputError: a dict has an unknown name, or a value that can't be used.
    """
    if args is not None and not isinstance(args, Mapping):
        check_kind(args)
        return args
    epochs = 3 if budget is None else _ENDLESS
    default: dict[str, Any] = {
        "num_train_epochs": epochs,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "seed": seed,
    }
    default |= {"disable_tqdm": True, "logging_steps": 10, "dataloader_pin_memory": torch.accelerator.is_available()}
    changes = dict(args or {})
    known = transformers.TrainingArguments.__dataclass_fields__
    for name in changes:
        if name not in known or name == "output_dir":
            near = difflib.get_close_matches(str(name), known, 1)
            because = "`TrainingArguments` has no such argument" if name not in known else "a dict has no output folder"
            instead = f"Use `{near[0]}`" if near and name not in known else "Leave it out"
            raise InputError(cannot(f"use `{name}` in `args`", because, instead))
        if isinstance(known[name].default, (int, float)) and not isinstance(changes[name], (int, float)):
            because = f"a `{type(changes[name]).__name__}` has no meaning there"
            raise InputError(cannot(f"use `{name}: {changes[name]}` in `args`", because, "Write a number, or true or false"))
    try:
        return transformers.TrainingArguments(output_dir=folder, **{**default, **changes})
    except Exception as error:
        instead = "Correct them; see transformers.TrainingArguments"
        raise InputError(cannot("use these `args`", said_of(error), instead)) from error
