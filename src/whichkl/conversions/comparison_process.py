"""Comparison process: log p as a concave quadratic plus a Gaussian process that decays, fitted to comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.conversions.comparison_pairs import (
    FOLDS,
    SCALE_PENALTY,
    Pairs,
    comparison_loss,
    quadratic_features,
    triangle,
)

CENTERS = 200
"""Default number of points that carry the process; 500 didn't lower any error in two and in five dimensions."""
_SLOPE_WIDTH = 10.0
"""Standard deviation of the trend's slopes in their prior, per spread of the points."""
_JITTER = 1e-6
"""Share of noise that keeps the covariance of close centers regular."""
_MAX_STEPS = 100
_MIN_DECREMENT = 1e-9
"""Newton's decrement, in nats, at which a fit has arrived."""
_MAX_PAIRS_FOR_SCALES = 3_000
"""Largest number of comparisons by which the two scales are chosen; more hardly change them."""
_SEARCH = {"xatol": 0.05, "fatol": 0.1, "maxfev": 40}
"""The scales are found to 5 %, or to a tenth of a nat of evidence."""
_LENGTHS, _SIZES = (0.05, 30.0), (1e-3, 100.0)
"""Ranges of the scales: beyond them, the process is noise or a part of the trend."""


@dataclass(frozen=True)
class Process:
    """f(z) = b·z − ½ zᵀAz + Σⱼ wⱼ φⱼ(z), A ≻ 0, where φ(z) = s L⁻¹ k(z, centers), LLᵀ = k(centers, centers), w ~ N(0, I).

    k(z, z′) = exp(−‖z − z′‖² / 2ℓ²), so that the sum is a Gaussian process of size s near the centers, and vanishes far from
    them. There the quadratic is left: exp f has a finite integral.
    """

    centers: Float[Tensor, "m d"]
    root: Float[Tensor, "m m"]
    length: float
    size: float
    theta: Float[Tensor, " p"] | None = None
    """b, the upper triangle of A, and w."""

    @classmethod
    def at(cls, centers: Float[Tensor, "m d"], length: float, size: float) -> Process:
        """Return the process with these scales, which isn't fitted yet."""
        kernel = torch.exp(-torch.cdist(centers, centers).square() / (2 * length**2))
        kernel.diagonal().add_(_JITTER)
        return cls(centers, torch.linalg.cholesky(kernel), length, size)

    def features(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
        """Return the features of which f is a linear function."""
        squared = z.square().sum(1)[:, None] + self.centers.square().sum(1) - 2 * z @ self.centers.T
        kernel = torch.exp(-squared.clamp(min=0) / (2 * self.length**2))
        residual = self.size * torch.linalg.solve_triangular(self.root, kernel.T, upper=False).T
        return torch.cat([z, -quadratic_features(z) / 2, residual], 1)

    def contrasts(self, pairs: Pairs) -> Float[Tensor, "n p"]:
        """Return the features of each winner minus those of its loser."""
        won, lost = self.features(pairs.points).chunk(2)
        return won - lost

    def log_prob(self, z: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return f, the log density of z up to a constant."""
        if self.theta is None:
            raise RuntimeError("this process isn't fitted")
        return self.features(z) @ self.theta


@dataclass(frozen=True)
class _Posterior:
    """The objective of θ, to be minimised: the loss of all answers minus the log prior, up to a constant.

    The prior of A is √det A exp(−rate tr A / 2): its logarithm is concave, and keeps A positive definite.
    """

    contrasts: Float[Tensor, "n p"]
    offset: Float[Tensor, " n"]
    noise: float
    spread: Float[Tensor, "s t"]
    """From the upper triangle of A to all its entries."""
    ridge: Float[Tensor, " p"]
    rate: Float[Tensor, " p"]
    start: Float[Tensor, " p"]
    """θ of N(0, I)."""

    @classmethod
    def of(cls, process: Process, pairs: Pairs) -> _Posterior:
        """Return the objective of a process on these comparisons."""
        x, d = process.contrasts(pairs), pairs.dim
        i, j = triangle(d, x.device)
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        upper = torch.einsum("rk,ck->rck", eye[:, i], eye[:, j])
        trend, is_diagonal = slice(d, d + len(i)), (i == j).to(x)
        ridge, rate, start = torch.ones_like(x[0]), torch.zeros_like(x[0]), torch.zeros_like(x[0])
        ridge[:d], ridge[trend] = _SLOPE_WIDTH**-2, 0.0
        rate[trend], start[trend] = SCALE_PENALTY / 2 * is_diagonal, is_diagonal
        return cls(x, pairs.offset, pairs.noise, upper.maximum(upper.transpose(0, 1)).flatten(0, 1), ridge, rate, start)

    def only(self, rows: Tensor) -> _Posterior:
        """Return the objective on some of the comparisons."""
        return replace(self, contrasts=self.contrasts[rows], offset=self.offset[rows])

    def margin(self, theta: Tensor) -> Float[Tensor, " n"]:
        """Return the log odds of each answer."""
        return (self.contrasts @ theta + self.offset) / self.noise

    def value(self, theta: Tensor, margin: Tensor) -> tuple[float, Tensor]:
        """Return the objective, ∞ where A isn't positive definite, and the Cholesky factor of A."""
        d = math.isqrt(len(self.spread))
        root, wrong = torch.linalg.cholesky_ex((self.spread @ theta[self.trend]).view(d, d))
        if int(wrong):
            return math.inf, root
        loss = comparison_loss(margin).sum() + (self.ridge * theta).dot(theta) / 2 + self.rate.dot(theta)
        return float(loss - root.diagonal().log().sum()), root

    @property
    def trend(self) -> slice:
        """Where the triangle of A is in θ."""
        d = math.isqrt(len(self.spread))
        return slice(d, d + self.spread.shape[1])

    def minimum(self, theta: Float[Tensor, " p"]) -> tuple[Float[Tensor, " p"], float]:
        """Return the minimum, from θ on by damped Newton, and minus the log evidence by Laplace's method, up to a constant."""
        x, trend, margin = self.contrasts, self.trend, self.margin(theta)
        least, root = self.value(theta, margin)
        for _ in range(_MAX_STEPS):
            missed, inverse = torch.sigmoid(-margin), torch.cholesky_inverse(root)
            gradient = self.ridge * theta + self.rate - x.T @ missed / self.noise
            gradient[trend] -= self.spread.T @ inverse.flatten() / 2
            hessian = (x * (missed * (1 - missed))[:, None]).T @ x / self.noise**2 + torch.diag(self.ridge)
            hessian[trend, trend] += self.spread.T @ torch.kron(inverse, inverse) @ self.spread / 2
            factor = torch.linalg.cholesky(hessian)
            step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
            decrement, along = float(gradient @ step) / 2, x @ step / self.noise
            if decrement < _MIN_DECREMENT:
                break
            for size in (0.5**k for k in range(40)):
                moved, margin_there = theta - size * step, margin - size * along
                lower, root_there = self.value(moved, margin_there)
                if lower < least - 1e-4 * size * decrement:
                    theta, margin, least, root = moved, margin_there, lower, root_there
                    break
            else:
                break  # rounding hides the rest
        return theta, least + float(factor.diagonal().log().sum())


def fit_process(pairs: Pairs, count: int) -> tuple[Process, Float[Tensor, " n"]]:
    """Return the fitted process, and the loss of each answer by a fit without its fold.

    The scales ℓ and s have the highest evidence. The centers are winners, since log p needs detail where p has mass.

    Args:
        pairs: the comparisons, in random order.
        count: how many centers.

    Source: Chu & Ghahramani (2005), whose prior is the process alone.
    """
    centers = torch.unique(pairs.winners[:count], dim=0)
    few = pairs.take(torch.arange(min(len(pairs), _MAX_PAIRS_FOR_SCALES), device=centers.device))

    def surprise(scales: np.ndarray) -> float:
        length, size = np.exp(scales)
        if not (_LENGTHS[0] < length < _LENGTHS[1] and _SIZES[0] < size < _SIZES[1]):
            return math.inf
        objective = _Posterior.of(Process.at(centers, length, size), few)
        return objective.minimum(objective.start)[1]

    start = np.array([math.log(0.7 * math.sqrt(pairs.dim)), 0.5])
    simplex = np.array([start, start - [0.7, 0.0], start + [0.0, 1.0]])
    found = scipy.optimize.minimize(surprise, start, method="Nelder-Mead", options={**_SEARCH, "initial_simplex": simplex})
    process = Process.at(centers, *(float(scale) for scale in np.exp(found.x)))
    objective = _Posterior.of(process, pairs)
    theta, _ = objective.minimum(objective.start)
    loss = torch.empty_like(pairs.offset)
    for k in range(FOLDS):
        held = pairs.fold == k
        without, _ = objective.only(~held).minimum(theta)
        loss[held] = comparison_loss(objective.only(held).margin(without))
    return replace(process, theta=theta), loss
