"""Rows: the data of a fit as figures show them, and draws of its model to compare them with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.fitting import Fit
from whichkl.process.seeds import seeded
from whichkl.samples import Block

_DRAWS = 20_000
_MAX_ATOMS = 30
"""Largest number of distinct whole numbers for a column to count as discrete."""


@dataclass(frozen=True)
class RowsAndDraws:
    """Rows of p and draws of q, and the range of each column."""

    rows: Float[Tensor, "n d"]
    draws: Float[Tensor, "m d"]
    names: tuple[str, ...]

    @property
    def has_atoms(self) -> list[bool]:
        """Whether each column holds few distinct whole numbers: categories and small counts."""
        columns = [column.unique() for column in self.rows.T]
        return [len(one) <= _MAX_ATOMS and bool((one == one.round()).all()) for one in columns]

    def range(self, j: int) -> tuple[float, float]:
        """The middle 99 % of a column, of rows and of draws, with some room."""
        tails = torch.tensor([0.005, 0.995], dtype=torch.float64, device="cpu")
        ends = torch.stack([part[:, j].quantile(tails) for part in (self.rows, self.draws)])
        low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
        room = 0.6 if self.has_atoms[j] else 0.08 * (high - low) or 1.0
        return low - room, high + room


def data(fit: Fit, most: int = 20_000) -> Block | None:
    """Return rows of a fit's target: its samples, fresh draws, or the rows that were held out; None where there are none.

    Weighted rows are drawn by their weights, so that all returned rows have the same weight.
    """
    held, target = fit.diagnostics.held, fit.target
    generator = torch.Generator().manual_seed(fit.seed)
    if target is not None and target.samples is not None:
        w = torch.ones(len(target.samples), dtype=torch.float64, device="cpu") if target.weights is None else target.weights.cpu()
        block, weighted = Block(target.samples, w, target.context), target.weights is not None
    elif target is not None and target.sampler is not None:
        x = target.draws(1000, seed=fit.seed)
        block, weighted = Block(x, torch.ones(len(x), dtype=torch.float64, device="cpu")), False
    elif held is not None:
        block, weighted = held, bool((held.w != held.w[0]).any())
    else:
        return None
    if weighted:
        rows = torch.multinomial(block.w.double(), most, replacement=True, generator=generator)
        block = block.take(rows)
    elif len(block) > most:
        block = block.take(torch.randperm(len(block), generator=generator, device="cpu")[:most])
    context = None if block.context is None else block.context.cpu()
    return Block(block.x.cpu().to(torch.float64), block.w.cpu(), context)


def draws(fit: Fit, model: Distribution, n: int = 4000) -> Float[Tensor, "n d"]:
    """Draw from a model; the same fit gives the same draws."""
    with seeded(fit.seed), torch.no_grad():
        x: Tensor = model.sample(torch.Size((n,)))
    return x.reshape(n, -1).cpu().to(torch.float64)


def rows_and_draws(fit: Fit) -> RowsAndDraws | None:
    """Return rows and draws of a fit that isn't conditional; None where there are no rows."""
    rows = data(fit)
    if rows is None or not isinstance(fit.model, Distribution):
        return None
    return RowsAndDraws(rows.x, draws(fit, fit.model, _DRAWS), fit.names)
