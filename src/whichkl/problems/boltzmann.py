"""Boltzmann machines: discrete energies with many modes, whose partition function is known by enumeration."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl._checks import InputError, as_int, cannot, check_seed
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target
from whichkl.targets.supports import list_states

_MAX_SUMMED_UNITS = 20
"""Largest number of units of the smaller layer for a sum over its states."""
_BIAS_SCALE = 0.3


class RestrictedBoltzmann(nn.Module):
    """Free energy F(v) = −b·v − Σⱼ softplus(cⱼ + (vW)ⱼ) of visible units v ∈ {0, 1}ᵈ; the hidden ones are summed out.

    Args:
        visible: d.
        hidden: number of hidden units; with 0 of them, or with `coupling=0`, the visible units are independent.
        seed: for W ~ coupling · N(0, 1) / √d and b + W 1 / 2 ~ 0.3 · N(0, 1), and likewise c, so that no corner is preferred.
        coupling: the scale of W; a larger one makes more modes.

    Raises:
        InputError: a number of units isn't a whole number of at least 1 (hidden: 0).

    Source: Smolensky (1986); Hinton (2002).

    >>> machine = RestrictedBoltzmann(4, 2, coupling=0.0)
    >>> v = torch.zeros(1, 4, dtype=torch.float64)
    >>> bool(machine(v) == -nn.functional.softplus(machine.hidden_bias).sum())
    True
    """

    def __init__(self, visible: int, hidden: int, seed: int = 0, coupling: float = 4.0) -> None:
        """Draw the weights."""
        super().__init__()
        visible, hidden, seed = as_int(visible), as_int(hidden), check_seed(seed)
        for name, value, least in (("visible", visible, 1), ("hidden", hidden, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                because = f"it isn't a whole number of at least {least}"
                raise InputError(cannot(f"make a Boltzmann machine with `{name}={value!r}`", because, f"Give, say, {name}=8"))
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu")

        weight = coupling * normal(visible, hidden) / math.sqrt(visible)
        self.weight = nn.Parameter(weight)
        self.visible_bias = nn.Parameter(_BIAS_SCALE * normal(visible) - weight.sum(1) / 2)
        self.hidden_bias = nn.Parameter(_BIAS_SCALE * normal(hidden) - weight.sum(0) / 2)

    def forward(self, v: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return F(v) of each row, in nats."""
        return -(v @ self.visible_bias) - nn.functional.softplus(self.hidden_bias + v @ self.weight).sum(-1)

    @cached_property
    def log_z(self) -> float:
        """Log Σ exp(−F(v)), by listing the states of the smaller layer.

        Raises:
            InputError: both layers have more than 20 units.
        """
        weight, mine, other = self.weight.detach(), self.hidden_bias.detach(), self.visible_bias.detach()
        if len(other) < len(mine):
            weight, mine, other = weight.T, other, mine
        if len(mine) > _MAX_SUMMED_UNITS:
            because = f"its smaller layer has {len(mine)} units, and 2^{len(mine)} states"
            raise InputError(cannot("sum up this Boltzmann machine", because, f"Have at most {_MAX_SUMMED_UNITS} in one layer"))
        if len(mine) == 0:
            return float(nn.functional.softplus(other).sum())
        states = list_states([(0, 1)] * len(mine)).split(1 << 14)
        sums = [h @ mine + nn.functional.softplus(other + h @ weight.T).sum(-1) for h in states]
        return float(torch.logsumexp(torch.cat(sums), 0))


@plain_modes()
def restricted_boltzmann(visible: int = 12, hidden: int = 6, seed: int = 0, coupling: float = 4.0) -> Target:
    """Return the visible units of a `RestrictedBoltzmann` as a discrete target, unnormalised; that class knows log Z.

    Args:
        visible: d.
        hidden: number of hidden units.
        seed: for the weights.
        coupling: scale of the weights.

    Raises:
        InputError: as in `RestrictedBoltzmann`.

    >>> restricted_boltzmann(4, 2)
    Target(dim=4, access: log_prob, enumerable)
    """
    return Target(energy=RestrictedBoltzmann(visible, hidden, seed, coupling), dim=visible, support="boolean")
