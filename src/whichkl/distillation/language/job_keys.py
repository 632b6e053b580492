"""Job keys: what a language model's job may contain, as the reader, its errors and `whichkl distill --help` know it."""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """A key of a job."""

    types: tuple[type, ...]
    """The types that its value may have."""
    meaning: str
    """A line for the help."""


_NUMBER = (int, float)
KEYS = {
    "teacher": Key((str,), "a folder of save_pretrained or of `whichkl distill capture`, or text"),
    "student": Key((str,), "a folder of save_pretrained"),
    "data": Key((str,), "a .jsonl or .txt of examples"),
    "held_out": Key((str, *_NUMBER), "the share that is compared alone, or a file of other examples"),
    "objective": Key((str,), "forward_kl, reverse_kl, jeffreys:0.3, …"),
    "prefixes": Key((dict,), "shares of data, student and teacher: {data: 0.5, student: 0.5}"),
    "credit": Key((str,), "token; or sequence, for reverse_kl on student prefixes"),
    "hard_label_weight": Key(_NUMBER, "share of the data's cross-entropy"),
    "temperature": Key(_NUMBER, "divides both logits"),
    "max_new_tokens": Key((int,), "where continuations and completions are cut; 64"),
    "vocabulary": Key((int,), "the number of tokens, where widths differ by padding"),
    "evaluations": Key((int,), "how often both KLs are measured on the way; 0"),
    "budget": Key(_NUMBER, "FLOPs of the training: 1e15"),
    "args": Key((dict,), "TrainingArguments of transformers that differ from the default"),
    "seed": Key((int,), "fixes every random choice"),
    "trust_remote_code": Key((bool,), "whether code that came with a model may run"),
}
"""Every key."""


def help_on_keys() -> str:
    """Return the keys with their meanings, for a terminal."""
    lines = [f"{name}: {key.meaning}" for name, key in KEYS.items()]
    return "\n\n".join(["Keys of a language model's JOB.yaml:", *lines])
