"""Examples: text, prompts with completions, or conversations, read as pairs of token ids."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.language.causal import CausalModel
from whichkl.distillation.language.lines import place_of
from whichkl.distillation.language.prompts import TOKENIZER, all_of, are_ids, is_text, listed, other_than_ids, read_prompt
from whichkl.distillation.language.rollouts import Rollouts

_KINDS = ("prompt", "messages")
_WANTED = "Give texts, {'prompt': …, 'completion': …}, {'messages': […]}, or token ids in their place"


@dataclass(frozen=True)
class Example:
    """A prompt, and what followed it in the data; the end token is its last."""

    prompt: list[int]
    completion: list[int] | None
    place: str = field(default="", compare=False, repr=False)
    """Where it was in the data."""

    def to_dict(self) -> dict[str, list[int]]:
        """Return it as a trainer's collator gets it."""
        return {"prompt": self.prompt, "completion": self.completion or []}


def read_examples(data: Any, tokenizer: Any, tokens: int, end: int, word: str = "example") -> list[Example]:
    """Return the examples of a data set, `word` in errors; whole texts are continued from their first token.

    Raises:
        InputError: there is none, one has another form, or an id isn't one of the tokens.
    """
    given = listed_examples(data)
    return [_read(one, tokenizer, tokens, end, place_of(given, number, word)) for number, one in enumerate(given)]


def _read(one: Any, tokenizer: Any, tokens: int, end: int, place: str) -> Example:
    return replace(_checked(_example(one, tokenizer, end, place), tokens, place), place=place)


def listed_examples(data: Any) -> list[Any]:
    """Return the examples of a data set as they are, without a tokenizer.

    Raises:
        InputError: there is none, or one is in no form that `read_examples` takes.
    """
    if isinstance(data, Mapping):
        raise InputError(cannot("read these examples", f"they are one `{type(data).__name__}`", _WANTED))
    found = all_of(data, "read these examples", _WANTED)
    if not found:
        raise InputError(cannot("read these examples", "there are none", _WANTED))
    for number, one in enumerate(found):
        if isinstance(one, Mapping):
            _check_names(one, place_of(found, number))
        elif not (is_text(one) or are_ids(listed(one))):
            raise InputError(cannot("read these examples", f"{place_of(found, number)} is {other_than_ids(one)}", _WANTED))
    return found


class ExampleStream(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """Examples of an `IterableDataset`, read when they are needed, so that there may be any number of them."""

    def __init__(self, data: Iterable[Any], tokenizer: Any, tokens: int, end: int, needs_completions: bool) -> None:
        self.data, self.tokenizer, self.tokens, self.end, self.needs_completions = data, tokenizer, tokens, end, needs_completions

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """Yield each as a collator gets it."""
        for number, one in enumerate(self.data):
            example = _read(one, self.tokenizer, self.tokens, self.end, place_of(None, number))
            if self.needs_completions:
                check_completions([example])
            yield example.to_dict()


def check_completions(examples: Iterable[Example]) -> None:
    """Refuse prompts alone where the data's prefixes are asked for."""
    if any(one.completion is None for one in examples):
        because = "some examples are prompts without completions"
        raise InputError(
            cannot(
                "train on prefixes of the data",
                because,
                "Use prefixes={'teacher': 1.0} or prefixes={'student': 1.0}, or add completions",
            )
        )


def check_lengths(examples: Sequence[Example], models: Iterable[Any], most: int, *, draws: bool) -> None:
    """Refuse examples that are longer than a model's positions, or may become so where tokens are drawn."""
    if not examples:
        return
    longest = max(len(one.prompt) + (most if draws else len((one.completion or [])[:most])) for one in examples)
    for one in models:
        if isinstance(one, CausalModel):  # other kinds of teachers have no positions
            one.check_length(longest, most if draws else 0)


def _checked(one: Example, tokens: int, place: str) -> Example:
    for ids in (one.prompt, one.completion):
        if ids is not None and (not ids or min(ids) < 0 or max(ids) >= tokens):
            because = f"{place} " + ("has no token" if not ids else f"has an id that isn't one of {tokens:,} tokens")
            raise InputError(cannot("read these examples", because, "Use the tokenizer of both models"))
    return one


def _example(one: Any, tokenizer: Any, end: int, place: str) -> Example:
    if not isinstance(one, Mapping):
        ids = read_prompt(one, tokenizer, place)
        if len(ids) < 2:
            because = f"{place} has {len(ids)} tokens, and a text is continued from its first"
            raise InputError(cannot("read these examples", because, "Leave it out"))
        return Example(ids[:1], _ended(ids[1:], end))
    if "messages" in one:
        return _conversation(one["messages"], tokenizer, end, place)
    _check_names(one, place)
    prompt, completion = read_prompt(one["prompt"], tokenizer, place), listed(one.get("completion"))
    if completion is None:
        return Example(prompt, None)
    if isinstance(completion, str):
        if tokenizer is None:
            raise InputError(cannot("read these examples", f"{place} is text", TOKENIZER))
        completion = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if not are_ids(completion):
        because = f"the completion of {place} is {other_than_ids(completion)}"
        raise InputError(cannot("read these examples", because, "Give a text or token ids"))
    return Example(prompt, _ended([int(token) for token in completion], end))


def _check_names(one: Mapping[str, Any], place: str) -> None:
    # a completion that is misspelt would leave a prompt alone
    needed = () if "messages" in one else ("completion",) if "prompt" in one else _KINDS
    for name in (name for name in needed if name not in one):
        if near := difflib.get_close_matches(name, [key for key in one if isinstance(key, str)], 1, 0.8):
            because = f"{place} has {near[0]!r}, and no {name!r}"
            raise InputError(cannot("read these examples", because, f"Rename it, if you mean {name!r}"))
    if "prompt" not in one and "messages" not in one:
        because = f"{place} has {', '.join(map(repr, one)) or 'nothing'}, and no 'prompt' or 'messages'"
        raise InputError(cannot("read these examples", because, _WANTED))


def _conversation(messages: Sequence[Mapping[str, str]], tokenizer: Any, end: int, place: str) -> Example:
    """The last answer is the completion; without one, there is none."""
    if not messages or messages[-1].get("role") != "assistant":
        return Example(read_prompt(messages, tokenizer, place), None)
    prompt = read_prompt(messages[:-1], tokenizer, place)
    asked = tokenizer.apply_chat_template(list(messages[:-1]), add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    if not whole.startswith(asked):
        because = f"the chat template writes the prompt of {place} in another way once the answer follows"
        raise InputError(cannot("read these examples", because, "Give 'prompt' and 'completion' as texts"))
    return Example(prompt, _ended(tokenizer(whole[len(asked) :], add_special_tokens=False)["input_ids"], end))


def _ended(ids: list[int], end: int) -> list[int]:
    """Append the end token, and drop what a template writes after it."""
    return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]


def together(examples: Sequence[Mapping[str, Sequence[int]]], most: int | None = None) -> Rollouts:
    """Pad prompts with their completions on the right; completions are cut at `most` tokens."""
    rows = [(list(one["prompt"]), list(one["completion"])[:most]) for one in examples]
    begin, length = (torch.tensor([len(row[k]) for row in rows], dtype=torch.int64, device="cpu") for k in (0, 1))
    ids = torch.zeros(len(rows), int((begin + length).max()), dtype=torch.int64, device="cpu")
    for k, (prompt, completion) in enumerate(rows):
        ids[k, : len(prompt) + len(completion)] = torch.tensor(prompt + completion, dtype=torch.int64, device="cpu")
    cut = torch.tensor([most is not None and len(one["completion"]) > most for one in examples], dtype=torch.bool, device="cpu")
    return Rollouts(ids, begin, begin + length, cut)


def stacked(parts: Sequence[Rollouts], order: Tensor) -> Rollouts:
    """Put rollouts under each other and in another order: row k is the one of which `order[k]` is the number."""
    width = max(part.ids.shape[1] for part in parts)
    ids = torch.cat([torch.nn.functional.pad(part.ids, (0, width - part.ids.shape[1])) for part in parts])
    begin, end, cut = (torch.cat([getattr(part, name) for part in parts]) for name in ("begin", "end", "cut"))
    return Rollouts(ids[order], begin[order], end[order], cut[order])
