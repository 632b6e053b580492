"""Reductions: masks, sums and means over rows, never over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import InputError, as_int, as_number, cannot

Rows = Float[Tensor, "..."]
Mask = Bool[Tensor, "..."]

_MAX_TEMPERATURE = 1e18
"""Larger temperatures leave nothing of a float32 logit."""
REDUCTIONS = ("mean", "sum", "none")


def reduce(values: Rows, mask: Mask | None, reduction: str) -> Rows:
    """Reduce rows that count; the mean over no row is 0, with a gradient of 0.

    >>> reduce(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, True, False]), "mean")
    tensor(1.5000)
    """
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / count(values, mask)


def constant_temperature(temperature: float | Tensor) -> float:
    """Return a temperature as a number; one that is to be learned is refused."""
    check_temperature(temperature)
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        because = "a gradient of it isn't computed here"
        raise InputError(cannot("learn this temperature", because, "Multiply the student's hidden states by 1/temperature"))
    return float(temperature) if isinstance(temperature, Tensor) else temperature


def checked_chunk_size(chunk_size: Any) -> int:
    """Return the rows at a time; 0 where memory is to decide."""
    if chunk_size is None:
        return 0
    check_number("chunk_size", chunk_size)
    rows: Any = as_int(chunk_size)
    if not isinstance(rows, int) or rows < 1:
        raise InputError(cannot(f"use chunk_size={rows}", "a chunk is at least one row", "Pass None to choose by memory"))
    return rows


def checked_scales(**scales: float) -> tuple[float, float]:
    """Return the factors of the student's and of the teacher's logits."""
    for name, value in scales.items():
        check_number(name, value)
    student, teacher = scales.values()
    return student, teacher


def checked_caps(**caps: float | None) -> tuple[float | None, float | None]:
    """Return the soft caps of the student's and of the teacher's logits; None for no cap."""
    for name, value in caps.items():
        if value is not None:
            check_number(name, value)
            if not 0 < value < math.inf:
                raise InputError(cannot(f"use `{name}={value}`", "a soft cap is positive", "Pass None for no cap"))
    student, teacher = caps.values()
    return student, teacher


def widened(x: Tensor) -> Tensor:
    """float64 as it is, everything narrower as float32."""
    return x if x.dtype == torch.float64 else x.float()


def count(values: Rows, mask: Mask | None) -> Tensor | int:
    """Return how many rows count, at least 1: the mean over no row is then 0, so that a batch of padding adds nothing."""
    return max(values.numel(), 1) if mask is None else mask.sum().clamp(min=1)


def check_reduction(reduction: str) -> None:
    """Refuse an unknown reduction."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        because = "a divergence is a sum over the vocabulary, and its mean goes over rows"
        raise InputError(cannot(f"use reduction={reduction!r}", because, f"Pass one of {', '.join(REDUCTIONS)}"))


def check_tensors(**given: Any) -> None:
    """Refuse what isn't a tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            because = f"it is a `{type(value).__name__}`, not a tensor"
            raise InputError(cannot(f"use this {name}", because, "Pass a torch tensor"))


def check_number(name: str, value: Any) -> None:
    """Refuse what isn't a finite number."""
    number = as_number(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < _MAX_TEMPERATURE:
        shown = f"{name}={value!r}" if isinstance(number, (int, float)) else f"this {name}"
        raise InputError(cannot(f"use {shown}", "it isn't a finite number", "Pass a number"))


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(cannot(f"use this {name}", f"it is a `{type(value).__name__}`", "Pass True or False"))


def check_mask(mask: Any, rows: torch.Size) -> None:
    """Refuse a mask that isn't bool (n) for rows (n)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        because = f"it is a {type(mask).__name__}, not a tensor"
        raise InputError(cannot("use this mask", because, "Pass torch.tensor(mask), True for each row that counts"))
    if mask.dtype != torch.bool or mask.shape != rows:
        because = f"it has dtype {mask.dtype} and shape {tuple(mask.shape)}, not torch.bool and {tuple(rows)}"
        raise InputError(cannot("use this mask", because, "Pass True for each row that counts, for example labels != -100"))


def check_temperature(temperature: Any) -> None:
    """Refuse a temperature that isn't one positive, finite number; it may be a tensor that holds one."""
    if isinstance(temperature, Tensor):
        refuse_transforms("use this temperature", "Pass a number", temperature)
    number = as_number(temperature)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number and not (isinstance(temperature, Tensor) and temperature.dim() == 0):
        shape = getattr(temperature, "shape", None)
        kind = f"has the shape {tuple(shape)}" if isinstance(shape, tuple) else f"is {temperature!r}"
        because = f"it {kind}, and one number divides all logits"
        instead = "Pass a number; for one temperature per row, divide the logits before the call"
        raise InputError(cannot("use this temperature", because, instead))
    if not 0 < temperature < _MAX_TEMPERATURE:
        because = "logits are divided by it"
        raise InputError(cannot(f"use temperature={temperature}", because, "Pass a positive number; 1 leaves the logits alone"))


def checked_vocabulary(what: str, columns: Mapping[str, int], vocabulary: int | None) -> int:
    """Return how many columns are tokens, from the numbers of columns of the teacher and the student."""
    least = min(columns.values())
    vocabulary = as_int(vocabulary)
    if vocabulary is not None and (isinstance(vocabulary, bool) or not isinstance(vocabulary, int)):
        because = f"it is a `{type(vocabulary).__name__}`, not a whole number"
        raise InputError(cannot("use this vocabulary", because, f"Pass 1 ≤ vocabulary ≤ {least}"))
    if vocabulary is None and len(set(columns.values())) > 1:
        because = " and ".join(f"the {who} has {count} columns" for who, count in columns.items())
        hint = "If both share a tokenizer and the rest is padding, pass vocabulary= the number of tokens"
        raise InputError(cannot(f"compare these {what}", because, hint))
    if vocabulary is not None and not 0 < vocabulary <= least:
        because = f"the {what} have {' and '.join(str(count) for count in sorted(set(columns.values())))} columns"
        raise InputError(cannot(f"take {vocabulary} tokens", because, f"Pass 1 ≤ vocabulary ≤ {least}"))
    tokens = least if vocabulary is None else vocabulary
    if tokens < 2:
        because = f"there is {'one column' if tokens else 'no column'}, and the softmax of one logit is 1 whatever the logit is"
        instead = "For a binary model with one logit z, pass two columns, torch.cat([z, torch.zeros_like(z)], -1)"
        raise InputError(cannot(f"compare these {what}", because, instead))
    return tokens


def refuse_transforms(do: str, instead: str, *tensors: Tensor | None) -> None:
    """Refuse tensors inside `torch.func.vmap` and the like, where numbers can't be looked at, and buffers can't be filled."""
    if torch.compiler.is_compiling():  # torch.compile can't trace the question
        return
    if any(x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise InputError(cannot(do, "it is called inside a transform of torch.func, such as vmap or grad", instead))
