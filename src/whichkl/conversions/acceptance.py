"""Acceptance: P(pass | x) by logistic regression, on features that cross-validation chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from whichkl.divergences.samples.logistic import fit_logistic, mean_with_error

_FOLDS = 5
_COSINES = 100
"""Number of cosines; a shape that no quadratic has is a sum of them."""
_MIN_ROWS_PER_FEATURE = 5
_MIN_GAIN = 2.0
"""Standard errors of the held-out log loss that richer features must gain."""

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Acceptance:
    """log P(pass | x) = log σ(β·φ(x)), φ the features of standardised columns."""

    label: str
    """The features in words."""
    features: Features
    center: Float[Tensor, " m"]
    scale: Float[Tensor, " m"]
    beta: Float[Tensor, " m+1"]
    loss: float
    """Log loss on unseen draws, in nats."""
    loss_without: float
    """The same of a constant probability."""

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log P(pass | x) at each row; it is at most 0, so that the density stays below the model's."""
        phi = (self.features(x) - self.center.to(x)) / self.scale.to(x)
        found: Tensor = logsigmoid(self.beta[0].to(x) + phi @ self.beta[1:].to(x))
        return found


def fit_acceptance(x: Float[Tensor, "n d"], passed: Bool[Tensor, " n"], seed: int) -> Acceptance:
    """Fit log P(pass | x) on the columns, on their squares and products too, or on cosines of them too.

    Richer features are taken where they lower the log loss of unseen rows by two standard errors. The ridge penalty is chosen on
    a third of the rows each time.

    Args:
        x: the draws.
        passed: whether each passed.
        seed: fixes the folds and the cosines.
    """
    generator = torch.Generator().manual_seed(seed)
    y, fold = passed.to(x.dtype), torch.randperm(len(x), generator=generator, device="cpu").to(x.device) % _FOLDS
    mean, sd = x.mean(0), x.std(0)
    sd = torch.where(sd > 0, sd, 1.0)
    chosen: tuple[str, Features, Tensor] | None = None
    for label, features in _candidates(mean, sd, len(x), generator):
        phi = _standard(features(x))[0]
        logit = torch.empty_like(y)
        for held in (fold == k for k in range(_FOLDS)):
            logit[held] = phi[held] @ fit_logistic(phi[~held], y[~held], generator)[0]
        loss = binary_cross_entropy_with_logits(logit, y, reduction="none")
        if chosen is not None:
            gain, error = mean_with_error(chosen[2] - loss)
            if not gain > _MIN_GAIN * error:
                continue
        chosen = label, features, loss
    if chosen is None:
        raise TypeError("no features")
    label, features, loss = chosen
    phi, center, scale = _standard(features(x))
    share = float(y.mean())
    without = -share * math.log(share) - (1 - share) * math.log(1 - share)
    return Acceptance(label, features, center, scale, fit_logistic(phi, y, generator)[0], float(loss.mean()), without)


def _standard(phi: Float[Tensor, "n m"]) -> tuple[Float[Tensor, "n m+1"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    center, scale = phi.mean(0), phi.std(0).clamp(min=1e-9)
    return torch.cat([torch.ones_like(phi[:, :1]), (phi - center) / scale], 1), center, scale


def _candidates(
    mean: Float[Tensor, " d"], sd: Float[Tensor, " d"], n: int, generator: torch.Generator
) -> list[tuple[str, Features]]:
    """The features from the simplest on, as far as there are rows for them."""
    d = len(mean)
    aim = torch.randn(d, _COSINES, generator=generator, dtype=torch.float64, device="cpu")
    length, phase = torch.rand(2, _COSINES, generator=generator, dtype=torch.float64, device="cpu")
    aim, phase = aim / aim.norm(dim=0) * 0.5 * 8**length, 2 * math.pi * phase

    def linear(x: Tensor) -> Tensor:
        return (x - mean.to(x)) / sd.to(x)

    def quadratic(x: Tensor) -> Tensor:
        z = linear(x)
        i, j = torch.triu_indices(d, d, device=x.device)
        return torch.cat([z, z[:, i] * z[:, j]], 1)

    def waves(x: Tensor) -> Tensor:
        return torch.cat([quadratic(x), torch.cos(linear(x) @ aim.to(x) + phase.to(x))], 1)

    products = d * (d + 3) // 2
    found: list[tuple[str, int, Features]] = [
        ("the columns", 0, linear),
        ("the columns and their products", products, quadratic),
        (f"the columns, their products and {_COSINES} cosines", products + _COSINES, waves),
    ]
    return [(label, features) for label, size, features in found if _MIN_ROWS_PER_FEATURE * size <= n]
