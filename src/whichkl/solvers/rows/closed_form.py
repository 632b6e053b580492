"""Closed form: maximum likelihood from sums over the rows, in one pass, for families that have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import LARGEST, InputError, cannot
from whichkl.families.family import Family, MomentFamily
from whichkl.families.product import Product
from whichkl.objectives import Direction
from whichkl.samples import Block, Slice
from whichkl.samples.stream import joined
from whichkl.solvers.rows.rows import Rows, held_numbers, mean_log_likelihood, rows_of
from whichkl.solvers.rows.weighted_medians import weighted_medians
from whichkl.solvers.solver import Held, Optimum, Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

Sums = dict[str, Tensor]

_FAR = 1e3
"""Sums of squares about a point so many standard deviations from the mean have lost six digits: they are taken anew."""

_LOCATED = 8
"""Of so many blocks one tells how far the mean is from the origin: enough to see whether that is far."""
_LOCATING = 1_024
"""Rows of that block that do, or up to twice as many."""


class ClosedForm(Solver):
    """argmin KL(p‖q) over an exponential family: q has p's expected sufficient statistics, the only optimum.

    One pass over the rows adds up the statistics in float64, part by part in a fixed order. A second one follows where the first
    row, about which sums are taken, was far from the mean; medians (of Laplace margins) take four more.

    Source: Fisher (1922); as the moment-matching projection, Csiszár (1975).
    """

    name: ClassVar[str] = "closed_form"
    direction: ClassVar[Direction] = "forward"
    families: ClassVar[tuple[type[Family], ...]] = (MomentFamily,)

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
        judged = Rows((Slice(held.block),), rows.names) if held is not None and target.stream is not None else rows
        optimum = Optimum(model, -mean_log_likelihood(model, judged), converged=True, is_global=True)
        return Solution((optimum,), iterations=1, residual=0.0, held=held, notes=notes)


def _about_rows(rows: Rows, family: MomentFamily, names: Sequence[str], stride: int) -> tuple[Any, Held | None, tuple[str, ...]]:
    """Fit by sums about the first row, or about the mean where that is far from it."""
    origin = _first(rows, family)
    sums, apart, kept = _pass(rows, family, origin, stride)
    shift = _needed_shift(sums)
    if shift is not None:
        origin = origin + shift
        sums, apart, kept = _pass(rows, family, origin, stride)
    model = family.from_statistics(sums, origin, names)
    held = _held(lambda: family.from_statistics(_without(sums, apart), origin, names), joined(kept)) if kept else (None, ())
    return model, *held


def _about_medians(
    rows: Rows, family: Product, columns: Sequence[int], names: Sequence[str], stride: int
) -> tuple[Any, Held | None, tuple[str, ...]]:
    """Fit by sums about a point whose `columns` are their medians: those of all rows, and those of the rows that are kept."""

    def fitted(some: Rows) -> Any:
        origin = _first(some, family)
        origin[list(columns)] = weighted_medians(some, columns).to(origin)
        sums, _, _ = _pass(some, family, origin, 0)
        shift = _needed_shift(sums)
        if shift is not None:
            shift[list(columns)] = 0
            origin = origin + shift
            sums, _, _ = _pass(some, family, origin, 0)
        return family.from_statistics(sums, origin, names)

    model = fitted(rows)
    if stride == 0:
        return model, None, ()
    block = replace(rows, stride=stride, held=True).gather()
    return model, *_held(lambda: fitted(replace(rows, stride=stride)), block)


def _held(fit: Any, block: Block) -> tuple[Held | None, tuple[str, ...]]:
    """Fit without the rows held out; where the others don't allow it, say so."""
    try:
        return Held(block, fit()), ()
    except InputError as error:
        return None, (f"no rows could be held out, since the others alone don't determine a model: {error}",)


def _first(rows: Rows, family: MomentFamily) -> Float[Tensor, " k"]:
    """Return a point near the rows, followed by one near what they are conditioned on."""
    block = rows.some()
    origin = family.origin(block.x)
    return origin if block.context is None else torch.cat([origin, block.context[0]])


def _needed_shift(sums: Sums) -> Float[Tensor, " k"] | None:
    """Return the way from the origin to the mean, where it is many standard deviations long."""
    shift = sums["origin.first"] / sums["origin.weight"]
    variance = sums["origin.second"] / sums["origin.weight"] - shift.square()
    return shift if bool((shift.square() > _FAR**2 * variance.clamp(min=0)).any()) else None


@dataclass(frozen=True)
class _Add:
    """Adds up a family's statistics over the blocks of a part: of all rows, and of one in `stride`, which it keeps."""

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
            _add(sums, self._statistics(block, located=number % _LOCATED == 0))
        if not kept:
            return sums, {}, []
        together = joined(kept)  # many small tensors would keep the large ones' memory from being used again
        return sums, self._statistics(together), [together]

    def _statistics(self, block: Block, located: bool = True) -> Sums:
        about: Sums = {}
        if located:
            few = block.take(slice(None, None, max(1, len(block) // _LOCATING)))  # type: ignore[arg-type]
            z = (few.x if few.context is None else torch.cat([few.x, few.context], 1)) - self.origin
            about = {"origin.weight": few.w.sum(), "origin.first": few.w @ z, "origin.second": few.w @ z.square()}
        total = block.total if self._is_about_0 else None
        sums = self.family.statistics(block.x, block.w, self.origin, block.context, overwrite=block.fresh, total=total)
        return {**sums, **about}


def _pass(rows: Rows, family: MomentFamily, origin: Float[Tensor, " k"], stride: int) -> tuple[Sums, Sums, list[Block]]:
    """Add up a family's statistics over all rows, in the order of the parts.

    Raises:
        InputError: squares overflow, as in later parts of a stream.
    """
    sums: Sums = {}
    apart: Sums = {}
    kept: list[Block] = []
    for of_all, of_held, held in rows.map(_Add(family, origin, stride)):
        _add(sums, of_all)
        _add(apart, of_held)
        kept += held
    for name in ("origin.second", "second"):
        value = sums.get(name)
        if value is not None and not bool(value.isfinite().all()):
            because = f"the squares of a column ({', '.join(rows.names[:5])}, …) are too large for float64"
            raise InputError(cannot("use these samples", because, f"Divide it so that its numbers stay below {LARGEST:g}"))
    return sums, apart, kept


def _without(sums: Sums, apart: Sums) -> Sums:
    """Take the sums over the rows held out away from those over all; what was seen stays seen: which values there are."""
    rest: Sums = {}
    _add(rest, sums)
    _add(rest, {name: -value for name, value in apart.items() if not name.endswith("seen")})
    return rest


def _add(sums: Sums, more: Mapping[str, Tensor]) -> None:
    """Add sums to others; a count of categories that knows fewer of them is 0 for the rest."""
    for name, value in more.items():
        if name not in sums:
            sums[name] = value.clone()
        elif sums[name].shape == value.shape:
            sums[name] += value
        else:
            size = max(len(sums[name]), len(value))
            a, b = (torch.nn.functional.pad(one, (0, size - len(one))) for one in (sums[name], value))
            sums[name] = a + b
