"""Result: weighted particles on independent islands, and means under p, with errors from the islands' differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.importance import effective_sample_size


@dataclass(frozen=True)
class Particles:
    """Points x with weights W, so that Σ W f(x) ≈ E_p f, in the free coordinates of the target."""

    x: Float[Tensor, "n d"]
    log_weights: Float[Tensor, " n"]
    """Natural logs of the weights; their sum is 1."""
    islands: int
    """The number of groups of n / islands neighbouring rows that never mixed."""
    log_z: float
    """log ∫ p̃, in nats; Z is unbiased up to the choice of temperatures and steps from the particles."""
    log_z_stderr: float
    """From the islands' differences; infinite where one island found nearly all."""
    temperatures: tuple[float, ...]
    """The inverse temperatures, from 0 on; the last is 1 where it finished."""
    gradients: int
    """Points at which log p and its gradient were evaluated."""
    calls: int
    """Batched calls of the target."""
    acceptance: float
    """Mean chance that a move was accepted, over the last trajectory."""
    drift: float | None = None
    """The change of the means of x, x² and log p when the last moves were doubled, as a share of what chance allows; above 1 the
    particles hadn't settled. None unless requested."""
    before: Float[Tensor, "n d"] | None = None
    """The points before the last moves were doubled, if that was requested."""

    @property
    def finished(self) -> bool:
        """Whether the temperature of p was reached before the calls were used up."""
        return self.temperatures[-1] == 1.0

    @property
    def ess(self) -> float:
        """Effective number of particles by their weights; copies of one ancestor count as different."""
        return effective_sample_size(self.log_weights)

    @property
    def log_z_islands(self) -> Float[Tensor, " g"]:
        """Log Z by each island alone."""
        return self.log_weights.view(self.islands, -1).logsumexp(1) + math.log(self.islands) + self.log_z

    def mean(self, f: Float[Tensor, "n k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Return Σ W f, f a function's value at every particle, and its standard error, from the islands' differences.

        Each island is weighted by its Z.
        """
        return island_mean(self.log_weights, self.islands, f)

    def draws(self, n: int, seed: int = 0) -> Float[Tensor, "n d"]:
        """Draw n of the particles by their weights, in random order; particles can repeat."""
        generator = torch.Generator().manual_seed(seed)
        shift = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
        at = (torch.arange(n, dtype=torch.float64, device="cpu") + shift) / n
        cumulative = self.log_weights.exp().cumsum(0)
        chosen = torch.searchsorted(cumulative / cumulative[-1], at).clamp(max=len(cumulative) - 1)
        return self.x[chosen[torch.randperm(n, generator=generator, device="cpu")]]


def island_mean(
    log_weights: Float[Tensor, " n"], islands: int, f: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return Σ W f and its standard error, that of a ratio of sums over independent islands of neighbouring rows; Σ W = 1."""
    w = log_weights.exp()[:, None]
    value = (w * f).sum(0)
    parts = (w * (f - value)).view(islands, -1, f.shape[1]).sum(1)
    return value, (parts.square().sum(0) * (islands / (islands - 1))).sqrt()
