"""Rows: the points over which forward KL takes its expectation under p, in parts that are read as often as needed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot, check_scales
from whichkl.access import Access
from whichkl.chains import stretches
from whichkl.cluster import Threads, Workers
from whichkl.divergences.exact.quadrature import expectation_rule
from whichkl.families.family import log_likelihood
from whichkl.samples import Block, Part
from whichkl.samples.repeats import row_keys
from whichkl.samples.stream import joined, slices
from whichkl.targets import Target
from whichkl.targets.evaluations import Evaluations
from whichkl.targets.supports import Bijection

Result = TypeVar("Result")
Sums = dict[str, Tensor]
"""Sums over rows by name."""

HELD = 20_000
"""About the largest number of rows that are held out of a fit on a stream, or on many rows in memory."""
FRESH = 65_536
"""Number of draws that replace the samples of a target that has a sampler alone."""
_ROWS_PER_HASH = 2**18
"""Number of rows whose held-out numbers are computed at once."""


@dataclass(frozen=True)
class Rows:
    """Points and weights of p, in parts; `map` works on every part and yields the results in order."""

    parts: Sequence[Part]
    names: tuple[str, ...]
    bijection: Bijection | None = None
    """The map from free coordinates into the support, if the parts hold points of the support; None if they hold free ones."""
    workers: Workers = Threads()  # noqa: RUF009
    stride: int = 0
    """One of every `stride` rows of a part is held out; 0 for none."""
    held: bool = False
    """Whether these are the held-out rows rather than the others."""
    seed: int = 0
    """Decides with the label of the part which rows are held out, since shards can share an order."""
    evaluations: Evaluations = field(default_factory=Evaluations)
    """Counts the reads: the target's counts if these are its own rows, otherwise counts that nobody else sees."""
    start: Block | None = None
    """The first rows of a stream, as its parts hold them."""
    by_content: bool = False
    """Whether the contents of a row decide if it is held out, so that equal rows are held out together."""

    def map(self, function: Callable[[Iterator[Block]], Result]) -> Iterator[Result]:
        """Yield `function(blocks)` for every part, in the order of the parts, and count the rows that it reads."""
        # A worker gets a single part, so the list of all parts, which can be long, isn't sent to it.
        alone = replace(self, parts=(), workers=Threads(), evaluations=Evaluations(), start=None)
        for result, read in self.workers.map(partial(_read_part, alone, function), self.parts):
            self.evaluations["rows"] += read
            yield result

    def total(self, function: Callable[[Iterator[Block]], Sums]) -> Sums:
        """Return the sums of all parts, added in the order of the parts."""
        total: Sums = {}
        for sums in self.map(function):
            add_sums(total, sums)
        return total

    def blocks_of(self, part: Part) -> Iterator[Block]:
        """Read a part in float64 and in free coordinates, checked, without the rows that don't belong to these."""
        start, salt = 0, (zlib.crc32(f"{self.seed}: {part.label}".encode()) & 0x7FFFFFFF) << 31
        for block in part.blocks():
            ready = replace(_wide(block), first=salt + start)
            if self.by_content:
                ready = replace(ready, keys=_salted(row_keys(ready.x, ready.context), self.seed))
            is_held = held_among(ready, self.stride)
            ready = self._carried(ready, part, start)
            start += len(block) + block.left_out
            if is_held is not None:
                ready = ready.take(is_held if self.held else ~is_held)
            if len(ready):
                yield ready

    def some(self) -> Block:
        """Return some rows, which lie near the others: the first ones, whether they are held out or not for a stream.

        Raises:
            InputError: there are no rows.
        """
        return self.first_block() if self.start is None else self._carried(_wide(self.start), self.parts[0], 0)

    def first_block(self) -> Block:
        """Return the first block of these rows.

        Raises:
            InputError: there are no rows.
        """
        for part in self.parts:
            for block in self.blocks_of(part):
                return block
        raise InputError(cannot("use these samples", "they hold no row", "Give at least one"))

    def gather(self) -> Block:
        """Read all of these rows into memory."""
        return joined([block for part in self.map(list) for block in part])

    def _carried(self, block: Block, part: Part, start: int) -> Block:
        """Carry rows to free coordinates; refuse rows outside the support."""
        bijection = self.bijection
        if bijection is None or bijection.is_real:
            return block
        outside = ~bijection.contains(block.x)
        if bool(outside.any()):
            first = int(outside.nonzero()[0, 0])
            place = part.place(start + first if block.numbers is None else int(block.numbers[first]))
            because = f"{place} lies outside the support"
            raise InputError(cannot("use these samples", because, "Correct `support=`, or drop those rows"))
        return Block(bijection.inverse(block.x), block.w, block.context, block.first, keys=block.keys)


def _read_part(rows: Rows, function: Callable[[Iterator[Block]], Any], part: Part) -> tuple[Any, int]:
    """Work on one part; return the result and the number of rows that were read for it."""
    read = 0

    def counted() -> Iterator[Block]:
        nonlocal read
        for block in rows.blocks_of(part):
            read += len(block)
            yield block

    return function(counted()), read


def add_sums(sums: Sums, more: Mapping[str, Tensor]) -> None:
    """Add sums to others in place; a shorter count of categories is 0 for the categories that it lacks."""
    for name, value in more.items():
        if name not in sums:
            sums[name] = value.clone()
        elif sums[name].shape == value.shape:
            sums[name] += value
        else:
            size = max(len(sums[name]), len(value))
            a, b = (torch.nn.functional.pad(one, (0, size - len(one))) for one in (sums[name], value))
            sums[name] = a + b


def rows_of(target: Target, seed: int, workers: Workers | None = None) -> Rows:
    """Return the rows of a target in free coordinates: its stream, its samples, or else fresh draws or a quadrature rule."""
    workers = workers or Threads()
    if target.stream is not None:
        read = target.stream
        rows = Rows(read.parts, target.names, target.carrier, workers, seed=seed, evaluations=target.evaluations)
        return replace(rows, start=read.first, by_content=target.repeats is not None)
    x, w = points_of(target, seed)
    context = None if target.context is None else target.context.cpu()
    counts = Evaluations() if target.samples is None else target.evaluations  # draws were counted when they were drawn
    keys = None if target.repeats is None else target.repeats.rank(seed).cpu()
    keys = keys if target.chains is None else stretches(target.chains.cpu())
    block = Block(x.cpu(), w.cpu(), context, keys=keys)
    return Rows(slices(block), target.names, None, workers, seed=seed, evaluations=counts)


def points_of(target: Target, seed: int, share: float = 1.0) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Return points and weights (Σ w = 1) in float64: p's samples, else quadrature on the line, else fresh draws.

    Quadrature needs a sampler, to find the mass, and a log density of one variable; it makes the fit exact. `share` is the share
    of a budget that fresh draws may use.
    """
    if target.samples is not None:
        x = target.samples.to(torch.float64)
        w = torch.ones(len(x), dtype=torch.float64, device=x.device) if target.weights is None else target.weights
        w = w.to(torch.float64)
        return x, w / w.sum()
    if is_exact(target):
        x, w = expectation_rule(target)
        check_scales(x, target.names, "points of p")
        return x, w
    x = target.draws(fresh_count(target, share), seed).to(torch.float64)
    check_scales(x, target.names, "draws")
    return x, torch.full((len(x),), 1 / len(x), dtype=torch.float64, device=x.device)


def fresh_count(target: Target, share: float = 1.0) -> int:
    """Return the number of fresh draws of p: `FRESH`, or fewer under a budget of which they take this share, but at least 100."""
    counts = target.evaluations
    return int(min(FRESH, max(100, share * (counts.most - counts.total))))


def is_exact(target: Target) -> bool:
    """Return whether the expectation under p is by quadrature: one variable, a sampler, a log density, and no fixed samples."""
    return target.dim == 1 and target.samples is None and (Access.SAMPLER | Access.LOG_PROB) in target.access


def log_prob_at_points(target: Target, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return log p in float64 at points of p.

    Raises:
        TargetError: it is −∞ at some.
    """
    log_p = target.log_prob(x.to(target.device, target.dtype)).detach().to(x.device, torch.float64)
    empty = int((log_p == -torch.inf).sum())
    if empty:
        because = f"{empty} of {len(x)} draws of p fell where its own log density is −∞"
        raise TargetError(cannot("use this target", because, "Check that draws and `log_prob` describe one distribution"))
    return log_p


def held_among(block: Block, stride: int) -> Bool[Tensor, " m"] | None:
    """Return a mask of the held-out rows of a block, which must not be changed; None if no row is held out."""
    if stride == 0:
        return None
    return held_mask(block.first, len(block), stride) if block.keys is None else block.keys % stride == 0


def held_numbers(block: Block, stride: int) -> Int[Tensor, " h"]:
    """Return the numbers within the block of its held-out rows."""
    if stride == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return _held_rows(block.first, len(block), stride) if block.keys is None else (block.keys % stride == 0).nonzero()[:, 0]


@lru_cache(maxsize=64)
def held_mask(start: int, count: int, stride: int) -> Bool[Tensor, " m"]:
    """Return which of `count` rows, from number `start` on, are held out, as a mask that is shared and must not be changed."""
    mask = torch.zeros(count, dtype=torch.bool, device="cpu")
    mask[_held_rows(start, count, stride)] = True
    return mask


def _held_rows(start: int, count: int, stride: int) -> Int[Tensor, " h"]:
    """Return the numbers of the held-out rows: one of every `stride` rows.

    A hash of their common number chooses the row among each `stride` rows (Steele, Lea & Flood, 2014), since data can have a
    period.
    """
    spans = [_held_in(span, stride) for span in range(start // _ROWS_PER_HASH, -(-(start + count) // _ROWS_PER_HASH))]
    numbers = spans[0] if len(spans) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *spans])
    first, end = numbers.searchsorted([start, start + count])
    return torch.from_numpy(numbers[first:end] - start)


@lru_cache(maxsize=64)
def _held_in(span: int, stride: int) -> np.ndarray:
    """Return the numbers of the held-out rows of a span of many blocks."""
    start, end = span * _ROWS_PER_HASH, (span + 1) * _ROWS_PER_HASH
    stretch = np.arange(start // stride, -(-end // stride), dtype=np.uint64)
    numbers: np.ndarray = (stretch * np.uint64(stride) + _mixed(stretch) % np.uint64(stride)).astype(np.int64)
    return numbers[(numbers >= start) & (numbers < end)]


def _salted(keys: Tensor, seed: int) -> Tensor:
    """Mix keys with a seed, so that another seed holds out other rows."""
    mixed = _mixed(keys.cpu().numpy().view(np.uint64) + _mixed(np.array([seed], dtype=np.uint64)))
    return torch.from_numpy((mixed >> np.uint64(1)).view(np.int64)).to(keys.device)


def _mixed(number: np.ndarray) -> np.ndarray:
    mixed = number * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def thinned(rows: Rows, most: int) -> tuple[Block, int]:
    """Return `most` rows, evenly from every part (all rows if there are fewer), and the number of all rows."""
    found = list(rows.map(partial(_thin, most // max(1, len(rows.parts)) + 1)))
    kept, count = joined([block for kept, _ in found for block in kept]), sum(count for _, count in found)
    return kept.thinned(most), count


def _thin(wanted: int, blocks: Iterator[Block]) -> tuple[list[Block], int]:
    """Keep every `step`-th row of a part; the step doubles whenever twice the wanted number is exceeded."""
    kept: list[Block] = []
    step, start = 1, 0
    for block in blocks:
        while len(block) > 2 * wanted * step and not kept:
            step *= 2
        kept.append(block.take(torch.arange(-start % step, len(block), step, device="cpu")))
        start += len(block)
        while sum(map(len, kept)) > 2 * wanted:
            whole = joined(kept)
            kept, step = [whole.take(torch.arange(len(whole), device="cpu") % 2 == 0)], 2 * step
    return kept, start


def mean_log_likelihood(model: Any, rows: Rows) -> float:
    """Return Σ w log q / Σ w over all rows, in nats."""
    total = rows.total(partial(_log_likelihood, model))["total"]
    return float(total[0] / total[1])


def _log_likelihood(model: Any, blocks: Iterator[Block]) -> Sums:
    """Add up w log q and w over the blocks of a part."""
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    for block in blocks:
        value = log_likelihood(model, block.x, block.context).detach()
        total += torch.stack([block.w @ value.to(block.w), block.w.sum()]).cpu()
    return {"total": total}


def _wide(block: Block) -> Block:
    if block.x.dtype == block.w.dtype == torch.float64 and block.context is None:
        return block
    context = None if block.context is None else block.context.to(torch.float64)
    return Block(block.x.to(torch.float64), block.w.to(torch.float64), context, keys=block.keys, numbers=block.numbers)
