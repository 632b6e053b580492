"""Rollouts: continuations drawn from a language model's own softmax, untempered and uncut but for their length."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.language.causal import CausalModel, inner_of
from whichkl.distillation.language.token_draws import drawn_tokens
from whichkl.process.seeds import seeded
from whichkl.user_code import said_of


@dataclass(frozen=True)
class Rollouts:
    """Prompts with their continuations, padded on the right, where padding can't reach any token."""

    ids: Int[Tensor, "n t"]
    begin: Int[Tensor, " n"]
    """Where the continuation begins: the length of the prompt."""
    end: Int[Tensor, " n"]
    """Where it ends; the end token belongs to it."""
    cut: Bool[Tensor, " n"]
    """Whether it reached the largest length before an end token."""

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor]) -> Rollouts:
        """Read what `to_batch` wrote, wherever a trainer has moved it."""
        return cls(*(batch[name].cpu() for name in ("input_ids", "begin", "end", "cut")))

    def to_batch(self) -> dict[str, Tensor]:
        """Return them as a trainer passes them on."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "begin": self.begin, "end": self.end, "cut": self.cut}

    @property
    def mask(self) -> Bool[Tensor, "n t"]:
        """Which places hold tokens."""
        return torch.arange(self.ids.shape[1], device="cpu") < self.end[:, None]

    @property
    def drawn(self) -> Bool[Tensor, "n t"]:
        """Which places hold drawn tokens."""
        places = torch.arange(self.ids.shape[1], device="cpu")
        return (places >= self.begin[:, None]) & (places < self.end[:, None])

    def rows(self, first: int, last: int) -> Rollouts:
        """Return some of them, without columns that are padding for all."""
        end = self.end[first:last]
        return Rollouts(self.ids[first:last, : int(end.max())], self.begin[first:last], end, self.cut[first:last])


def continued(
    model: CausalModel, prompts: Sequence[Sequence[int]], ends: Sequence[int], max_new_tokens: int, seed: int
) -> Rollouts:
    """Draw one continuation of every prompt, token by token from the softmax of the model's logits.

    Whatever the model's generation configuration holds (temperature, top-k, penalties, forced and suppressed tokens) has no part
    in it. The same seed gives the same continuations of the same prompts.

    Raises:
        InputError: the model has fewer positions than the longest continuation could need.
    """
    model.check_length(max(map(len, prompts)) + max_new_tokens, max_new_tokens)
    draw = _by_generate if hasattr(model.module, "generate") and hasattr(model.module, "generation_config") else _by_steps
    with seeded(seed), torch.no_grad(), model.without_adapter():
        drawn = draw(model, prompts, ends, max_new_tokens)
    is_end = torch.isin(drawn, torch.tensor(list(ends), dtype=torch.int64, device="cpu"))
    has_end = is_end.any(1)
    length = torch.where(has_end, is_end.int().argmax(1) + 1, drawn.shape[1])
    begin = torch.tensor([len(one) for one in prompts], dtype=torch.int64, device="cpu")
    end = begin + length
    ids = torch.full((len(prompts), int(end.max())), ends[0], dtype=torch.int64, device="cpu")
    for row, (prompt, new, n) in enumerate(zip(prompts, drawn, length.tolist(), strict=True)):
        ids[row, : len(prompt) + n] = torch.cat([torch.tensor(prompt, dtype=torch.int64, device="cpu"), new[:n]])
    return Rollouts(ids, begin, end, ~has_end)


def _by_generate(model: CausalModel, prompts: Sequence[Sequence[int]], ends: Sequence[int], most: int) -> Int[Tensor, "n m"]:
    """By transformers, which keeps keys and values of earlier tokens."""
    transformers = importlib.import_module("transformers")
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), ends[0], dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64, device="cpu")
        mask[row, longest - len(prompt) :] = 1
    # the processor draws, and `generate` takes the likeliest token of what it leaves
    own = transformers.GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=list(ends), pad_token_id=ends[0])
    draw = transformers.LogitsProcessorList([_Draw(model)])
    module = inner_of(model.module)  # adapters are inside its layers
    found = module.generation_config
    module.generation_config = transformers.GenerationConfig()  # else `generate` completes what it's given by the model's own
    try:
        out: Tensor = module.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=own, logits_processor=draw
        )
    except IndexError as error:  # of an embedding of places, as of GPT-2
        because = f"{said_of(error)} for a prompt of {longest:,} tokens and {most:,} drawn ones"
        instead = "Lower `max_new_tokens=`: the model may have fewer places"
        raise InputError(cannot(f"draw from the {model.who}", because, instead)) from error
    finally:
        module.generation_config = found
    return out[:, longest:].cpu()


class _Draw:
    """Draws a token per row, and leaves it alone in the scores."""

    supports_continuous_batching = True

    def __init__(self, model: CausalModel) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = drawn_tokens(scores[:, : self.model.tokens], self.model.who)
        return scores.fill_(float("-inf")).scatter_(1, token[:, None], 0.0)


def _by_steps(model: CausalModel, prompts: Sequence[Sequence[int]], ends: Sequence[int], most: int) -> Int[Tensor, "n m"]:
    """By calling a module on all tokens so far, once per new token."""
    length = torch.tensor([len(one) for one in prompts], dtype=torch.int64, device="cpu")
    ids = torch.full((len(prompts), int(length.max()) + most), ends[0], dtype=torch.int64, device="cpu")
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64, device="cpu")
    every, stop = torch.arange(len(prompts), device="cpu"), torch.tensor(list(ends), dtype=torch.int64, device="cpu")
    new, done = [], torch.zeros(len(prompts), dtype=torch.bool, device="cpu")
    for step in range(most):
        place = length + step
        seen = ids[:, : int(place.max())]
        mask = torch.arange(seen.shape[1], device="cpu") < place[:, None]
        logits = model.logits(seen, mask)[every, place - 1]
        token = drawn_tokens(logits, model.who).cpu()
        ids[every, place] = token
        new.append(token)
        done |= torch.isin(token, stop)
        if bool(done.all()):
            break
    return torch.stack(new, 1)
