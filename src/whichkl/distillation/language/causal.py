"""Causal: a language model as it's called here, its vocabulary and its end tokens; the user's module isn't changed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from whichkl._checks import InputError, cannot
from whichkl.process.memory import refuse_if_ran_out
from whichkl.user_code import said_of


class CausalModel:
    """A language model that is only evaluated: logits of the next token at every place, less those that are no token.

    Args:
        module: a causal language model of transformers, or any `nn.Module` of `input_ids` (n, t) that returns logits (n, t, v),
            or has them as `.logits`; it may take `attention_mask`.
        who: "teacher" or "student", for messages.
    """

    def __init__(self, module: Any, who: str) -> None:
        if not isinstance(module, nn.Module):
            because = f"it is a `{type(module).__name__}`, not a torch.nn.Module"
            raise InputError(cannot(f"use this {who}", because, "Load it, say by AutoModelForCausalLM.from_pretrained(…)"))
        self.module, self.who, self.tokens = module, who, 0
        """`tokens` is the number of columns that are tokens; `agree` sets it."""
        self.adapted: Any = None
        """The PEFT model whose base this one is."""
        forward = inspect.signature(module.forward).parameters
        self.takes_mask = "attention_mask" in forward or any(one.kind is one.VAR_KEYWORD for one in forward.values())

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Switch off an adapter that has been put into this model, inside a block."""
        found: contextlib.AbstractContextManager[None] = (
            contextlib.nullcontext() if self.adapted is None else self.adapted.disable_adapter()
        )
        return found

    @property
    def device(self) -> torch.device:
        """Where the model is now: a trainer moves its student."""
        weight = next(self.module.parameters(), None)
        return torch.device("cpu") if weight is None else weight.device

    @property
    def end_tokens(self) -> frozenset[int] | None:
        """The tokens that end a sequence, as the model's own configuration has them; None if it has none."""
        for name in ("generation_config", "config"):
            found = getattr(getattr(self.module, name, None), "eos_token_id", None)
            if found is not None:
                return frozenset([found] if isinstance(found, int) else found)
        return None

    def check_length(self, tokens: int, drawn: int = 0) -> None:
        """Refuse sequences of more tokens, `drawn` of them drawn, than the model's configuration has positions.

        A model with rotary positions runs beyond them, but wasn't trained there: its laws would be silently wrong.
        """
        limit = getattr(getattr(inner_of(self.module), "config", None), "max_position_embeddings", None)
        if not isinstance(limit, int) or not 0 < limit < tokens:
            return
        what, instead = f"{tokens:,} tokens are", "Shorten the examples"
        if drawn:
            what, instead = f"a prompt of {tokens - drawn:,} tokens and {drawn:,} drawn ones are", "Lower `max_new_tokens=`"
        because = f"{what} more than its {limit:,} positions, and it was trained on no others"
        instead += ", or raise `config.max_position_embeddings` if the model takes more"
        raise InputError(cannot(f"use this {self.who}", because, instead))

    def logits(self, ids: Int[Tensor, "n t"], mask: Bool[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        """Return the logits of the next token after every place, without a graph.

        Raises:
            InputError: the model can't be called on as many tokens, or returns another shape.
        """
        self.check_length(ids.shape[1])
        given: dict[str, Any] = {"attention_mask": mask.long().to(self.device)} if self.takes_mask else {}
        try:
            with torch.no_grad(), self.without_adapter():
                out: Any = self.module(input_ids=ids.to(self.device), **given)
        except (KeyboardInterrupt, InputError):
            raise
        except BaseException as error:  # SystemExit too: a model's own code may raise it
            refuse_if_ran_out(error, f"call the {self.who}")
            because = f"{said_of(error)} for `input_ids` of shape {tuple(ids.shape)}"
            raise InputError(cannot(f"call the {self.who}", because, "Pass a causal language model")) from error
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a `{type(logits).__name__}`"
            because = f"it returned {found} for {ids.shape[0]} sequences of {ids.shape[1]} tokens"
            raise InputError(cannot(f"use this {self.who}", because, "Return logits (n, t, v), or an object with `.logits`"))
        if logits.shape[2] < self.tokens:
            because = f"it has logits of {logits.shape[2]:,} tokens, and the tokenizer has {self.tokens:,}"
            raise InputError(cannot(f"use this {self.who} with this tokenizer", because, "Pass the tokenizer of both models"))
        return logits.detach()[..., : self.tokens or None]  # a view of a weight would ask for a gradient again

    def width(self) -> int:
        """Return the number of logits per place."""
        one = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        return int(self.logits(one, torch.ones_like(one, dtype=torch.bool)).shape[2])


def inner_of(module: Any) -> Any:
    """Return the model that PEFT wraps, or the module itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def is_base_of(teacher: Any, student: Any) -> bool:
    """Whether a teacher is the model into which a student's adapter has been put, or that student."""
    return hasattr(student, "disable_adapter") and inner_of(teacher) is inner_of(student)


def taught_by(teacher: Any, student: CausalModel) -> CausalModel:
    """Return a student's teacher; it is called without the student's adapter."""
    found = CausalModel(teacher, "teacher")
    found.adapted = student.module if is_base_of(teacher, student.module) else None
    return found


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Switch off dropout inside the block; afterwards every part of every module is in the mode that it had.

    A teacher of another kind than a model has no modes.
    """
    modules = [one.module for one in models if isinstance(one, CausalModel)]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what can't be called on text, or has no number of tokens."""
    if tokenizer is not None and (isinstance(tokenizer, type) or not (callable(tokenizer) and hasattr(tokenizer, "__len__"))):
        because = f"it is a `{type(tokenizer).__name__}`, not a tokenizer"
        raise InputError(cannot("use this tokenizer", because, "Pass one of transformers, or None where data are token ids"))


class Sized(Protocol):
    """What `agree` looks at: a model, or a stored teacher."""

    who: str
    tokens: int

    @property
    def end_tokens(self) -> frozenset[int] | None:
        """The tokens that end a sequence, where they are known."""

    def width(self) -> int:
        """Return the number of columns."""


def agree(teacher: Sized | None, student: Sized | None, tokenizer: Any, vocabulary: int | None = None) -> tuple[int, ...]:
    """Settle which columns are tokens, and return the tokens that end a sequence; a side may be missing.

    Widths may differ by padding beyond the tokenizer's tokens, or beyond `vocabulary`; those columns have no part in any softmax.

    Raises:
        InputError: the widths or the end tokens can't belong to one tokenizer.
    """
    sides = [one for one in (teacher, student) if one is not None]
    widths = {one.who: one.width() for one in sides}
    tokens = _number_of_tokens(widths, tokenizer, vocabulary)
    ends = {one.who: one.end_tokens for one in sides}
    known = [one for one in ends.values() if one is not None]
    if len(set(known)) > 1:
        said = " and ".join(f"the {who}'s are {_listed(one)}" for who, one in ends.items() if one is not None)
        because = f"they end sequences by different tokens: {said}"
        raise InputError(cannot("compare these models", because, "Set one `generation_config.eos_token_id` for both"))
    own = getattr(tokenizer, "eos_token_id", None)
    found = known[0] if known else frozenset() if own is None else frozenset([own])
    if not found:
        because = "neither the models nor a tokenizer name the token that ends a sequence"
        raise InputError(cannot("draw continuations", because, "Set `generation_config.eos_token_id`, or pass `tokenizer=`"))
    if max(found) >= tokens or min(found) < 0:
        because = f"the end token {max(found)} isn't one of the {tokens:,} tokens"
        raise InputError(cannot("draw continuations", because, "Set `generation_config.eos_token_id`"))
    for one in sides:
        one.tokens = tokens
    return tuple(sorted(found))


def _number_of_tokens(widths: Mapping[str, int], tokenizer: Any, vocabulary: int | None) -> int:
    """Return how many columns are tokens; without a tokenizer or a number, all of them if both sides have as many."""
    check_tokenizer(tokenizer)
    tokens = len(tokenizer) if tokenizer is not None else vocabulary
    if vocabulary not in (None, tokens):
        because = f"the tokenizer has {tokens:,} tokens"
        raise InputError(cannot(f"use `vocabulary={vocabulary}`", because, "Leave it out"))
    if tokens is None and len(set(widths.values())) > 1:
        said = " and ".join(f"the {who}'s {width:,}" for who, width in widths.items())
        because = f"their widths differ, {said}, and which columns are padding only a tokenizer tells"
        raise InputError(cannot("compare these models", because, "Pass `tokenizer=`, or the number of tokens as `vocabulary=`"))
    tokens = min(widths.values()) if tokens is None else tokens
    whose = "tokenizer has" if tokenizer is not None else "vocabulary is of"
    for who, width in widths.items():
        if not 0 < tokens <= width:
            because = f"it has {width:,} logits, and the {whose} {tokens:,} tokens"
            instead = "Pass the tokenizer of both models" if tokenizer is not None else "Use models of one tokenizer"
            raise InputError(cannot(f"use this {who}", because, instead))
    return tokens


def _listed(ids: Sequence[int] | frozenset[int]) -> str:
    return ", ".join(map(str, sorted(ids)))
