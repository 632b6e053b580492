"""Job: the arguments of `language_model` from a YAML file or from the command line; models and data are folders and files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot
from whichkl.distillation.job import TEXT, TYPES, JobFields
from whichkl.distillation.language.job_keys import KEYS
from whichkl.distillation.language.objective import shares_of
from whichkl.distillation.losses.specs import row_divergence_of

NAMES = tuple(KEYS)
"""The keys."""
_WORDS = {str: "a text", int: "a whole number", float: "a number", dict: "a mapping", bool: "true or false"}
_EXAMPLES = {"teacher": "models/teacher", "student": "models/student", "data": "examples.jsonl"}


def is_language_job(fields: Mapping[str, Any]) -> bool:
    """Whether a job is a language model's: its models are folders, where a classifier's are FILE.py:FUNCTION.

    Where neither is named, its data are a file of examples, or it has a key that a classifier's doesn't have.

    >>> is_language_job({"student": "models/small"}), is_language_job({"student": "nets.py:small"})
    (True, False)
    >>> is_language_job({"max_new_tokens": 8}), is_language_job({"data": "a.jsonl"}), is_language_job({"data": "a.py:read"})
    (True, True, False)
    """
    models = [one for one in map(fields.get, ("teacher", "student")) if isinstance(one, str)]
    if models:
        return any(".py" not in one for one in models)
    has_own_key = any(name in KEYS and name not in TYPES for name in fields)
    return has_own_key or str(fields.get("data")).endswith((".jsonl", ".txt"))


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
                raise InputError(cannot("distil a language model", job.missing(name), f"Add, say, {name}={example}"))
    return {**{k: v for k, v in fields.items() if k not in (*_EXAMPLES, "trust_remote_code")}, **_loaded(fields, job.naming)}


def _check(name: str, value: Any) -> None:
    if name not in KEYS:
        because = "language models are distilled without such an argument"
        near = difflib.get_close_matches(name, KEYS, 1, 0.8)
        instead = f"Use `{near[0]}`" if near else f"Choose among {', '.join(KEYS)}"
        if name in ("objectives", "seeds"):
            instead = "Compare several by `whichkl compare`"
        raise InputError(cannot(f"use `{name}`", because, instead))
    if name == "prefixes":
        shares_of(value)
    if type(value) not in KEYS[name].types:
        kind = _WORDS[KEYS[name].types[-1]]
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
