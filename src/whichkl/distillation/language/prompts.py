"""Prompts: texts, conversations or token ids, read as lists of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.language.lines import Lines, place_of
from whichkl.user_code import said_of

WANTED = "Give texts, conversations (lists of {'role': …, 'content': …}), or lists of token ids"
TOKENIZER = "Pass `tokenizer=`, which a trainer calls `processing_class=`, or save it into the folders of both models"


def read_prompts(prompts: Any, tokenizer: Any, tokens: int) -> list[list[int]]:
    """Return the token ids of each prompt; a conversation gets the tokenizer's chat template, up to the next answer.

    Raises:
        InputError: there is none, one has another form or no token, or an id isn't one of the tokens.
    """
    given = all_of(prompts, "read the prompts", WANTED)
    found = [read_prompt(one, tokenizer, place_of(given, number, "prompt")) for number, one in enumerate(given)]
    if not found:
        raise InputError(cannot("read the prompts", "there are none", "Give at least two"))
    for number, ids in enumerate(found):
        if not ids:
            because = f"{place_of(given, number, 'prompt')} has no token"
            raise InputError(cannot("read the prompts", because, "Leave it out, or begin it with a start token"))
        if min(ids) < 0 or max(ids) >= tokens:
            wrong = next(one for one in ids if not 0 <= one < tokens)
            because = f"{place_of(given, number, 'prompt')} has the token {wrong}, and there are {tokens:,} tokens"
            raise InputError(cannot("read the prompts", because, "Use the tokenizer of both models"))
    return found


def all_of(data: Any, do: str, wanted: str) -> list[Any]:
    """Return what can be listed.

    Raises:
        InputError: it is one text or a data frame, or can't be listed.
    """
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise InputError(cannot(do, f"they are one `{type(data).__name__}`", wanted))
    if hasattr(data, "columns"):  # a loop over a frame gives the names of its columns
        raise InputError(cannot(do, f"they are one `{type(data).__name__}`", "Pass a list of its rows: frame.to_dict('records')"))
    try:
        return data if isinstance(data, Lines) else list(data)
    except Exception as error:  # a user's own data set may raise anything
        raise InputError(cannot(do, said_of(error), wanted)) from error


def read_prompt(prompt: Any, tokenizer: Any, place: str) -> list[int]:
    """Return the token ids of one text, conversation or list of ids.

    Raises:
        InputError: it is none of them, or text without a tokenizer.
    """
    prompt = listed(prompt)
    if is_text(prompt):
        if tokenizer is None:
            raise InputError(cannot("read the prompts", f"{place} is text", TOKENIZER))
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        if not getattr(tokenizer, "chat_template", None):
            because = f"{place} is a conversation, and the tokenizer has no chat template"
            raise InputError(cannot("read the prompts", because, "Set `tokenizer.chat_template`, or give texts"))
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not are_ids(prompt):
        raise InputError(cannot("read the prompts", f"{place} is {other_than_ids(prompt)}", WANTED))
    return [int(one) for one in prompt]


def is_text(prompt: Any) -> bool:
    """Whether a prompt is a text or a conversation."""
    is_chat = isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(one, Mapping) for one in prompt)
    return isinstance(prompt, str) or is_chat


def other_than_ids(value: Any) -> str:
    """Return what a value is that isn't a list of token ids.

    >>> other_than_ids(["a"]), other_than_ids(1)
    ('a `list` of something else', 'of type `int`')
    """
    name = type(value).__name__
    return f"a `{name}` of something else" if isinstance(value, Sequence) else f"of type `{name}`"


def listed(value: Any) -> Any:
    """Return an array or a tensor as a list, and anything else as it is."""
    is_dense = isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.layout is torch.strided)
    return value.tolist() if is_dense else value


def are_ids(value: Any) -> bool:
    """Whether a value is a list of whole numbers."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list and all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) for one in value)
