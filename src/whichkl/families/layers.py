"""Layers: the parts of this library's networks, and what a network must know about the data before it can be built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl.families.regression import Regression

_INITIAL: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Where layers are made, whatever torch's defaults are; a network moves to its own dtype and device afterwards."""


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
    regression: Regression | None = None
    """The linear regression of y on x, for families that start from it."""

    @property
    def categories(self) -> tuple[int, ...]:
        """One more than the largest value of each column."""
        return tuple(int(one) + 1 for one in self.high.tolist())


class Standardised(nn.Module):
    """A module that knows the scale of its data: buffers `mean` and `scale` of y, `context_mean` and `context_scale` of x.

    Args:
        shape: the shape of the data.
        scales_y: whether y has a scale; categories have none.
    """

    mean: Tensor
    scale: Tensor
    context_mean: Tensor
    context_scale: Tensor

    def __init__(self, shape: Shape, *, scales_y: bool = True) -> None:
        super().__init__()
        self.dim, self.context, self.is_scalar, self.scales_y = shape.dim, shape.context, shape.scalar, scales_y
        for lead, size in (("", shape.dim), ("context_", shape.context)):
            self.register_buffer(f"{lead}mean", torch.zeros(size, **_INITIAL))
            self.register_buffer(f"{lead}scale", torch.ones(size, **_INITIAL))

    def settle(self, summary: Summary) -> None:
        """Take the means and scales of the data; a constant column keeps its scale of 1."""
        for lead in ("", "context_") if self.scales_y else ("context_",):
            scale: Tensor = getattr(summary, f"{lead}scale")
            getattr(self, f"{lead}mean").copy_(getattr(summary, f"{lead}mean"))
            getattr(self, f"{lead}scale").copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))

    def standard(self, y: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Return (y − mean) / scale."""
        return (y - self.mean) / self.scale

    def standard_context(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """Return (x − mean) / scale of contexts."""
        return (x - self.context_mean) / self.context_scale


def perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with SiLU between them: smooth, so that densities have derivatives. Source: Elfwing et al. (2018)."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after, **_INITIAL), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs, **_INITIAL))


class MaskedLinear(nn.Linear):
    """A linear layer with some weights fixed at 0.

    Args:
        mask: (outputs, inputs), True where a weight is free.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0], **_INITIAL)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return (W ∘ mask) x + b."""
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def masked_perceptron(takes: Tensor, gives: Tensor, hidden: Sequence[int], columns: int) -> nn.Sequential:
    """A perceptron in which an output of column j depends only on inputs of earlier columns.

    Args:
        takes: the column of each input; −1 for a context, which every output may depend on.
        gives: the column of each output.
        hidden: widths; each unit belongs to a column, cyclically, and depends on no later one.
        columns: the number of columns.

    Source: Germain, Gregor, Murray & Larochelle (2015).
    """
    layers: list[nn.Module] = []
    before, has_context = takes, bool((takes < 0).any())
    for width in hidden:
        if columns == 1:  # units of the one column would lead to no output
            after = torch.full((width,), -1, dtype=torch.int64, device="cpu")
        else:
            unit = torch.arange(width, device="cpu")
            after = unit % columns - 1 if has_context else unit % (columns - 1)
        layers += [MaskedLinear(after[:, None] >= before), nn.SiLU()]
        before = after
    return nn.Sequential(*layers, MaskedLinear(gives[:, None] > before))
