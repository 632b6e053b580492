"""Block EM: maximum likelihood of independent blocks of columns, each a mixture, which EM fits alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.distributions import Distribution

from whichkl.families import BlockMixture, Family, Mixture
from whichkl.families.block_mixture import IndependentBlocks
from whichkl.samples import Block
from whichkl.samples.stream import slices
from whichkl.solvers.rows.closed_form import fit_held, optimum_on
from whichkl.solvers.rows.em import ExpectationMaximization
from whichkl.solvers.rows.rows import Rows, rows_of
from whichkl.solvers.solver import Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target


@dataclass(frozen=True)
class BlockExpectationMaximization(Solver):
    """argmin KL(p‖q) over independent blocks of mixtures: the likelihood is a sum over blocks, and EM maximises each term.

    Args:
        each: the solver of one block.
        neighbour: a model of the same blocks, near which EM starts instead.
    """

    name = "block_em"
    direction = "forward"
    families = (BlockMixture,)

    each: ExpectationMaximization = field(default_factory=ExpectationMaximization)
    neighbour: IndependentBlocks | None = None

    def quick(self) -> BlockExpectationMaximization:
        """Return a solver whose blocks are fitted quickly."""
        return replace(self, each=self.each.quick())

    def near(self, model: Any, tolerance: float) -> BlockExpectationMaximization:
        """Return a solver that starts from a model of the same blocks, if it has these."""
        if not isinstance(model, IndependentBlocks):
            return self
        return replace(self, neighbour=model, each=replace(self.each, tolerance=max(self.each.tolerance, tolerance)))

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run EM on the columns of each block."""
        if not isinstance(family, BlockMixture):
            raise TypeError(family)
        rows = rows_of(target, seed, work.workers)
        whole = rows.gather()
        family, note = family.with_blocks_of(whole.x, whole.w)
        model, parts = self._fit(whole, rows, family, seed, work)
        held, notes = None, (note,) if note else ()
        if stride:
            apart = replace(rows, stride=stride)
            block = replace(apart, held=True).gather()
            held, more = fit_held(block, lambda: self._fit(apart.gather(), rows, family, seed, work)[0])
            notes = (*notes, *more)
        best = optimum_on(rows, model, held, converged=all(one.best.converged for one in parts))
        return Solution(
            (best,),
            iterations=sum(one.iterations for one in parts),
            residual=max(one.residual for one in parts),
            held=held,
            notes=notes,
            family=family,
            doubts=tuple(dict.fromkeys(doubt for one in parts for doubt in one.doubts)),
        )

    def _fit(self, whole: Block, rows: Rows, family: BlockMixture, seed: int, work: Work) -> tuple[Distribution, list[Solution]]:
        """Fit every block, and return the model of all columns, and each block's solution."""
        columns, found = family.columns(whole.x.shape[1]), []
        for b, block in enumerate(columns):
            part = Rows(slices(Block(whole.x[:, block], whole.w)), tuple(rows.names[i] for i in block), None, rows.workers)
            one = self.each if self.neighbour is None else self.each.near(self.neighbour.laws[b], 0.0)
            found.append(one.run(part, Mixture(family.components, family.covariance), seed, work.quiet()))
        return IndependentBlocks([one.best.model for one in found], columns), found
