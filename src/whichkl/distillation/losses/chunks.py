"""Heads and a divergence, some rows at a time: values, and gradients in the same pass, with two small buffers of logits.

The floor is four products: teacher, student, and two with the gradient of the student's logits. That gradient takes the place
of the logits in their buffer, a few rows at a time, so that what it is computed from stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.distillation.losses.heads import Head
from whichkl.divergences.divergence import RowDivergence

_MAX_BYTES_OF_BUFFERS = 192 << 20
"""Size of both buffers of logits together."""
_NUMBERS_PER_BLOCK = 1 << 18
"""Numbers of a block of rows that stay in the cache, per thread, for two to four threads."""


@dataclass
class Gradients:
    """Gradients by the student's hidden states, weight and bias, in the accumulating dtype; None where they weren't requested."""

    hidden: Float[Tensor, "n h"] | None
    weight: Float[Tensor, "v h"] | None
    bias: Float[Tensor, " v"] | None

    def __bool__(self) -> bool:
        """Whether any was requested."""
        return any(one is not None for one in (self.hidden, self.weight, self.bias))


def in_chunks(
    divergence: RowDivergence,
    *,
    student: Head,
    teacher: Head,
    temperature: float,
    rows: Int[Tensor, " m"] | None,
    factors: Float[Tensor, " n"] | None,
    needs: tuple[bool, bool, bool],
    chunk_size: int | None,
    padded_to: int,
) -> tuple[Float[Tensor, " n"], Gradients]:
    """Return the divergence of each row (0 where it isn't among `rows`), and the gradients of Σ factors · divergence.

    Args:
        divergence: of rows of log-probabilities.
        student: the head whose gradients are requested.
        teacher: the other one, a constant.
        temperature: divides both logits.
        rows: which rows count, None for all.
        factors: of each row, None for 1.
        needs: whether the gradient by hidden states, weight and bias is requested.
        chunk_size: rows at a time; None chooses it by memory.
        padded_to: rows that the gradients by weight and bias have; those of padding stay 0.
    """
    dtype = accumulating(student.hidden, student.weight, teacher.hidden, teacher.weight)
    n, (v, width), new = len(student.hidden), student.weight.shape, student.hidden.new_zeros
    many = n if rows is None else len(rows)
    gradients = Gradients(
        new((n, width), dtype=dtype) if needs[0] else None,
        _unwritten(student.weight, padded_to, dtype, written=bool(many)) if needs[1] else None,
        new((padded_to,), dtype=dtype) if needs[2] else None,
    )
    values = new((n,), dtype=dtype)
    step = _chunk(many, v, dtype) if chunk_size is None else chunk_size
    product_s, product_t = (new(0, dtype=dtype).new_empty((min(step, many), v)) for _ in range(2))
    for start in range(0, many, step):
        part = slice(start, min(start + step, many)) if rows is None else rows[start : start + step]
        size = min(step, many - start)
        mine, others = product_s[:size], product_t[:size]
        student.project(part, mine)
        teacher.project(part, others)
        factor = values.new_ones(size) if factors is None else factors[part].to(dtype)
        values[part] = _in_blocks(divergence, student, teacher, mine, others, temperature, factor if gradients else None)
        if gradients.hidden is not None:
            by_hidden = mine.new_empty((size, width))
            student.hidden_gradient(mine, by_hidden)
            gradients.hidden[part] = by_hidden
        if gradients.weight is not None:
            student.add_weight_gradient(part, mine, gradients.weight[:v], first=start == 0)
        if gradients.bias is not None:
            gradients.bias[:v] += mine.sum(0)
    return values, gradients


def _in_blocks(
    divergence: RowDivergence,
    student: Head,
    teacher: Head,
    mine: Float[Tensor, "r v"],
    others: Float[Tensor, "r v"],
    temperature: float,
    factor: Float[Tensor, " r"] | None,
) -> Float[Tensor, " r"]:
    """Return the divergences; where there is a factor, `mine` becomes the gradient by the student's product, times it."""
    values = mine.new_empty(len(mine))
    step = max(1, _NUMBERS_PER_BLOCK * min(max(torch.get_num_threads(), 2), 4) // mine.shape[1])
    for block in (slice(start, start + step) for start in range(0, len(mine), step)):
        log_p, _ = teacher.log_probs(others[block], temperature)
        log_q, bent = student.log_probs(mine[block], temperature)
        if factor is None:
            values[block] = divergence.value(log_p, log_q)
            continue
        # the check costs less than it saves, except where its answer has to come back from another device
        look = mine.device.type == "cpu"
        all_possible = look and min(log_p.amin().item(), log_q.amin().item()) > -torch.inf
        values[block], slope = divergence.gradient(log_p, log_q, all_possible=all_possible)
        if bent is not None:
            slope = slope * (1 - bent.square())
        torch.mul(slope, (factor[block] * (student.logit_scale / temperature))[:, None], out=mine[block])
    return values


def _unwritten(weight: Tensor, padded_to: int, dtype: torch.dtype, written: bool) -> Tensor:
    """Memory for the weight's gradient, 0 only where the first chunk won't write: a large matrix isn't filled twice."""
    room = weight.new_empty((padded_to, weight.shape[1]), dtype=dtype)
    room[len(weight) if written else 0 :] = 0
    return room


def accumulating(*tensors: Tensor) -> torch.dtype:
    """float64 where anything is, float32 otherwise."""
    return torch.float64 if any(one.dtype == torch.float64 for one in tensors) else torch.float32


def _chunk(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """As many rows as fit, in chunks of about the same size."""
    most = max(1, _MAX_BYTES_OF_BUFFERS // (2 * vocabulary * dtype.itemsize))
    return max(1, -(-rows // -(-max(rows, 1) // most)))
