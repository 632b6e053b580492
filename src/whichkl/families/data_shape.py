"""Data shape: what a network must know of the rows before it can be built, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What a network must know of the data to be built: kept beside its weights, as whole numbers."""

    dim: int
    context: int = 0
    """Columns of x in a model q(y|x); 0 for none."""
    scalar: bool = False
    """Whether y is a number, not a vector: events of shape ()."""
    categories: tuple[int, ...] = ()
    """How many values each column has, where the family counts them."""

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
    """The rows in a few numbers: weighted means and standard deviations of those to be fitted, ends of all of them."""

    rows: int
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]
    context_mean: Float[Tensor, " c"]
    context_scale: Float[Tensor, " c"]
    repeats: tuple[int, ...] = ()
    """Columns in which most values of a first look stand more than once."""
