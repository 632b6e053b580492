"""Closed form: maximum likelihood from sums over the rows, in one pass, for families that have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import LARGEST, InputError, cannot
from whichkl.families.family import Family, MomentFamily
from whichkl.families.product import Product
from whichkl.samples import Block
from whichkl.samples.stream import joined
from whichkl.solvers.rows.exact_fits import Sums, add_sums, fit_held, optimum_on, shift_to_mean
from whichkl.solvers.rows.rows import Rows, held_numbers, rows_of
from whichkl.solvers.solver import Held, Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_BLOCKS_PER_LOCATED = 8
"""One of this many blocks tells how far the mean is from the origin, which is enough."""
_ROWS_TO_LOCATE = 1_024
"""Number of rows of that block that are used for it; up to twice as many."""
_BITS = 16
_DIGITS = 1 << _BITS
"""Number of bits of a digit, and of digits, in the search for medians."""
_ROUNDING = 1e-12
"""Relative error up to which a weight counts as half of the total."""
_MAGNITUDE = 0x7FFFFFFFFFFFFFFF
"""The bits of a double without its sign."""


class ClosedForm(Solver):
    """argmin KL(p‖q) over an exponential family: q has p's expected sufficient statistics, the only optimum.

    One pass over the rows adds up the statistics in float64, part by part in a fixed order. The sums are taken about the first
    row; if it was far from the mean, a second pass follows. Medians, for Laplace margins, take four more passes.

    Source: Fisher (1922); as the moment-matching projection, Csiszár (1975).
    """

    name = "closed_form"
    direction = "forward"
    families = (MomentFamily,)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Add up the statistics of p's points, and read the model from them."""
        if not isinstance(family, MomentFamily):
            raise TypeError(family)
        rows = rows_of(target, seed, work.workers)
        names = (*target.names, *target.context_names)
        found: tuple[Any, Held | None, tuple[str, ...]]
        if isinstance(family, Product) and (median := family.about_median(target.dim)):
            found = _about_medians(rows, family, median, names, stride)
        else:
            found = _about_rows(rows, family, names, stride)
        model, held, notes = found
        best = optimum_on(rows, model, held, converged=True)
        return Solution((best,), iterations=1, residual=0.0, held=held, notes=notes)


def _about_rows(rows: Rows, family: MomentFamily, names: Sequence[str], stride: int) -> tuple[Any, Held | None, tuple[str, ...]]:
    """Fit by sums about the first row, or about the mean if that is far from it."""
    origin = _first(rows, family)
    sums, apart, kept = _pass(rows, family, origin, stride)
    if (shift := _shift(sums)) is not None:
        origin = origin + shift
        sums, apart, kept = _pass(rows, family, origin, stride)
    model = family.from_statistics(sums, origin, names)
    if not kept:
        return model, None, ()
    return model, *fit_held(joined(kept), lambda: family.from_statistics(_without(sums, apart), origin, names))


def _about_medians(
    rows: Rows, family: Product, columns: Sequence[int], names: Sequence[str], stride: int
) -> tuple[Any, Held | None, tuple[str, ...]]:
    """Fit by sums about a point that has the medians of all rows, or of the rows that aren't held out, in `columns`."""

    def fitted(some: Rows) -> Any:
        origin = _first(some, family)
        origin[list(columns)] = weighted_medians(some, columns).to(origin)
        sums, _, _ = _pass(some, family, origin, 0)
        if (shift := _shift(sums)) is not None:
            shift[list(columns)] = 0
            origin = origin + shift
            sums, _, _ = _pass(some, family, origin, 0)
        return family.from_statistics(sums, origin, names)

    model = fitted(rows)
    if stride == 0:
        return model, None, ()
    block = replace(rows, stride=stride, held=True).gather()
    return model, *fit_held(block, lambda: fitted(replace(rows, stride=stride)))


def _first(rows: Rows, family: MomentFamily) -> Float[Tensor, " k"]:
    """Return a point near the rows, followed by a point near their context."""
    block = rows.some()
    origin = family.origin(block.x)
    return origin if block.context is None else torch.cat([origin, block.context[0]])


def _shift(sums: Sums) -> Float[Tensor, " k"] | None:
    return shift_to_mean(sums["origin.weight"], sums["origin.first"], sums["origin.second"])


@dataclass(frozen=True)
class _Add:
    """Adds up a family's statistics over the blocks of a part, for all rows and for the held-out rows, which it keeps."""

    family: MomentFamily
    origin: Float[Tensor, " k"]
    stride: int

    @cached_property
    def _is_about_0(self) -> bool:
        return not bool(self.origin.any())

    def __call__(self, blocks: Iterator[Block]) -> tuple[Sums, Sums, list[Block]]:
        sums: Sums = {}
        kept = []
        for number, block in enumerate(blocks):
            apart = held_numbers(block, self.stride)
            if len(apart):
                kept.append(block.take(apart.to(block.x.device)))
            add_sums(sums, self._statistics(block, located=number % _BLOCKS_PER_LOCATED == 0))
        if not kept:
            return sums, {}, []
        together = joined(kept)  # many small tensors would keep the memory of the large ones from being reused
        return sums, self._statistics(together), [together]

    def _statistics(self, block: Block, located: bool = True) -> Sums:
        about: Sums = {}
        if located:
            few = block.take(slice(None, None, max(1, len(block) // _ROWS_TO_LOCATE)))  # type: ignore[arg-type]
            z = (few.x if few.context is None else torch.cat([few.x, few.context], 1)) - self.origin
            about = {"origin.weight": few.w.sum(), "origin.first": few.w @ z, "origin.second": few.w @ z.square()}
        total = block.total if self._is_about_0 else None
        sums = self.family.statistics(block.x, block.w, self.origin, block.context, overwrite=block.fresh, total=total)
        return {**sums, **about}


def _pass(rows: Rows, family: MomentFamily, origin: Float[Tensor, " k"], stride: int) -> tuple[Sums, Sums, list[Block]]:
    """Add up a family's statistics over all rows, in the order of the parts.

    Raises:
        InputError: squares overflow, which can happen in later parts of a stream.
    """
    sums: Sums = {}
    apart: Sums = {}
    kept: list[Block] = []
    for of_all, of_held, held in rows.map(_Add(family, origin, stride)):
        add_sums(sums, of_all)
        add_sums(apart, of_held)
        kept += held
    for name in ("origin.second", "second"):
        value = sums.get(name)
        if value is not None and not bool(value.isfinite().all()):
            because = f"the squares of a column ({', '.join(rows.names[:5])}, …) are too large for float64"
            raise InputError(cannot("use these samples", because, f"Divide it so that its numbers stay below {LARGEST:g}"))
    return sums, apart, kept


def _without(sums: Sums, apart: Sums) -> Sums:
    """Subtract the sums over the held-out rows; the values that were seen (names that end in `seen`) stay."""
    rest: Sums = {}
    add_sums(rest, sums)
    add_sums(rest, {name: -value for name, value in apart.items() if not name.endswith("seen")})
    return rest


def weighted_medians(rows: Rows, columns: Sequence[int]) -> Float[Tensor, " k"]:
    """Return the lower weighted median of each column: the least value up to which half of the weight lies.

    The 64 bits of a double are read as a whole number with the same order, and found 16 at a time. Each of four passes adds up
    the weight by the next digit, among the values that begin with the digits found so far.

    Args:
        rows: the rows, which are read four times.
        columns: the numbers of the columns.

    Source: radix selection, Knuth (1998), The Art of Computer Programming 3, 5.2.5.
    """
    found = torch.zeros(len(columns), dtype=torch.int64, device="cpu")
    half = below = torch.zeros(len(columns), dtype=torch.float64, device="cpu")
    for digit in range(64 // _BITS):
        nothing = torch.zeros(len(columns), _DIGITS, dtype=torch.float64, device="cpu")
        table = sum(rows.map(_Count(tuple(columns), found, digit)), nothing)
        half = table.sum(1) / 2 * (1 - _ROUNDING) if digit == 0 else half
        reached = below[:, None] + table.cumsum(1)
        at = ((reached >= half[:, None]) & (table > 0)).int().argmax(1)
        below = (reached - table).gather(1, at[:, None])[:, 0]
        found = found * _DIGITS + at - (_DIGITS // 2 if digit == 0 else 0)
    return torch.where(found < 0, found ^ _MAGNITUDE, found).view(torch.float64)


@dataclass(frozen=True)
class _Count:
    """Adds up the weight per value of digit number `digit`, among values whose earlier digits are `found`."""

    columns: tuple[int, ...]
    found: Int[Tensor, " k"]
    digit: int

    def __call__(self, blocks: Iterator[Block]) -> Tensor:
        table = torch.zeros(len(self.columns), _DIGITS, dtype=torch.float64, device="cpu")
        shift = 64 - _BITS * (self.digit + 1)
        for block in blocks:
            for i, column in enumerate(self.columns):
                order = _order(block.x[:, column].cpu())
                digits, weights = order >> shift, block.w.cpu()
                if self.digit == 0:
                    digits = digits + _DIGITS // 2
                else:
                    begins = digits >> _BITS == self.found[i]
                    digits, weights = digits[begins] & (_DIGITS - 1), weights[begins]
                table[i] += torch.bincount(digits, weights, _DIGITS)
        return table


def _order(x: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
    """Return doubles as whole numbers of 64 bits in the same order; −0 is 0."""
    bits = (x.to(torch.float64) + 0.0).contiguous().view(torch.int64)
    return torch.where(bits < 0, bits ^ _MAGNITUDE, bits)
