"""Layers: the parts of which this library's networks are made; data come in and go out in their own scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl._checks import InputError, cannot
from whichkl.families.data_shape import Shape, Summary

_MADE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""How layers are made, whatever torch's defaults are; a network is carried to its own dtype and device afterwards."""


class Standardised(nn.Module):
    """A module that knows the scale of its data: buffers `mean` and `scale` of y, `context_mean` and `context_scale` of x.

    Args:
        shape: the shape of the data.
    """

    mean: Tensor
    scale: Tensor
    context_mean: Tensor
    context_scale: Tensor

    def __init__(self, shape: Shape) -> None:
        """Start with means of 0 and scales of 1."""
        super().__init__()
        self.dim, self.context, self.is_scalar = shape.dim, shape.context, shape.scalar
        self.register_buffer("mean", torch.zeros(shape.dim, dtype=torch.float32, device="cpu"))
        self.register_buffer("scale", torch.ones(shape.dim, dtype=torch.float32, device="cpu"))
        self.register_buffer("context_mean", torch.zeros(shape.context, dtype=torch.float32, device="cpu"))
        self.register_buffer("context_scale", torch.ones(shape.context, dtype=torch.float32, device="cpu"))

    def settle(self, summary: Summary) -> None:
        """Take the means and scales of the data; a constant column keeps its scale of 1."""
        for name in ("mean", "scale", "context_mean", "context_scale"):
            value: Tensor = getattr(summary, name)
            getattr(self, name).copy_(torch.where(value > 0, value, torch.ones_like(value)) if "scale" in name else value)

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
        layers += [nn.Linear(before, after, **_MADE), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs, **_MADE))


class MaskedLinear(nn.Linear):
    """A linear layer some of whose weights are held at 0.

    Args:
        mask: (outputs, inputs), True where a weight is free.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        """Make the layer; the mask is kept with the weights."""
        super().__init__(mask.shape[1], mask.shape[0], **_MADE)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return (W ∘ mask) x + b."""
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def masked_perceptron(takes: Tensor, gives: Tensor, hidden: Sequence[int], columns: int) -> nn.Sequential:
    """A perceptron in which an output of column j depends on inputs of columns before j alone.

    Args:
        takes: the column of each input; −1 for a context, which every output may depend on.
        gives: the column of each output.
        hidden: widths; each unit is given a column, cyclically, and sees no later ones.
        columns: how many there are.

    Source: Germain, Gregor, Murray & Larochelle (2015).
    """
    layers: list[nn.Module] = []
    before = takes
    for width in hidden:
        after = (
            torch.arange(width, device="cpu") % max(1, columns - 1)
            if columns > 1
            else torch.full((width,), -1, dtype=torch.int64, device="cpu")
        )
        if bool((takes < 0).any()) and columns > 1:
            after = torch.arange(width, device="cpu") % columns - 1
        layers += [MaskedLinear(after[:, None] >= before), nn.SiLU()]
        before = after
    return nn.Sequential(*layers, MaskedLinear(gives[:, None] > before))


def check_widths(name: str, hidden: Any, *, empty: bool = True) -> tuple[int, ...]:
    """Return the widths of hidden layers as a tuple, as JSON doesn't know those.

    Raises:
        InputError: they aren't whole numbers of at least 1.
    """
    widths = tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,)
    good = all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in widths)
    if not good or (not widths and not empty):
        because = f"`hidden={hidden!r}` isn't the widths of layers"
        raise InputError(cannot(f"use `{name}`", because, "Give, say, hidden=(64, 64)"))
    return widths


def check_count(name: str, field: str, value: Any) -> None:
    """Refuse what isn't a whole number of at least 1.

    Raises:
        InputError: as said.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        because = f"`{field}={value!r}` isn't a whole number of at least 1"
        raise InputError(cannot(f"use `{name}`", because, f"Give, say, {field}=4"))
