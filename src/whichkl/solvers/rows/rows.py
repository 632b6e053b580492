"""Rows: the points that stand for the expectation under p in forward KL, in parts that are read as often as needed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.cluster import Threads, Workers
from whichkl.families.family import log_likelihood
from whichkl.samples import Block, Part
from whichkl.samples.repeats import row_keys
from whichkl.samples.stream import joined, slices
from whichkl.solvers.rows.points import points_of
from whichkl.targets import Target
from whichkl.targets.evaluations import Evaluations
from whichkl.targets.supports import Bijection

Result = TypeVar("Result")

HELD = 20_000
"""At most about so many rows are held out of a fit on a stream, or on many rows in memory."""

_SPAN = 2**18


@dataclass(frozen=True)
class Rows:
    """Points and weights of p, in parts; `map` works on every part and yields the results in order."""

    parts: Sequence[Part]
    names: tuple[str, ...]
    bijection: Bijection | None = None
    """From free coordinates into the support, where the parts hold points of the support that are still to be carried."""
    workers: Workers = Threads()  # noqa: RUF009
    stride: int = 0
    """One of every `stride` rows of a part is held out; 0 for none."""
    held: bool = False
    """Whether these are the held-out rows; else the others."""
    seed: int = 0
    """Which rows are held out depends on it, and on the part: shards can share an order."""
    evaluations: Evaluations | None = None
    """Where reads are counted, if they are reads of the target's own rows."""
    start: Block | None = None
    """The first rows as their parts hold them, where they have been read."""
    by_content: bool = False
    """Whether which rows are held out depends on what is in them, so that equal rows are held out together."""

    def map(self, function: Callable[[Iterator[Block]], Result]) -> Iterator[Result]:
        """Yield `function(blocks)` for every part, in their order, whoever finishes first; count the rows that it reads."""
        for result, read in self.workers.map(_Job(self, function), self.parts):
            if self.evaluations is not None:
                self.evaluations["rows"] += read
            yield result

    @property
    def is_spent(self) -> bool:
        """Whether as many evaluations of the target were used as may be."""
        return self.evaluations is not None and self.evaluations.is_spent

    def blocks_of(self, part: Part) -> Iterator[Block]:
        """Read a part: in float64, checked, in free coordinates, without the rows that aren't these."""
        start, salt = 0, (zlib.crc32(f"{self.seed}: {part.label}".encode()) & 0x7FFFFFFF) << 31
        for block in part.blocks():
            first = salt + start
            ready = replace(_wide(block), first=first)
            if self.by_content:
                ready = replace(ready, keys=_salted(row_keys(ready.x, ready.context), self.seed))
            is_held = held_among(ready, self.stride)
            if self.bijection is not None:
                ready = self._carried(ready, part, start)
            start += len(block)
            ready = replace(ready, first=first)
            if is_held is not None:
                ready = ready.take(is_held if self.held else ~is_held)
            if len(ready):
                yield ready

    def some(self) -> Block:
        """Return the first rows that there are: some that lie near the others.

        Raises:
            InputError: there are no rows.
        """
        if self.start is not None:
            return self._carried(_wide(self.start), self.parts[0], 0)
        for part in self.parts:
            for block in self.blocks_of(part):
                return block
        raise InputError(cannot("use these samples", "they hold no row", "Give at least one"))

    def gather(self) -> Block:
        """Read all of these rows into memory."""
        return joined([block for part in self.map(list) for block in part])

    def _carried(self, block: Block, part: Part, start: int) -> Block:
        """Refuse what lies outside the support, and carry the rest to free coordinates."""
        bijection = self.bijection
        if bijection is None:
            return block
        if bijection.is_real:
            return block
        outside = ~bijection.contains(block.x)
        if bool(outside.any()):
            first = start + int(outside.nonzero()[0, 0])
            because = f"{part.label} has rows outside the support, first row {first}"
            raise InputError(cannot("use these samples", because, "Correct `support=`, or drop those rows"))
        return Block(bijection.inverse(block.x), block.w, block.context, keys=block.keys)


@dataclass(frozen=True)
class _Job:
    """What a worker is given: which rows of a part count, and what to do with them."""

    rows: Any
    function: Callable[[Iterator[Block]], Any]

    def __init__(self, rows: Rows, function: Callable[[Iterator[Block]], Any]) -> None:
        """Leave the list of parts behind: a worker gets one."""
        kept = {name: getattr(rows, name) for name in ("stride", "held", "seed", "by_content")}
        object.__setattr__(self, "rows", Rows((), rows.names, rows.bijection, **kept))
        object.__setattr__(self, "function", function)

    def __call__(self, part: Part) -> tuple[Any, int]:
        """Work on one part; return the result and the number of rows that were read for it."""
        read = 0

        def counted() -> Iterator[Block]:
            nonlocal read
            for block in self.rows.blocks_of(part):
                read += len(block)
                yield block

        return self.function(counted()), read


def rows_of(target: Target, seed: int, workers: Workers | None = None) -> Rows:
    """Return the rows of a target in free coordinates: its stream, its samples, or the draws or rule that stand for p."""
    workers = workers or Threads()
    if target.stream is not None:
        read = target.stream
        counted = target.evaluations
        rows = Rows(read.parts, target.names, target.carrier, workers, seed=seed, evaluations=counted, start=read.first)
        return replace(rows, by_content=target.repeats is not None)
    x, w = points_of(target, seed)
    context = None if target.context is None else target.context.cpu()
    counts = None if target.samples is None else target.evaluations  # draws were counted when they were drawn
    keys = None if target.repeats is None else target.repeats.rank(seed).cpu()
    block = Block(x.cpu(), w.cpu(), context, keys=keys)
    return Rows(slices(block), target.names, None, workers, seed=seed, evaluations=counts)


def held_among(block: Block, stride: int) -> Tensor | None:
    """Return which rows of a block are held out, as a mask that isn't to be changed: by their keys, where they have any."""
    if block.keys is None or stride == 0:
        return held_out(block.first, len(block), stride)
    return block.keys % stride == 0


def held_numbers(block: Block, stride: int) -> Tensor:
    """Return the numbers of these rows within the block."""
    if block.keys is None or stride == 0:
        return held_rows(block.first, len(block), stride)
    return (block.keys % stride == 0).nonzero()[:, 0]


def held_rows(start: int, count: int, stride: int) -> Tensor:
    """Return which of `count` rows, the first of which has number `start`, are held out: one of every `stride`; none for 0.

    Where among them a hash of their common number tells (Steele, Lea & Flood, 2014): data can have a period.
    """
    if stride == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    spans = [_held_in(span, stride) for span in range(start // _SPAN, -(-(start + count) // _SPAN))]
    numbers = spans[0] if len(spans) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *spans])
    first, end = numbers.searchsorted([start, start + count])
    return torch.from_numpy(numbers[first:end] - start)


@lru_cache(maxsize=64)
def _held_in(span: int, stride: int) -> np.ndarray:
    """Return the numbers of the rows held out among those of a span: for many blocks at once, since one has few."""
    start, end = span * _SPAN, (span + 1) * _SPAN
    stretch = np.arange(start // stride, -(-end // stride), dtype=np.uint64)
    numbers: np.ndarray = (stretch * np.uint64(stride) + _mixed(stretch) % np.uint64(stride)).astype(np.int64)
    return numbers[(numbers >= start) & (numbers < end)]


@lru_cache(maxsize=64)
def held_out(start: int, count: int, stride: int) -> Tensor | None:
    """Return `held_rows` as a mask, which is shared and isn't to be changed; None where no row can be held out."""
    if stride == 0:
        return None
    mask = torch.zeros(count, dtype=torch.bool, device="cpu")
    mask[held_rows(start, count, stride)] = True
    return mask


def _salted(keys: Tensor, seed: int) -> Tensor:
    """Mix keys with a seed, so that another seed holds out others."""
    mixed = _mixed(keys.cpu().numpy().view(np.uint64) + _mixed(np.array([seed], dtype=np.uint64)))
    return torch.from_numpy((mixed >> np.uint64(1)).view(np.int64)).to(keys.device)


def _mixed(number: np.ndarray) -> np.ndarray:
    mixed = number * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def thinned(rows: Rows, most: int) -> tuple[Block, int]:
    """Read about `most` rows, evenly from every part (all of them where they are fewer), and count them all."""
    found = list(rows.map(_Thin(most // max(1, len(rows.parts)) + 1)))
    return joined([block for kept, _ in found for block in kept]), sum(count for _, count in found)


@dataclass(frozen=True)
class _Thin:
    """Keeps every `step`-th row of a part, doubling the step whenever twice the wanted number is exceeded."""

    wanted: int

    def __call__(self, blocks: Iterator[Block]) -> tuple[list[Block], int]:
        kept: list[Block] = []
        step, start = 1, 0
        for block in blocks:
            kept.append(block.take(torch.arange(start, start + len(block), device="cpu") % step == 0))
            start += len(block)
            while sum(map(len, kept)) > 2 * self.wanted:
                whole = joined(kept)
                kept, step = [whole.take(torch.arange(len(whole), device="cpu") % 2 == 0)], 2 * step
        return kept, start


def mean_log_likelihood(model: Any, rows: Rows) -> float:
    """Return Σ w log q / Σ w over all rows, in nats."""
    total = sum(rows.map(_LogLikelihood(model)), torch.zeros(2, dtype=torch.float64, device="cpu"))
    return float(total[0] / total[1])


@dataclass(frozen=True)
class _LogLikelihood:
    """Adds up w log q and w over the blocks of a part."""

    model: Any

    def __call__(self, blocks: Iterator[Block]) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64, device="cpu")
        for block in blocks:
            value = log_likelihood(self.model, block.x, block.context).detach()
            total += torch.stack([block.w @ value.to(block.w), block.w.sum()]).cpu()
        return total


def _wide(block: Block) -> Block:
    if block.x.dtype == block.w.dtype == torch.float64 and block.context is None:
        return block
    context = None if block.context is None else block.context.to(torch.float64)
    return Block(block.x.to(torch.float64), block.w.to(torch.float64), context, keys=block.keys)
