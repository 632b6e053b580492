"""Flat weights: the trainable weights of a module as one vector, so that several sets of them are the rows of a matrix."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap


class Flat:
    """A module's trainable weights as one vector.

    Args:
        module: its parameters with `requires_grad` are trainable.

    >>> flat = Flat(nn.Linear(2, 1))
    >>> flat.read().shape, list(flat.named(torch.zeros(3)))
    (torch.Size([3]), ['weight', 'bias'])
    """

    def __init__(self, module: nn.Module) -> None:
        """Note the parameters; see the class."""
        self.module = module
        self.free = {name: one for name, one in module.named_parameters() if one.requires_grad}

    def read(self) -> Float[Tensor, " p"]:
        """Copy the weights into a vector."""
        return torch.cat([one.detach().reshape(-1) for one in self.free.values()])

    def named(self, row: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """Return views of a vector under the weights' names, in their dtype."""
        parts = row.split([one.numel() for one in self.free.values()])
        return {name: part.view(one.shape).to(one.dtype) for (name, one), part in zip(self.free.items(), parts, strict=True)}

    def write(self, row: Float[Tensor, " p"]) -> None:
        """Copy a vector into the weights."""
        with torch.no_grad():
            for name, value in self.named(row).items():
                self.free[name].copy_(value)

    def call_each(self, theta: Float[Tensor, "s p"], given: Float[Tensor, "s ..."]) -> Any:
        """Call the module with each row of weights and its own argument, as one batch."""

        def call(row: Tensor, argument: Tensor) -> Any:
            return functional_call(self.module, self.named(row), (argument,))

        return vmap(call)(theta, given)
