"""Closed form: maximum likelihood from sums over the rows, in one pass, for families that have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from whichkl.families.family import Family, MomentFamily
from whichkl.objectives import ForwardKL, Objective
from whichkl.samples import Block, Slice
from whichkl.samples.stream import joined
from whichkl.solvers.rows import Rows, first_row, held_out, mean_log_likelihood, rows_of
from whichkl.solvers.solver import Held, Optimum, Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

Sums = dict[str, Tensor]


class ClosedForm(Solver):
    """argmin KL(p‖q) over an exponential family: q has p's expected sufficient statistics, the only optimum.

    One pass over the rows adds up the statistics in float64, part by part in a fixed order.

    Source: Fisher (1922); as the moment-matching projection, Csiszár (1975).
    """

    name: ClassVar[str] = "closed_form"
    objective: ClassVar[type[Objective]] = ForwardKL
    families: ClassVar[tuple[type[Family], ...]] = (MomentFamily,)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Add up the statistics of p's points, and read the model from them."""
        if not isinstance(family, MomentFamily):
            raise TypeError(family)
        rows = rows_of(target, seed, work.workers)
        origin = first_row(rows)
        sums, apart, kept = _pass(rows, family, origin, stride)
        together = {name: value + apart[name] for name, value in sums.items()} if kept else sums
        model = family.from_statistics(together, origin, target.names)
        held = Held(joined(kept), family.from_statistics(sums, origin, target.names)) if kept else None
        loss = -mean_log_likelihood(
            model, rows if target.stream is None or held is None else Rows((Slice(held.block),), rows.names)
        )
        return Solution((Optimum(model, loss, converged=True, is_global=True),), iterations=1, residual=0.0, held=held)


@dataclass(frozen=True)
class _Add:
    """Adds up a family's statistics over the blocks of a part: of most rows, and of every `stride`-th one, which it keeps."""

    family: MomentFamily
    origin: Float[Tensor, " d"]
    stride: int

    def __call__(self, blocks: Iterator[Block]) -> tuple[Sums, Sums, list[Block]]:
        sums: Sums = {}
        apart: Sums = {}
        kept, start = [], 0
        for block in blocks:
            is_held = held_out(start, len(block), self.stride)
            start += len(block)
            if is_held is None:
                _add(sums, self._statistics(block))
                continue
            kept.append(block.take(is_held))
            _add(sums, self._statistics(block.take(~is_held)))
            _add(apart, self._statistics(kept[-1]))
        return sums, apart, kept

    def _statistics(self, block: Block) -> Sums:
        return self.family.statistics(block.x, block.w, self.origin, block.context)


def _pass(rows: Rows, family: MomentFamily, origin: Float[Tensor, " d"], stride: int) -> tuple[Sums, Sums, list[Block]]:
    """Add up a family's statistics over all rows, in the order of the parts."""
    sums: Sums = {}
    apart: Sums = {}
    kept: list[Block] = []
    for of_most, of_held, held in rows.map(_Add(family, origin, stride)):
        _add(sums, of_most)
        _add(apart, of_held)
        kept += held
    return sums, apart, kept


def _add(sums: Sums, more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value
