"""Loading: language models, prompts and examples from files: safetensors and JSON only, and nothing is downloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot, require
from whichkl.distillation.language.lines import Lines
from whichkl.files.reading import read_file, read_json
from whichkl.process.memory import refuse_if_ran_out
from whichkl.user_code import said_of

_TOKENIZER_NAMES = ("tokenizer", "vocab", "merges", "special_tokens_map", "spiece")
_TOKENIZER_ENDINGS = (".model", ".tiktoken")
"""Of the files of a tokenizer."""
_TABLES = (".csv", ".tsv", ".parquet", ".xlsx", ".feather", ".npz", ".npy")
"""Endings of files that are no lines of text."""


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Switch off the bars that transformers shows for every file that it writes or reads, inside the block."""
    logging = require("transformers.utils.logging", "lm")
    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def load_model(folder: str, who: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return the model and the tokenizer that `save_pretrained` wrote into a folder; None where there is no tokenizer.

    Code that came with a model is only run with `trust_remote_code`.

    Raises:
        InputError: there is no folder, or transformers can't load it.
    """
    transformers = require("transformers", "lm")
    if not Path(folder).is_dir():
        raise InputError(cannot(f"load the {who} `{folder}`", "there is no such folder", "Give one that save_pretrained wrote"))
    try:
        how = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        with without_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **how)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how) if _has_tokenizer(folder) else None
    except Exception as error:
        refuse_if_ran_out(error, f"load the {who}")
        instead = "Save it by `save_pretrained`, the model and the tokenizer into one folder"
        if "trust_remote_code" in str(error) and not trust_remote_code:
            do, because = f"load the {who} `{folder}`", "it comes with code of its own, which would be run"
            raise InputError(cannot(do, because, "If you trust it, write trust_remote_code: true into the job")) from error
        raise InputError(cannot(f"load the {who} `{folder}`", said_of(error), instead)) from error
    return model, tokenizer


def _has_tokenizer(folder: str) -> bool:
    return any(one.name.startswith(_TOKENIZER_NAMES) or one.suffix in _TOKENIZER_ENDINGS for one in Path(folder).iterdir())


def common_tokenizer(teacher: Any, student: Any) -> Any:
    """Return the tokenizer of both models; None where neither has one, so that only token ids can be read.

    Raises:
        InputError: a token has another id in each; sequences of ids then mean different texts. Or only one of them has one.
    """
    if teacher is None or student is None:
        if teacher is not student:
            has, lacks = ("student", "teacher") if teacher is None else ("teacher", "student")
            because = f"the {has}'s folder has a tokenizer and the {lacks}'s has none, so that equal ids may mean other texts"
            raise InputError(cannot("compare these models", because, "Save the tokenizer into both folders, or into neither"))
        return None
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    if ours == theirs:
        return teacher
    other = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    if other:
        some = ", ".join(f"{token!r} is {ours[token]} and {theirs[token]}" for token in other[:3])
        because = f"{len(other):,} tokens have other ids, such as {some}"
    else:
        common = len(ours.keys() & theirs.keys())
        because = f"one has {len(ours):,} tokens and the other {len(theirs):,}, of which {common:,} are common"
    raise InputError(cannot("compare models of different tokenizers", because, "Use a student with the teacher's tokenizer"))


def load_prompts(path: str) -> list[Any]:
    """Return the prompts of a file, one a line; in `.jsonl` it's text, token ids, or an object with `prompt` or `messages`.

    Where all lines are objects with a `completion`, they are returned whole.

    Raises:
        InputError: it can't be read, or a line has another form.
    """
    lines = _lines(path)
    for number, one in zip(lines.numbers, lines, strict=True):
        kind = next((name for name in ("prompt", "messages") if name in one), None) if isinstance(one, dict) else ""
        if kind is None:
            because = f"line {number} has neither `prompt` nor `messages`"
            raise InputError(cannot(f"read `{path}`", because, 'Write {"prompt": "…"} on every line'))
    if all(isinstance(one, dict) and "prompt" in one and "completion" in one for one in lines):
        return lines
    prompts = (one.get("prompt", one.get("messages")) if isinstance(one, dict) else one for one in lines)
    return Lines(prompts, path, lines.numbers)


def load_examples(path: str) -> list[Any]:
    """Return the examples of a file, one a line, in the forms of `read_examples`; a line of what isn't `.jsonl` is a text.

    Raises:
        InputError: it can't be read.
    """
    return _lines(path)


def _lines(path: str) -> Lines:
    """Return the lines that aren't empty: text, or what JSON has."""
    if path.lower().endswith(_TABLES):
        because, instead = "it is a table, and each of its lines would be one text", '{"prompt": "…", "completion": "…"}'
        raise InputError(cannot(f"read `{path}`", because, f"Write a .jsonl with {instead} on every line"))
    try:
        text = read_file(Path(path)).decode("utf-8")
    except OSError as error:
        because = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(cannot(f"read `{path}`", because, "Correct the path")) from error
    except UnicodeDecodeError as error:
        raise InputError(cannot(f"read `{path}`", "it isn't text in UTF-8", "Save it as UTF-8")) from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    lines = Lines((line for _, line in numbered), path, (number for number, _ in numbered))
    if not path.endswith((".jsonl", ".json")):
        return lines
    for place, number in enumerate(lines.numbers):
        try:
            lines[place] = read_json(lines[place].encode())
        except ValueError as error:
            raise InputError(cannot(f"read `{path}`", f"line {number}: {error}", "Write JSON on every line")) from error
    return lines
