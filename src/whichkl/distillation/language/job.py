"""Job: the arguments of `language_model` from a YAML file or from the command line; models and data are folders and files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot
from whichkl.distillation.job import TEXT, JobFields
from whichkl.distillation.language.objective import shares_of
from whichkl.distillation.losses.specs import row_divergence_of

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("teacher", "student", "data", "objective", "credit"), (str,)),
    **dict.fromkeys(("hard_label_weight", "temperature", "budget"), (int, float)),
    "held_out": (str, int, float),
    **dict.fromkeys(("max_new_tokens", "vocabulary", "evaluations", "seed"), (int,)),
    **dict.fromkeys(("prefixes", "args"), (dict,)),
    "trust_remote_code": (bool,),
}
"""Every key, and the types of its value."""
NAMES = tuple(_TYPES)
"""The keys."""
_WORDS = {str: "a text", int: "a whole number", float: "a number", dict: "a mapping", bool: "true or false"}
_EXAMPLES = {"teacher": "models/teacher", "student": "models/student", "data": "examples.jsonl"}


def is_language_job(fields: Mapping[str, Any]) -> bool:
    """Whether a job is a language model's: its models are folders, where a classifier's are FILE.py:FUNCTION.

    >>> is_language_job({"student": "models/small"}), is_language_job({"student": "nets.py:small"})
    (True, False)
    """
    models = [fields.get(name) for name in ("teacher", "student")]
    return any(isinstance(one, str) and ".py" not in one for one in models)


def language_job(job: JobFields) -> dict[str, Any]:
    """Load what a job names, and return the arguments of `language_model`; an error names the file and the line.

    Raises:
        InputError: a key is unknown, missing, or has a value of another type, or something can't be loaded.
    """
    fields = dict(job.values)
    for name, value in fields.items():
        with job.naming(name):
            _check(name, value)
    with job.as_in_file(NAMES):
        for name, example in _EXAMPLES.items():
            if name not in fields:
                raise InputError(cannot("distil a language model", f"`{name}` is missing", f"Add, say, {name}: {example}"))
    return {**{k: v for k, v in fields.items() if k not in (*_EXAMPLES, "trust_remote_code")}, **_loaded(fields, job.naming)}


def _check(name: str, value: Any) -> None:
    if name not in _TYPES:
        because = "language models are distilled without such an argument"
        near = difflib.get_close_matches(name, _TYPES, 1, 0.8)
        instead = f"Use `{near[0]}`" if near else f"Choose among {', '.join(_TYPES)}"
        if name in ("objectives", "seeds"):
            instead = "Compare several by `whichkl compare`"
        raise InputError(cannot(f"use `{name}`", because, instead))
    if name == "prefixes":
        shares_of(value)
    if type(value) not in _TYPES[name]:
        kind = _WORDS[_TYPES[name][-1]]
        raise InputError(cannot(f"use `{name}: {value}`", f"it isn't {kind}", f"Write {kind}"))
    if name == "objective":
        row_divergence_of(value)


def _loaded(fields: Mapping[str, Any], naming: Any) -> dict[str, Any]:
    """Load the data, both models, and the tokenizer that they have in common."""
    from whichkl.distillation.language.loading import common_tokenizer, load_examples, load_model
    from whichkl.distillation.language.stored_teacher import MANIFEST, StoredTeacher

    is_trusted = bool(fields.get("trust_remote_code"))
    with naming("data"):
        data = load_examples(fields["data"])
    with naming("student"):
        student, tokenizer = load_model(fields["student"], "student", trust_remote_code=is_trusted)
    with naming("teacher"):
        place: str = fields["teacher"]
        teacher: Any = None
        if (Path(place) / MANIFEST).exists():
            teacher = StoredTeacher.open(place, tokenizer=tokenizer)
        elif place != TEXT:
            teacher, other = load_model(place, "teacher", trust_remote_code=is_trusted)
            tokenizer = common_tokenizer(other, tokenizer)
    found = {"teacher": teacher, "student": student, "tokenizer": tokenizer, "data": data}
    if isinstance(fields.get("held_out"), str):
        with naming("held_out"):
            found["held_out"] = load_examples(fields["held_out"])
    return found
