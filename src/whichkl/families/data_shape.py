"""Data shape: what a network must know about the rows before it can be built, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What a network must know about the data to be built; saved with its weights, as whole numbers."""

    dim: int
    context: int = 0
    """The number of columns of x in a model q(y|x); 0 for none."""
    scalar: bool = False
    """Whether y is a number, not a vector: events of shape ()."""
    categories: tuple[int, ...] = ()
    """The number of categories of each column, if the family counts them."""

    def tensor(self) -> Tensor:
        """Write as an int64 tensor."""
        return torch.tensor([self.dim, self.context, int(self.scalar), *self.categories], dtype=torch.int64, device="cpu")

    @classmethod
    def read(cls, tensor: Tensor) -> Shape:
        """Read what `tensor` wrote."""
        dim, context, scalar, *categories = (int(one) for one in tensor.tolist())
        return cls(dim, context, bool(scalar), tuple(categories))


@dataclass(frozen=True)
class Summary:
    """Weighted means and standard deviations of the rows to be fitted, and the least and largest values of all rows."""

    rows: int
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]
    context_mean: Float[Tensor, " c"]
    context_scale: Float[Tensor, " c"]
    repeats: tuple[int, ...] = ()
    """Columns in which most values of the first rows occur more than once."""

    @property
    def categories(self) -> tuple[int, ...]:
        """One more than the largest value of each column."""
        return tuple(int(one) + 1 for one in self.high.tolist())
