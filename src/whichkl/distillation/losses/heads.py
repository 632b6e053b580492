"""Heads and their divergence: hidden states times a matrix, some rows at a time, with two small buffers of logits.

The floor is four products: teacher, student, and two with the gradient of the student's logits. That gradient takes the place
of the logits in their buffer, a few rows at a time, so that what it is computed from stays in the cache. All products are summed
in float32 or float64, whatever the dtype of the heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.stored_rows import StoredRows
from whichkl.divergences.divergence import RowDivergence

_NUMBERS_PER_TILE = 1 << 22
"""Numbers of a narrow weight that are widened at a time: 16 MB."""
_MAX_BYTES_OF_BUFFERS = 192 << 20
"""Size of both buffers of logits together."""
_NUMBERS_PER_THREAD = 1 << 16
"""Numbers of a block of rows on a CPU, per thread, for two to four threads: a divergence's few copies of it stay in the cache."""
_NUMBERS_PER_BLOCK = 1 << 20
"""Numbers of a block on other devices, which short kernels would leave idle."""
Triple = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states (n, h), weight (v, h) and bias (v,) of a head."""
Fixed = Triple | StoredRows
"""A teacher: its head, or what was stored of its rows."""
Needs = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients by the student's hidden states (n, h), weight (v, h) and bias (v,), in the accumulating dtype; None where they
weren't requested."""


@dataclass(frozen=True)
class Head:
    """Logits softcap · tanh(s (h Wᵀ + b) / softcap), or s (h Wᵀ + b) without a soft cap, s = `logit_scale`."""

    hidden: Float[Tensor, "n h"]
    weight: Float[Tensor, "v h"]
    bias: Float[Tensor, " v"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def project(self, rows: slice | Tensor, out: Float[Tensor, "r v"]) -> None:
        """Write h Wᵀ + b of some rows."""
        hidden = self.hidden[rows]
        if _native(self.weight, out.dtype):
            torch.mm(hidden.to(self.weight.dtype), self.weight.T, out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for columns, tile in _tiles(self.weight, out.dtype):
                torch.mm(hidden, tile.T, out=out[:, columns])
        if self.bias is not None:
            out.add_(self.bias)

    def log_probs(self, product: Float[Tensor, "r v"], temperature: float) -> tuple[Float[Tensor, "r v"], Tensor | None]:
        """Return log-probabilities of projected rows, and tanh where there is a soft cap."""
        if self.softcap is None:
            factor = self.logit_scale / temperature
            return torch.log_softmax(product if factor == 1 else product * factor, -1), None
        bent = torch.tanh(product * (self.logit_scale / self.softcap))
        return torch.log_softmax(bent * (self.softcap / temperature), -1), bent

    def hidden_gradient(self, slope: Float[Tensor, "r v"], out: Float[Tensor, "r h"]) -> None:
        """Write the gradient by the hidden states of the rows whose gradient by the product is `slope`."""
        if _native(self.weight, out.dtype):
            torch.mm(slope.to(self.weight.dtype), self.weight, out_dtype=out.dtype, out=out)
            return
        for columns, tile in _tiles(self.weight, out.dtype):
            torch.addmm(out, slope[:, columns], tile, beta=0 if columns.start == 0 else 1, out=out)

    def add_weight_gradient(
        self, rows: slice | Tensor, slope: Float[Tensor, "r v"], total: Float[Tensor, "v h"], first: bool
    ) -> None:
        """Add the gradient by the weight that these rows contribute; the first ones write over what was there."""
        if not _native(self.weight, total.dtype):
            hidden = self.hidden[rows].to(total.dtype)
            torch.addmm(total, slope.T, hidden, beta=0 if first else 1, out=total)
            return
        narrow, hidden = slope.to(self.weight.dtype), self.hidden[rows].to(self.weight.dtype)
        for columns in _columns(len(total), hidden.shape[1]):
            tile = torch.mm(narrow[:, columns].T, hidden, out_dtype=total.dtype)
            total[columns] = tile if first else total[columns] + tile


def _native(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies this dtype and sums in float32; float16 is too narrow for gradients of a mean."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and dtype == torch.float32


def _tiles(weight: Float[Tensor, "v h"], dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "c h"]]]:
    """The weight itself, or some rows of it at a time in a wider dtype, so that no wide copy of the whole is made."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    for columns in _columns(*weight.shape):
        yield columns, weight[columns].to(dtype)


def _columns(vocabulary: int, width: int) -> Iterator[slice]:
    step = max(1, _NUMBERS_PER_TILE // max(width, 1))
    return (slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step))


@dataclass(frozen=True)
class HeadDivergence:
    """A divergence of two heads: all of a call that isn't a tensor."""

    divergence: RowDivergence
    tokens: int
    """Number of columns that are tokens."""
    temperature: float
    chunk_size: int
    """Rows at a time; 0 chooses by memory."""
    logit_scales: tuple[float, float]
    softcaps: tuple[float | None, float | None]

    def run(
        self, student: Triple, teacher: Fixed, mask: Bool[Tensor, " n"] | None, factors: Float[Tensor, " n"] | None, needs: Needs
    ) -> tuple[Float[Tensor, " n"], Gradients]:
        """Return the divergence of each row (0 where the mask is False), and the student's gradients of Σ factors · divergence.

        All rows count where there is no mask, and all factors are 1 where none are given.
        """
        with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):  # autocast would narrow products
            rows = None if mask is None else mask.nonzero()[:, 0]
            return self._in_chunks(student, teacher, rows, factors, needs)

    def _in_chunks(
        self, student: Triple, teacher: Fixed, rows: Int[Tensor, " m"] | None, factors: Tensor | None, needs: Needs
    ) -> tuple[Float[Tensor, " n"], Gradients]:
        sides = [student, *([] if isinstance(teacher, StoredRows) else [teacher])]
        heads = [
            Head(hidden, weight[: self.tokens], bias if bias is None else bias[: self.tokens], scale, cap)
            for (hidden, weight, bias), scale, cap in zip(sides, self.logit_scales, self.softcaps, strict=False)
        ]
        dtype = accumulating(*(one for side in sides for one in side[:2]))
        new, n, v, (padded_to, width) = student[0].new_zeros, len(student[0]), self.tokens, student[1].shape
        many = n if rows is None else len(rows)
        by_hidden = new((n, width), dtype=dtype) if needs[0] else None
        by_weight = student[1].new_empty((padded_to, width), dtype=dtype) if needs[1] else None
        if by_weight is not None:
            by_weight[v if many else 0 :] = 0  # the first chunk writes the rest: a large matrix isn't filled twice
        by_bias = new((padded_to,), dtype=dtype) if needs[2] else None
        values = new((n,), dtype=dtype)
        # as many rows as fit, in chunks of about the same size
        most = max(1, _MAX_BYTES_OF_BUFFERS // (len(heads) * v * dtype.itemsize))
        step = self.chunk_size or max(1, -(-many // -(-max(many, 1) // most)))
        # two buffers for all chunks: memory doesn't grow with the number of rows
        buffers = [values.new_empty((min(step, many), v)) for _ in heads]
        for start in range(0, many, step):
            end = min(start + step, many)
            part = slice(start, end) if rows is None else rows[start:end]
            products = [buffer[: end - start] for buffer in buffers]
            for head, product in zip(heads, products, strict=True):
                head.project(part, product)
            mine = products[0]
            known = teacher.part(part, mine) if isinstance(teacher, StoredRows) else products[1]
            factor = None
            if any(needs):
                factor = values.new_ones(end - start) if factors is None else factors[part].to(dtype)
            values[part] = self._in_blocks(heads, mine, known, factor)
            if by_hidden is not None:
                out = mine.new_empty((end - start, width))
                heads[0].hidden_gradient(mine, out)
                by_hidden[part] = out
            if by_weight is not None:
                heads[0].add_weight_gradient(part, mine, by_weight[:v], first=start == 0)
            if by_bias is not None:
                by_bias[:v] += mine.sum(0)
        return values, (by_hidden, by_weight, by_bias)

    def _in_blocks(
        self,
        heads: list[Head],
        mine: Float[Tensor, "r v"],
        known: Float[Tensor, "r v"] | StoredRows,
        factor: Float[Tensor, " r"] | None,
    ) -> Float[Tensor, " r"]:
        """Return the divergences; where there is a factor, `mine` becomes the gradient by the student's product, times it.

        `known` is the teacher's product, or its stored rows.
        """
        student = heads[0]
        values = mine.new_empty(len(mine))
        threads = torch.get_num_threads()
        numbers = _NUMBERS_PER_THREAD * min(max(threads, 2), 4) if mine.device.type == "cpu" else _NUMBERS_PER_BLOCK
        step = max(min(threads, 4), numbers // mine.shape[1])
        for block in (slice(start, start + step) for start in range(0, len(mine), step)):
            log_q, bent = student.log_probs(mine[block], self.temperature)
            if isinstance(known, StoredRows):
                rows = known.part(block, mine)
                value, gradient = partial(rows.value, self.divergence), partial(rows.gradient, self.divergence)
            else:
                log_p, _ = heads[1].log_probs(known[block], self.temperature)
                value, gradient = partial(self.divergence.value, log_p), partial(self._gradient, log_p)
            if factor is None:
                values[block] = value(log_q)
                continue
            values[block], slope = gradient(log_q)
            if bent is not None:
                slope = slope * (1 - bent.square())
            torch.mul(slope, (factor[block] * (student.logit_scale / self.temperature))[:, None], out=mine[block])
        return values

    def _gradient(self, log_p: Float[Tensor, "r v"], log_q: Float[Tensor, "r v"]) -> tuple[Float[Tensor, " r"], Tensor]:
        # the check costs less than it saves, except where its answer has to come back from another device
        look = log_q.device.type == "cpu"
        all_possible = look and min(log_p.amin().item(), log_q.amin().item()) > -torch.inf
        return self.divergence.gradient(log_p, log_q, all_possible=all_possible)


def accumulating(*tensors: Tensor) -> torch.dtype:
    """float64 where anything is, float32 otherwise."""
    return torch.float64 if any(one.dtype == torch.float64 for one in tensors) else torch.float32


def fixed_teacher(hidden: Any, weight: Any, bias: Any, stored: Any) -> Fixed:
    """Return the teacher: its head, or its stored rows.

    Raises:
        InputError: there is neither, or both.
    """
    has_head = (hidden is not None) + (weight is not None)
    if has_head != (2 if stored is None else 0) or not (stored is None or isinstance(stored, StoredRows)):
        because = "a head has hidden states and a weight, and stored rows are a `TopK` or `SampledTokens`"
        raise InputError(cannot("find the teacher", because, "Pass `hidden_teacher=` and `weight_teacher=`, or `teacher=` alone"))
    if stored is not None and torch.compiler.is_compiling():
        raise InputError(cannot("compile this divergence", "its teacher is stored rows", "Call it outside of what is compiled"))
    return stored if isinstance(stored, StoredRows) else (hidden, weight, bias)


def flat(teacher: Fixed) -> Fixed:
    """Return a teacher with one axis of rows, and without a graph."""
    if isinstance(teacher, StoredRows):
        return teacher.flat()
    hidden, weight, bias = teacher
    return hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), None if bias is None else bias.detach()


def floats(teacher: Fixed) -> tuple[Tensor, ...]:
    """Return the tensors whose dtype counts: those of a head; stored rows take the student's."""
    return () if isinstance(teacher, StoredRows) else teacher[:2]
