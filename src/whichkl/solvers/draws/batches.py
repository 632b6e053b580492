"""Batches: rows in random order for gradient descent, from memory or from a stream, and rows set aside to stop by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from whichkl._checks import InputError, cannot, check_scales
from whichkl.families.data_shape import Shape, Summary
from whichkl.families.network_family import NetworkFamily
from whichkl.samples import Block
from whichkl.samples.stream import joined, slices
from whichkl.solvers.draws.column_moments import Look, aside_from, settle
from whichkl.solvers.rows.points import fresh_count
from whichkl.solvers.rows.rows import Rows, rows_of
from whichkl.solvers.work import Work
from whichkl.targets import Target

VALIDATION = 20_000
"""At most about so many rows, and about a tenth, are set aside to stop by."""
_BUFFER = 65_536
"""Rows of a stream that are shuffled at once."""


class Batches(ABC):
    """Batches of training rows, in rounds; the order of a round depends on the seed and its number alone."""

    rows: int
    size: int
    """Rows of a batch."""
    steps: int
    """About how many batches a round has."""
    per_epoch: float
    """Rounds in which every row comes once."""

    @abstractmethod
    def round(self, number: int) -> Iterator[Block]:
        """Yield the batches of a round; weights average 1 over all rows."""


class Shuffled(Batches):
    """Rows in memory, in a new random order each epoch; what doesn't fill a batch waits for another one."""

    def __init__(self, block: Block, size: int, seed: int) -> None:
        """Take the rows, and scale their weights."""
        self.block = replace(block, w=block.w / block.w.mean())
        self.rows, self.size, self.seed = len(block), min(size, len(block)), seed
        self.epoch_steps = self.rows // self.size
        self.steps = min(max(self.epoch_steps, 25), 500)
        self.per_epoch = self.epoch_steps / self.steps

    def round(self, number: int) -> Iterator[Block]:
        """Yield the next `steps` batches."""
        order, epoch = None, -1
        for step in range(number * self.steps, (number + 1) * self.steps):
            if order is None or step // self.epoch_steps != epoch:
                epoch = step // self.epoch_steps
                order = torch.randperm(self.rows, generator=generator_for(self.seed, epoch), device="cpu").to(self.block.x.device)
            first = step % self.epoch_steps * self.size
            yield self.block.take(order[first : first + self.size])


class Streamed(Batches):
    """A stream's parts in a new random order each epoch, and rows in random order within a buffer of `_BUFFER` rows.

    Rows of one part so come near to each other in time; where parts differ (files in order of dates), smaller ones mix better.
    """

    def __init__(self, rows: Rows, every: int, count: int, mean_weight: float, size: int, seed: int) -> None:
        """Take the parts; every `every`-th row, by a hash, is one to stop by."""
        self.parts, self.every, self.mean_weight = rows, every, mean_weight
        self.rows, self.size, self.seed = count, min(size, count), seed
        pieces = min(max(1, round(count / (500 * self.size))), len(rows.parts))
        self.per_epoch = float(pieces)
        self.pieces, self.steps = pieces, max(1, count // (pieces * self.size))

    def round(self, number: int) -> Iterator[Block]:
        """Read the next parts, a buffer at a time."""
        epoch, piece = divmod(number, self.pieces)
        order = torch.randperm(len(self.parts.parts), generator=generator_for(self.seed, epoch), device="cpu")
        mine: list[int] = order.tensor_split(self.pieces)[piece].tolist()
        shuffle = generator_for(self.seed, -1 - number)
        waiting: list[Block] = []
        for block in self._blocks(mine):
            waiting.append(block)
            if sum(map(len, waiting)) >= _BUFFER:
                whole, rest = self._cut(waiting, shuffle)
                yield from whole
                waiting = [rest] if len(rest) else []
        if waiting:
            whole, rest = self._cut(waiting, shuffle)
            yield from whole
            if len(rest) >= self.size // 2:
                yield rest

    def _blocks(self, parts: Sequence[int]) -> Iterator[Block]:
        for i in parts:
            for block in self.parts.blocks_of(self.parts.parts[i]):
                aside = aside_from(block.first, len(block), self.every)
                kept = block.take(~aside)
                yield Block(kept.x, kept.w / self.mean_weight, kept.context)

    def _cut(self, blocks: list[Block], shuffle: torch.Generator) -> tuple[list[Block], Block]:
        block = joined(blocks)
        block = block.take(torch.randperm(len(block), generator=shuffle, device="cpu").to(block.x.device))
        whole = len(block) // self.size * self.size
        ranges = [torch.arange(i, i + self.size, device="cpu") for i in range(0, whole, self.size)]
        return [block.take(one) for one in ranges], block.take(torch.arange(whole, len(block), device="cpu"))


@dataclass(frozen=True)
class Data:
    """All that training needs of a target."""

    batches: Batches
    validation: Block
    """Rows to stop by."""
    held: Block | None
    """Rows that training never sees."""
    kept: Rows
    """The rows that aren't held out."""
    shape: Shape
    summary: Summary

    def read(self, block: Block) -> Block:
        """Count a reading of rows of the target, and return them."""
        if self.kept.evaluations is not None:
            self.kept.evaluations["rows"] += len(block)
        return block


def data_of(
    target: Target, family: NetworkFamily, seed: int, work: Work, stride: int, size: int | None, share: float = 1.0
) -> Data:
    """Look at all rows once, set some aside, and put the others in batches.

    A target that is a sampler gives `fresh_count` draws, which take at most so great a share of a budget.

    Raises:
        InputError: too few rows, a constant column, or rows for which the family has no probability.
    """
    rows = _rows(target, seed, work, share)
    kept, apart = replace(rows, stride=stride), replace(rows, stride=stride, held=True)
    if target.stream is None:
        block = kept.gather()
        block = block.take(block.w > 0)
        family.check_count(len(block), block.x.shape[1])
        validation, train = _set_aside(block, seed)
        held = apart.gather() if stride else None
        looked = Look(family, target.names, 0, 0, keep=False)([block])
        if held is not None:
            family.check_rows(held.x, target.names)
            looked.reach(held.x)
        summary = looked.summary(block)
        batches: Batches = Shuffled(train, size or _size(len(train)), seed)
    else:
        about = target.stream.about
        every = max(10, about // VALIDATION)
        looked = settle(rows.map(Look(family, target.names, stride, every, keep=True)))
        if not looked.aside or looked.count < family.minimum_rows(target.dim):
            family.check_count(looked.count, target.dim)
            raise InputError(cannot("stop training by unseen rows", "too few rows could be set aside", "Give more rows"))
        validation = joined(looked.aside)
        held = joined(looked.held) if looked.held else None
        summary = looked.summary(target.stream.first)
        trained = looked.count - len(validation)
        batches = Streamed(kept, every, trained, looked.weight / looked.count, size or _size(trained), seed)
    family.check_summary(summary, target.names)
    return Data(batches, validation, held, kept, family.shape(summary, target.scalar), summary)


def _set_aside(block: Block, seed: int) -> tuple[Block, Block]:
    """Return a tenth of the rows, to stop by, and the others; rows of one key stay together."""
    generator = generator_for(seed, -1)
    if block.keys is None:
        order = torch.randperm(len(block), generator=generator, device="cpu").to(block.x.device)
        aside = min(max(1, len(block) // 10), VALIDATION)
        return block.take(order[:aside]), block.take(order[aside:])
    number = block.keys.unique(return_inverse=True)[1]
    count = int(number.max()) + 1
    is_aside = (torch.randperm(count, generator=generator, device="cpu") < max(1, count // 10))[number.cpu()].to(block.x.device)
    return block.take(is_aside), block.take(~is_aside) if count > 1 else block


def generator_for(seed: int, number: int) -> torch.Generator:
    """Return a generator for one stretch of a seeded run."""
    mixed = (seed * 6364136223846793005 + (number + 2) * 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


def _rows(target: Target, seed: int, work: Work, share: float) -> Rows:
    if target.samples is None and target.stream is None:
        x = target.draws(fresh_count(target, share), seed).to(torch.float64)
        check_scales(x, target.names, "draws")
        return Rows(slices(Block(x, torch.ones(len(x), dtype=torch.float64, device=x.device))), target.names, None, work.workers)
    return rows_of(target, seed, work.workers)


def _size(rows: int) -> int:
    """A batch of a 64th of the rows: 32 at least, 1,024 at most."""
    return min(max(32, rows // 64), 1024)
