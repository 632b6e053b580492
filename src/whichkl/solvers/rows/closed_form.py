"""Closed form: maximum likelihood from sums over the rows, in one pass, for families that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import LARGEST, InputError, cannot
from whichkl.families.family import Family, MomentFamily
from whichkl.families.product import Product
from whichkl.samples import Block, Slice
from whichkl.samples.stream import joined
from whichkl.solvers.rows.rows import Rows, Sums, add_sums, held_numbers, mean_log_likelihood, rows_of
from whichkl.solvers.solver import Held, Optimum, Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.evaluations import Evaluations

_BLOCKS_PER_LOCATED = 8
"""One of this many blocks tells how far the mean is from the origin, which is enough."""
_ROWS_TO_LOCATE = 1_024
"""Number of rows of that block that are used for it; up to twice as many."""
_BITS = 16
_DIGITS = 1 << _BITS
"""Number of bits of a digit, and of digits, in the search for medians."""
_ROUNDING = 1e-12
"""Relative error up to which a weight counts as half of the total."""
_MAX_SHIFT = 1e3
"""Standard deviations. Squares about a point farther than this from the mean have lost six digits."""
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
        if isinstance(family, Product) and (columns := family.about_median(target.dim)):
            model, held, notes = _about_medians(rows, family, list(columns), names, stride)
        else:
            model, held, notes = _about_rows(rows, family, names, stride)
        best = optimum_on(rows, model, held, converged=True)
        return Solution((best,), iterations=1, residual=0.0, held=held, notes=notes)

    def solve_without(self, target: Target, family: Family, left_out: Sequence[Tensor], seed: int) -> list[Any]:
        """Subtract the sums over each set of rows from those over all rows, which one pass gives; medians are recomputed."""
        if not isinstance(family, MomentFamily):
            raise TypeError(family)
        if isinstance(family, Product) and family.about_median(target.dim):
            return super().solve_without(target, family, left_out, seed)
        rows = replace(rows_of(target, seed), evaluations=Evaluations())
        block, names = rows.gather(), (*target.names, *target.context_names)
        sums, _, _, origin = _pass(rows, family, _first(rows, family), 0)
        models = []
        for one in left_out:
            part = block.take(one.cpu())  # the rows are on the CPU, wherever the target is
            apart = family.statistics(part.x, part.w, origin, part.context, overwrite=False, total=None)
            models.append(family.from_statistics(_less(sums, apart), origin, names))
        return models


def _about_rows(rows: Rows, family: MomentFamily, names: Sequence[str], stride: int) -> tuple[Any, Held | None, tuple[str, ...]]:
    """Fit by sums about the first row, or about the mean if that is far from it."""
    sums, apart, kept, origin = _pass(rows, family, _first(rows, family), stride)
    model = family.from_statistics(sums, origin, names)
    if not kept:
        return model, None, ()

    return model, *fit_held(joined(kept), lambda: family.from_statistics(_less(sums, apart), origin, names))


def _less(sums: Sums, apart: Sums) -> Sums:
    """Subtract the sums over held-out rows. Values that were seen stay: these rows may hold the only ones of a category."""
    rest: Sums = {}
    add_sums(rest, sums)
    add_sums(rest, {name: -value for name, value in apart.items() if not name.endswith("seen")})
    return rest


def _about_medians(
    rows: Rows, family: Product, columns: list[int], names: Sequence[str], stride: int
) -> tuple[Any, Held | None, tuple[str, ...]]:
    """Fit by sums about a point that has the medians of all rows, or of the rows that aren't held out, in `columns`."""

    def fitted(some: Rows) -> Any:
        origin = _first(some, family)
        origin[columns] = weighted_medians(some, columns).to(origin)
        sums, _, _, origin = _pass(some, family, origin, 0, columns)
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


def _pass(
    rows: Rows, family: MomentFamily, origin: Float[Tensor, " k"], stride: int, fixed: Sequence[int] = ()
) -> tuple[Sums, Sums, list[Block], Float[Tensor, " k"]]:
    """Add up a family's statistics about an origin, or about the mean, except in the columns `fixed`, if it is far from there.

    Returns:
        The sums over all rows and over the held-out rows, the held-out rows, and the origin of the sums.

    Raises:
        InputError: squares overflow, which can happen in later parts of a stream.
    """
    for is_last in (False, True):
        sums, apart, kept = dict[str, Tensor](), dict[str, Tensor](), list[Block]()
        for of_all, of_held, held in rows.map(partial(_add, family, origin, stride)):
            add_sums(sums, of_all)
            add_sums(apart, of_held)
            kept += held
        for name in ("origin.second", "second"):
            if name in sums and not bool(sums[name].isfinite().all()):
                because = f"the squares of a column ({', '.join(rows.names[:5])}, …) are too large for float64"
                raise InputError(cannot("use these samples", because, f"Divide it so that its numbers stay below {LARGEST:g}"))
        shift = shift_to_mean(sums["origin.weight"], sums["origin.first"], sums["origin.second"])
        if shift is None or is_last:
            break
        shift[list(fixed)] = 0
        origin = origin + shift
    return sums, apart, kept, origin


def _add(
    family: MomentFamily, origin: Float[Tensor, " k"], stride: int, blocks: Iterator[Block]
) -> tuple[Sums, Sums, list[Block]]:
    """Add up a family's statistics over the blocks of a part, for all rows and for the held-out rows, which are kept."""
    is_about_0 = not bool(origin.any())

    def statistics(block: Block) -> Sums:
        total = block.total if is_about_0 else None
        return family.statistics(block.x, block.w, origin, block.context, overwrite=block.fresh, total=total)

    sums: Sums = {}
    kept = []
    for number, block in enumerate(blocks):
        apart = held_numbers(block, stride)
        if len(apart):
            kept.append(block.take(apart.to(block.x.device)))
        if number % _BLOCKS_PER_LOCATED == 0:
            few = block.take(slice(None, None, max(1, len(block) // _ROWS_TO_LOCATE)))  # type: ignore[arg-type]
            z = (few.x if few.context is None else torch.cat([few.x, few.context], 1)) - origin
            add_sums(sums, {"origin.weight": few.w.sum(), "origin.first": few.w @ z, "origin.second": few.w @ z.square()})
        add_sums(sums, statistics(block))  # last, since it may overwrite x
    if not kept:
        return sums, {}, []
    together = joined(kept)  # many small tensors would keep the memory of the large ones from being reused
    return sums, statistics(together), [together]


def weighted_medians(rows: Rows, columns: Sequence[int]) -> Float[Tensor, " k"]:
    """Return the lower weighted median of each column: the least value up to which half of the weight lies.

    The 64 bits of a double are read as a whole number with the same order, and found 16 at a time. Each of four passes adds up
    the weight by the next digit, among the values that begin with the digits found so far.

    Source: radix selection, Knuth (1998), The Art of Computer Programming 3, 5.2.5.
    """
    found = torch.zeros(len(columns), dtype=torch.int64, device="cpu")
    half = below = torch.zeros(len(columns), dtype=torch.float64, device="cpu")
    for digit in range(64 // _BITS):
        nothing = torch.zeros(len(columns), _DIGITS, dtype=torch.float64, device="cpu")
        table = sum(rows.map(partial(_count, columns, found, digit)), nothing)
        half = table.sum(1) / 2 * (1 - _ROUNDING) if digit == 0 else half
        reached = below[:, None] + table.cumsum(1)
        at = ((reached >= half[:, None]) & (table > 0)).int().argmax(1)
        below = (reached - table).gather(1, at[:, None])[:, 0]
        found = found * _DIGITS + at - (_DIGITS // 2 if digit == 0 else 0)
    return torch.where(found < 0, found ^ _MAGNITUDE, found).view(torch.float64)


def _count(columns: Sequence[int], found: Int[Tensor, " k"], digit: int, blocks: Iterator[Block]) -> Int[Tensor, "k 65536"]:
    """Add up the weight per value of digit number `digit`, among values whose earlier digits are `found`."""
    table = torch.zeros(len(columns), _DIGITS, dtype=torch.float64, device="cpu")
    for block in blocks:
        for i, column in enumerate(columns):
            bits = (block.x[:, column].cpu().to(torch.float64) + 0.0).contiguous().view(torch.int64)  # −0 becomes 0
            order = torch.where(bits < 0, bits ^ _MAGNITUDE, bits)  # whole numbers in the order of the doubles
            digits, weights = order >> (64 - _BITS * (digit + 1)), block.w.cpu()
            if digit == 0:
                digits = digits + _DIGITS // 2
            else:
                begins = digits >> _BITS == found[i]
                digits, weights = digits[begins] & (_DIGITS - 1), weights[begins]
            table[i] += torch.bincount(digits, weights, _DIGITS)
    return table


def shift_to_mean(weight: Tensor, first: Tensor, second: Tensor) -> Tensor | None:
    """Return the vector from an origin to the mean if it is too long for the precision of these sums, else None.

    The sums are Σ w, Σ w z and Σ w z², where z is a row minus the origin.
    """
    shift = first / weight
    variance = second / weight - shift.square()
    return shift if bool((shift.square() > _MAX_SHIFT**2 * variance.clamp(min=0)).any()) else None


def fit_held(block: Block, fit: Callable[[], Any]) -> tuple[Held | None, tuple[str, ...]]:
    """Return a model that was fitted without these rows, or a note that the others don't determine one."""
    try:
        return Held(block, fit()), ()
    except InputError as error:
        return None, (f"no rows could be held out, since the others alone don't determine a model: {error}",)


def optimum_on(rows: Rows, model: Any, held: Held | None, *, converged: bool) -> Optimum:
    """Return the only optimum, with its loss on all rows; on the held-out rows for a stream, which saves a pass."""
    judged = Rows((Slice(held.block),), rows.names) if held is not None and rows.start is not None else rows
    return Optimum(model, -mean_log_likelihood(model, judged), converged, is_global=True)
