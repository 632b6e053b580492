"""Comparison pairs: winners and losers in standardised free coordinates, and what both models of log p need of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

SCALE_PENALTY = 0.05
"""Rate in the prior of a precision, √det Λ exp(−rate tr Λ / 2): the usual width is a fourth of the points' spread."""
FOLDS = 5


@dataclass(frozen=True)
class Pairs:
    """n comparisons of points z = (u − m) / s, where u are free coordinates, m and s the points' mean and spread.

    P(winner ≻ loser) = σ(margin), margin = (f(winner) − f(loser) + offset) / noise for a log density f of z. The offset turns
    the difference of f into that of log p at x = T(u): it is log|∂x/∂u| at the loser minus that at the winner.
    """

    winners: Float[Tensor, "n d"]
    losers: Float[Tensor, "n d"]
    offset: Float[Tensor, " n"]
    noise: float

    def __len__(self) -> int:
        return len(self.winners)

    @property
    def dim(self) -> int:
        """d, the number of free coordinates."""
        return self.winners.shape[1]

    @property
    def points(self) -> Float[Tensor, "2n d"]:
        """All points, the winners first."""
        return torch.cat([self.winners, self.losers])

    def take(self, rows: Int[Tensor, " m"]) -> Pairs:
        """Return some of the comparisons."""
        return replace(self, winners=self.winners[rows], losers=self.losers[rows], offset=self.offset[rows])

    def shuffled(self, generator: torch.Generator) -> Pairs:
        """Return the comparisons in random order."""
        return self.take(torch.randperm(len(self), generator=generator, device="cpu").to(self.winners.device))

    def margin(self, values: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Return the log odds of each answer, from a log density at the 2n `points`."""
        won, lost = values.unflatten(-1, (2, -1)).unbind(-2)
        margin: Tensor = (won - lost + self.offset) / self.noise
        return margin

    @property
    def fold(self) -> Int[Tensor, " n"]:
        """The fold of cross-validation that holds each comparison out; `shuffled` comparisons have random folds."""
        return torch.arange(len(self), device=self.winners.device) % FOLDS


def comparison_loss(margin: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """Return −log P of each answer, in nats."""
    loss: Tensor = softplus(-margin)
    return loss


def triangle(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the entries on and above the diagonal, row after row."""
    i, j = torch.triu_indices(dim, dim, device=device)
    return i, j


def quadratic_features(z: Float[Tensor, "n d"]) -> Float[Tensor, "n t"]:
    """Return zᵢ² and 2 zᵢ zⱼ, so that zᵀ A z is their product with the upper triangle of A."""
    i, j = triangle(z.shape[1], z.device)
    return z[:, i] * z[:, j] * (2 - (i == j).to(z))
