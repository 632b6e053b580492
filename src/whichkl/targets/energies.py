"""Energies: an energy E(x) as a log density −E(x), up to the log of its partition function."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from whichkl._checks import InputError, cannot


class NegativeEnergy:
    """x ↦ −E(x), so that p(x) = exp(−E(x)) / Z. A module is copied, frozen and called in its own dtype.

    Args:
        energy: E, (n, d) → (n,), a function or an `nn.Module`; a module may return (n, 1).

    Raises:
        InputError: it can't be called, or the module can't be copied.

    Source: LeCun, Chopra, Hadsell, Ranzato & Huang (2006), "A tutorial on energy-based learning".

    >>> import torch
    >>> NegativeEnergy(nn.Linear(2, 1, bias=False).requires_grad_(False))(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(self, energy: Any) -> None:
        """Copy and freeze the energy if it is a module."""
        if not callable(energy):
            because = f"it is a `{type(energy).__name__}`"
            raise InputError(cannot("use `energy=`", because, "Pass a function, or a module, of (n, d) points"))
        if isinstance(energy, nn.Module):
            try:
                energy = copy.deepcopy(energy)
            except (RuntimeError, TypeError) as error:
                because = f"the module can't be copied ({' '.join(str(error).split())[:200]})"
                raise InputError(
                    cannot("use `energy=`", because, "Compute what it derives from its weights in `forward`")
                ) from error
            energy.eval().requires_grad_(False)
        self.energy = energy

    def __call__(self, x: Tensor) -> Any:
        """Return −E of each row, in the dtype of x."""
        if not isinstance(self.energy, nn.Module):
            return -self.energy(x)
        every = (*self.energy.parameters(), *self.energy.buffers())
        weight = next((one for one in every if one.is_floating_point()), x)
        value = -self.energy(x.to(weight)).to(x)
        return value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value
