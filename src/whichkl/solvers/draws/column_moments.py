"""Moments: one look at all rows before training: means, scales, ends, and the rows that are set aside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.families.data_shape import Summary
from whichkl.families.network_family import NetworkFamily
from whichkl.samples import Block
from whichkl.solvers.rows.rows import held_among, held_out

_SALT = 2**40
"""Numbers rows anew, so that those to stop by are drawn apart from those held out."""


@dataclass
class Looked:
    """What was seen of some rows; two of these add up to one."""

    count: int = 0
    weight: float = 0.0
    mean: Tensor | None = None
    power: Tensor | None = None
    """Weighted squares about the mean, of the columns of y and then those of x."""
    low: Tensor | None = None
    high: Tensor | None = None
    aside: list[Block] = field(default_factory=list)
    held: list[Block] = field(default_factory=list)

    def reach(self, x: Tensor) -> None:
        """Take in the ends of rows."""
        if len(x):
            low, high = x.amin(0), x.amax(0)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)

    def add(self, count: int, weight: float, mean: Tensor, power: Tensor) -> None:
        """Merge means and squares without losing digits. Source: Chan, Golub & LeVeque (1979)."""
        if self.mean is None or self.power is None or not self.weight:
            self.count, self.weight, self.mean, self.power = self.count + count, self.weight + weight, mean, power
            return
        total = self.weight + weight
        if not total:
            return
        apart = mean - self.mean
        self.power = self.power + power + apart.square() * (self.weight * weight / total)
        self.mean = self.mean + apart * (weight / total)
        self.count, self.weight = self.count + count, total

    def summary(self, first: Block) -> Summary:
        """Return what a network starts from; `first` tells which columns repeat their values.

        Raises:
            InputError: there are no rows with weight.
        """
        if self.mean is None or self.power is None or self.low is None or self.high is None or not self.weight:
            raise InputError(cannot("use these samples", "they hold no row", "Give at least one"))
        scale, dim = (self.power / self.weight).clamp(min=0).sqrt(), first.x.shape[1]
        few = first.x[:4096]
        repeats = tuple(i for i in range(dim) if len(few[:, i].unique()) < len(few) / 2)
        ends = (self.low, self.high, self.mean[dim:], scale[dim:])
        return Summary(self.count, self.mean[:dim], scale[:dim], *ends, repeats)


@dataclass(frozen=True)
class Look:
    """Looks at the blocks of a part, and keeps the rows that are set aside."""

    family: NetworkFamily
    names: tuple[str, ...]
    stride: int
    every: int
    keep: bool
    """Whether rows are to be set aside here."""

    def __call__(self, blocks: Iterable[Block]) -> Looked:
        """Return what was seen."""
        seen = Looked()
        for block in blocks:
            self.family.check_rows(block.x, self.names)
            seen.reach(block.x)
            is_held = held_among(block, self.stride)
            kept = block
            if is_held is not None:
                seen.held.append(block.take(is_held))
                kept = block.take(~is_held)
            if self.keep:
                seen.aside.append(kept.take(aside_from(kept.first, len(kept), self.every)))
            _add(seen, kept)
        return seen


def settle(looks: Iterable[Any]) -> Looked:
    """Add up what was seen of all parts, in their order."""
    total = Looked()
    for one in looks:
        if one.mean is not None:
            total.add(one.count, one.weight, one.mean, one.power)
        for end in (one.low, one.high):
            if end is not None:
                total.reach(end[None])
        total.aside += one.aside
        total.held += one.held
    return total


def aside_from(start: int, count: int, every: int) -> Tensor:
    """Tell which of the rows from `start` on are set aside to stop by: one in `every`, spread by a hash."""
    mask = held_out(start + _SALT, count, every)
    return torch.zeros(count, dtype=torch.bool, device="cpu") if mask is None else mask


def _add(seen: Looked, block: Block) -> None:
    if not len(block):
        return
    x = block.x if block.context is None else torch.cat([block.x, block.context], 1)
    weight = float(block.w.sum())
    mean = block.w @ x / weight if weight else x.mean(0)
    seen.add(len(block), weight, mean, block.w @ (x - mean).square())
