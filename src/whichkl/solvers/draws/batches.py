"""Batches: rows in random order for gradient descent, from memory or from a stream, and the rows that decide when to stop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from whichkl._checks import InputError, cannot, check_scales
from whichkl.families.layers import Shape, Summary
from whichkl.families.network_family import NetworkFamily
from whichkl.families.regression import Regression
from whichkl.samples import Block
from whichkl.samples.stream import joined, slices
from whichkl.solvers.rows.rows import Rows, fresh_count, held_among, held_mask, rows_of
from whichkl.solvers.work import Work
from whichkl.targets import Target

_MAX_VALIDATION_ROWS = 20_000
"""About the largest number of validation rows; they are about a tenth of all."""
_ROWS_IN_BUFFER = 65_536
"""Number of rows of a stream that are shuffled at once."""
_SALT = 2**40
"""Offset of the rows' numbers that makes the choice of validation rows independent of the choice of held-out rows."""


class Batches(ABC):
    """Batches of training rows, in rounds; the order of a round depends on the seed and its number alone."""

    rows: int
    size: int
    """Number of rows per batch."""
    steps: int
    """Approximate number of batches per round."""
    per_epoch: float
    """Number of rounds in which every row occurs once."""

    @abstractmethod
    def round(self, number: int) -> Iterator[Block]:
        """Yield the batches of a round; weights average 1 over all rows."""


class Shuffled(Batches):
    """Rows in memory, in a new random order per epoch; rows that don't fill a batch wait for another epoch."""

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
    """A stream's parts in a new random order each epoch, and rows in random order within a buffer of `_ROWS_IN_BUFFER` rows.

    Rows of one part therefore follow each other closely. If parts differ, such as files by date, smaller parts mix better.
    """

    def __init__(self, rows: Rows, every: int, count: int, mean_weight: float, size: int, seed: int) -> None:
        """Take the parts; one in `every` rows, chosen by a hash, is a validation row."""
        self.parts, self.every, self.mean_weight = rows, every, mean_weight
        self.rows, self.size, self.seed = count, min(size, count), seed
        pieces = min(max(1, round(count / (500 * self.size))), len(rows.parts))
        self.per_epoch = float(pieces)
        self.pieces, self.steps = pieces, max(1, count // (pieces * self.size))

    def round(self, number: int) -> Iterator[Block]:
        """Read the next parts, a buffer at a time."""
        epoch, piece = divmod(number, self.pieces)
        order = torch.randperm(len(self.parts.parts), generator=generator_for(self.seed, epoch), device="cpu")
        shuffle = generator_for(self.seed, -1 - number)
        waiting: list[Block] = []
        for i in order.tensor_split(self.pieces)[piece].tolist():
            for block in self.parts.blocks_of(self.parts.parts[i]):
                kept = block.take(~_aside(block, self.every))
                waiting.append(Block(kept.x, kept.w / self.mean_weight, kept.context))
                if sum(map(len, waiting)) >= _ROWS_IN_BUFFER:
                    whole, rest = self._cut(waiting, shuffle)
                    yield from whole
                    waiting = [rest] if len(rest) else []
        if waiting:
            whole, rest = self._cut(waiting, shuffle)
            yield from whole
            if len(rest) >= self.size // 2:  # a batch of a few rows would have a gradient of mostly noise
                yield rest

    def _cut(self, blocks: list[Block], shuffle: torch.Generator) -> tuple[list[Block], Block]:
        block = joined(blocks)
        block = block.take(torch.randperm(len(block), generator=shuffle, device="cpu").to(block.x.device))
        whole = len(block) // self.size * self.size
        ranges = [torch.arange(i, i + self.size, device="cpu") for i in range(0, whole, self.size)]
        return [block.take(one) for one in ranges], block.take(torch.arange(whole, len(block), device="cpu"))


@dataclass(frozen=True)
class Data:
    """The rows of a target, ready for training."""

    batches: Batches
    validation: Block
    """Rows that decide when to stop."""
    held: Block | None
    """Rows that training never sees."""
    kept: Rows
    """The rows that aren't held out."""
    shape: Shape
    summary: Summary

    def read(self, block: Block) -> Block:
        """Count a reading of rows of the target, and return them."""
        self.kept.evaluations["rows"] += len(block)
        return block


def data_of(
    target: Target, family: NetworkFamily, seed: int, work: Work, stride: int, size: int | None, share: float = 1.0
) -> Data:
    """Read all rows once, set validation rows aside, and put the others in batches.

    A sampler gives `fresh_count` draws, which take at most `share` of a budget.

    Raises:
        InputError: there are too few rows, a column is constant, or the family has no probability for some rows.
    """
    if target.samples is None and target.stream is None:
        # Fresh draws even of one variable, where `rows_of` would give quadrature: batches are for draws.
        x = target.draws(fresh_count(target, share), seed).to(torch.float64)
        check_scales(x, target.names, "draws")
        rows = Rows(slices(Block(x, torch.ones(len(x), dtype=torch.float64, device=x.device))), target.names, None, work.workers)
    else:
        rows = rows_of(target, seed, work.workers)
    kept, apart = replace(rows, stride=stride), replace(rows, stride=stride, held=True)
    if target.stream is None:
        block = kept.gather()
        block = block.take(block.w > 0)
        family.check_count(len(block), block.x.shape[1])
        validation, train = _set_aside(block, seed)
        held = apart.gather() if stride else None
        scan = _scan(family, target.names, 0, 0, [block])
        if held is not None:
            family.check_rows(held.x, target.names)
            scan.reach(held.x)
        summary = scan.summary(block, block if family.starts_from_regression else None)
        batches: Batches = Shuffled(train, size or _size(len(train)), seed)
    else:
        about = target.stream.about
        every = max(10, about // _MAX_VALIDATION_ROWS)
        scan = _total(rows.map(partial(_scan, family, target.names, stride, every)))
        if not scan.aside or scan.count < family.minimum_rows(target.dim):
            family.check_count(scan.count, target.dim)
            raise InputError(cannot("stop training by unseen rows", "too few rows could be set aside", "Give more rows"))
        validation = joined(scan.aside)
        held = joined(scan.held) if scan.held else None
        summary = scan.summary(target.stream.first, validation if family.starts_from_regression else None)
        trained = scan.count - len(validation)
        batches = Streamed(kept, every, trained, scan.weight / scan.count, size or _size(trained), seed)
    family.check_summary(summary, target.names)
    return Data(batches, validation, held, kept, family.shape(summary, target.scalar), summary)


def _set_aside(block: Block, seed: int) -> tuple[Block, Block]:
    """Return the validation rows, a tenth, and the others; rows of one key stay together."""
    generator = generator_for(seed, -1)
    if block.keys is None:
        order = torch.randperm(len(block), generator=generator, device="cpu").to(block.x.device)
        aside = min(max(1, len(block) // 10), _MAX_VALIDATION_ROWS)
        return block.take(order[:aside]), block.take(order[aside:])
    number = block.keys.unique(return_inverse=True)[1]
    count = int(number.max()) + 1
    is_aside = (torch.randperm(count, generator=generator, device="cpu") < max(1, count // 10))[number.cpu()].to(block.x.device)
    return block.take(is_aside), block.take(~is_aside) if count > 1 else block


def generator_for(seed: int, number: int) -> torch.Generator:
    """Return the generator of one stretch of a seeded run."""
    mixed = (seed * 6364136223846793005 + (number + 2) * 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


def _size(rows: int) -> int:
    """Return the size of a batch: a 64th of the rows, at least 32 and at most 1,024."""
    return min(max(32, rows // 64), 1024)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@dataclass
class Scan:
    """Moments and ends of the columns of some rows, and the rows that were set aside; two of these can be added."""

    count: int = 0
    weight: float = 0.0
    mean: Tensor = field(default_factory=partial(_number, 0.0))
    power: Tensor = field(default_factory=partial(_number, 0.0))
    """Weighted squares about the mean, of the columns of y and then those of x."""
    low: Tensor = field(default_factory=partial(_number, math.inf))
    high: Tensor = field(default_factory=partial(_number, -math.inf))
    aside: list[Block] = field(default_factory=list)
    held: list[Block] = field(default_factory=list)

    def reach(self, x: Tensor) -> None:
        """Take in the smallest and largest values of rows."""
        if len(x):
            self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))

    def add(self, count: int, weight: float, mean: Tensor, power: Tensor) -> None:
        """Merge means and squares without losing digits. Source: Chan, Golub & LeVeque (1979)."""
        if not self.weight:  # rows without weight, if there are any, tell nothing
            self.count, self.weight, self.mean, self.power = self.count + count, weight, mean, power
            return
        total = self.weight + weight
        apart = mean - self.mean
        self.power = self.power + power + apart.square() * (self.weight * weight / total)
        self.mean = self.mean + apart * (weight / total)
        self.count, self.weight = self.count + count, total

    def summary(self, first: Block, regressed: Block | None = None) -> Summary:
        """Return the summary that a network starts from.

        Args:
            first: rows that show which columns repeat their values.
            regressed: rows for the regression of y on x, if there are any.

        Raises:
            InputError: there are no rows with weight.
        """
        if not self.weight:
            raise InputError(cannot("use these samples", "they hold no row", "Give at least one"))
        scale, dim = (self.power / self.weight).clamp(min=0).sqrt(), first.x.shape[1]
        few = first.x[:4096]
        repeats = tuple(i for i in range(dim) if len(few[:, i].unique()) < len(few) / 2)
        ends = (self.low, self.high, self.mean[dim:], scale[dim:])
        start = None
        if regressed is not None and regressed.context is not None:
            unit = torch.where(scale > 0, scale, torch.ones_like(scale))
            y, x = (regressed.x - self.mean[:dim]) / unit[:dim], (regressed.context - self.mean[dim:]) / unit[dim:]
            start = Regression.of(y, x, regressed.w)
        return Summary(self.count, self.mean[:dim], scale[:dim], *ends, repeats, start)


def _scan(family: NetworkFamily, names: tuple[str, ...], stride: int, every: int, blocks: Iterable[Block]) -> Scan:
    """Return moments and ends of the blocks of a part, the held-out rows, one of every `stride`, and the validation rows.

    One of every `every` rows is a validation row. There are none of either where its number is 0.
    """
    seen = Scan()
    for block in blocks:
        family.check_rows(block.x, names)
        seen.reach(block.x)
        is_held = held_among(block, stride)
        kept = block
        if is_held is not None:
            seen.held.append(block.take(is_held))
            kept = block.take(~is_held)
        if every:
            seen.aside.append(kept.take(_aside(kept, every)))
        if len(kept):
            x = kept.x if kept.context is None else torch.cat([kept.x, kept.context], 1)
            weight = float(kept.w.sum())
            mean = kept.w @ x / weight if weight else x.mean(0)
            seen.add(len(kept), weight, mean, kept.w @ (x - mean).square())
    return seen


def _total(scans: Iterable[Scan]) -> Scan:
    """Add up the results of all parts, in their order."""
    total = Scan()
    for one in scans:
        if one.count:
            total.add(one.count, one.weight, one.mean, one.power)
        total.low, total.high = torch.minimum(total.low, one.low), torch.maximum(total.high, one.high)
        total.aside += one.aside
        total.held += one.held
    return total


def _aside(block: Block, every: int) -> Bool[Tensor, " m"]:
    """Return which rows of a block are validation rows: one in `every`, chosen by a hash."""
    return held_mask(block.first + _SALT, len(block), every)
