"""Hamiltonian moves of many particles at once: each call of the target moves all of them by one leapfrog step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Density = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x, (n, d), ↦ (log p, ∇ log p), −∞ and 0 where they aren't numbers."""


@dataclass(frozen=True)
class Cloud:
    """Points y in coordinates where the base is N(0, I), with log p and its gradient there."""

    y: Float[Tensor, "n d"]
    value: Float[Tensor, " n"]
    gradient: Float[Tensor, "n d"]

    def take(self, index: Tensor) -> Cloud:
        """Return some of the points, in this order."""
        return Cloud(self.y[index], self.value[index], self.gradient[index])

    def spread(self) -> Float[Tensor, "d d"]:
        """Return a lower-triangular scale of the points: of the full covariance if there are five points per axis."""
        n, d = self.y.shape
        centred = self.y - self.y.mean(0)
        variance = centred.square().mean(0).clamp(min=1e-300)
        # Fewer points give a covariance that is nearly singular in some direction, where moves would stand still.
        if n >= 5 * d:
            covariance = centred.T @ centred / n
            factor: Tensor
            factor, failed = torch.linalg.cholesky_ex(covariance + 1e-9 * torch.diag(variance))
            if int(failed) == 0:
                return factor
        return torch.diag(variance.sqrt())


def move(
    cloud: Cloud, density: Density, inverse_temperature: float, step: float, leapfrogs: int, generator: torch.Generator
) -> tuple[Cloud, float]:
    """Move every point by one Hamiltonian trajectory that leaves base^(1−β) p^β invariant; return them and the acceptance rate.

    The mass matrix is the inverse covariance of the points. Each point has its own step, `step` times a number between 0.15 and
    1.5 (log-uniform), so no trajectory is periodic for all points, and points also enter narrow places.

    `density` is that of p in the cloud's coordinates; each leapfrog step is one batched call of it, and `step` is in standard
    deviations of the cloud.

    Source: Duane et al. (1987); Neal (2011).
    """
    beta, factor = inverse_temperature, cloud.spread()
    n = len(cloud.y)

    def slope(at: Cloud) -> Tensor:
        return (beta * at.gradient - (1 - beta) * at.y) @ factor

    def energy(at: Cloud, momentum: Tensor) -> Tensor:
        return beta * at.value - (1 - beta) * at.y.square().sum(-1) / 2 - momentum.square().sum(-1) / 2

    momentum = torch.randn(cloud.y.shape, generator=generator, dtype=torch.float64, device="cpu")
    # Every point its own step: a common one resonates with a Gaussian's period, where moves return to their start.
    length = step * 1.5 * 10 ** -torch.rand(n, 1, generator=generator, dtype=torch.float64, device="cpu")
    before, now = energy(cloud, momentum), cloud
    momentum = momentum + length / 2 * slope(now)
    for i in range(leapfrogs):
        y = now.y + length * momentum @ factor.T
        now = Cloud(y, *density(y))
        momentum = momentum + length * (1.0 if i + 1 < leapfrogs else 0.5) * slope(now)
    # `energy` is minus the Hamiltonian, so that a rise is always accepted.
    change = energy(now, momentum) - before
    chance = torch.where(now.value > -math.inf, change.nan_to_num(nan=-math.inf, posinf=0.0), -math.inf).clamp(max=0).exp()
    better = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") < chance
    moved = Cloud(
        torch.where(better[:, None], now.y, cloud.y),
        torch.where(better, now.value, cloud.value),
        torch.where(better[:, None], now.gradient, cloud.gradient),
    )
    return moved, float(chance.mean())
