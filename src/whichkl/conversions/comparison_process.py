"""Comparison process: log p as a concave quadratic plus a Gaussian process that decays, fitted to comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

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
"""The scales are found to 5 %, or to a tenth of a nat over all answers."""
_USUAL_LENGTH, _SCALE_WIDTH = 0.7, 0.7
"""The usual ℓ per √d, next to s = 1; and the standard deviation of log ℓ and log s in their prior, a factor of two."""
_LENGTHS, _SIZES = (0.05, 30.0), (1e-3, 100.0)
"""Ranges of the scales; beyond them, the process is noise or a part of the trend."""


@dataclass(frozen=True)
class Process:
    """f(z) = b·z − ½ zᵀAz + Σⱼ vⱼ k(z, cⱼ), A ≻ 0, k(z, c) = exp(−‖z − c‖² / 2ℓ²).

    Far from the centers c the sum vanishes and the quadratic is left, so that exp f has a finite integral.
    """

    centers: Float[Tensor, "m d"]
    length: float
    slope: Float[Tensor, " d"]
    bend: Float[Tensor, " t"]
    """The upper triangle of A."""
    weights: Float[Tensor, " m"]

    def log_prob(self, z: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return f, the log density of z up to a constant."""
        quadratic = z @ self.slope - quadratic_features(z) @ self.bend / 2
        value: Tensor = quadratic + _kernel(z, self.centers, self.length) @ self.weights
        return value


@dataclass(frozen=True)
class _Basis:
    """Features of which f is a linear function with weights of variance 1: φ(z) = s L⁻¹ k(z, centers), LLᵀ = k(centers, centers).

    The sum of weight × feature is a Gaussian process of size s, conditioned on its values at the centers.
    """

    centers: Float[Tensor, "m d"]
    length: float
    size: float

    @cached_property
    def root(self) -> Float[Tensor, "m m"]:
        """L."""
        kernel = _kernel(self.centers, self.centers, self.length)
        kernel.diagonal().add_(_JITTER)
        root: Tensor = torch.linalg.cholesky(kernel)
        return root

    def contrasts(self, pairs: Pairs) -> Float[Tensor, "n p"]:
        """Return z, −½ `quadratic_features` and φ of each winner minus those of its loser."""
        kernel = _kernel(pairs.points, self.centers, self.length)
        residual = self.size * torch.linalg.solve_triangular(self.root, kernel.T, upper=False).T
        won, lost = torch.cat([pairs.points, -quadratic_features(pairs.points) / 2, residual], 1).chunk(2)
        return won - lost

    def process(self, theta: Float[Tensor, " p"]) -> Process:
        """Return f for the weights of all features."""
        d, m = self.centers.shape[1], len(self.centers)
        slope, bend, w = theta.split([d, len(theta) - d - m, m])
        weights = self.size * torch.linalg.solve_triangular(self.root.T, w[:, None], upper=True)[:, 0]
        return Process(self.centers, self.length, slope, bend, weights)


def _kernel(z: Float[Tensor, "n d"], centers: Float[Tensor, "m d"], length: float) -> Float[Tensor, "n m"]:
    squared = z.square().sum(1)[:, None] + centers.square().sum(1) - 2 * z @ centers.T
    kernel: Tensor = torch.exp(-squared.clamp(min=0) / (2 * length**2))
    return kernel


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
    def of(cls, basis: _Basis, pairs: Pairs) -> _Posterior:
        """Return the objective on these comparisons."""
        x, d = basis.contrasts(pairs), pairs.dim
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

    def minimum(self, theta: Float[Tensor, " p"]) -> tuple[Float[Tensor, " p"], Float[Tensor, "p p"]]:
        """Return the minimum, from θ on by damped Newton, and the Cholesky factor of the Hessian there."""
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
        return theta, factor

    def unseen_loss(self, theta: Float[Tensor, " p"], factor: Float[Tensor, "p p"]) -> float:
        """Return the sum of the losses of all answers, each by a fit without it: one step of Newton's method from the minimum.

        Source: Rad & Maleki (2020), equation 7.
        """
        margin, x = self.margin(theta), self.contrasts / self.noise
        missed = torch.sigmoid(-margin)
        reach = torch.linalg.solve_triangular(factor, x.T, upper=False).square().sum(0)
        return float(comparison_loss(margin - reach * missed / (1 - reach * missed * (1 - missed))).sum())


def fit_process(pairs: Pairs, count: int) -> tuple[Process, Float[Tensor, " n"]]:
    """Return the fitted process, and the loss of each answer by a fit without its fold.

    The scales ℓ and s have the least loss on answers left out one by one. (By Laplace's evidence they grow without end where the
    answers can be separated.) The centers are winners, since log p needs detail where p has mass.

    Args:
        pairs: the comparisons, in random order.
        count: how many centers.

    Source: Chu & Ghahramani (2005) for the process; they choose the scales by the evidence, and have no trend.
    """
    centers = torch.unique(pairs.winners[:count], dim=0)
    few = pairs.take(torch.arange(min(len(pairs), _MAX_PAIRS_FOR_SCALES), device=centers.device))

    usual = np.array([math.log(_USUAL_LENGTH * math.sqrt(pairs.dim)), 0.0])

    def loss_of(scales: np.ndarray) -> float:
        length, size = np.exp(scales)
        if not (_LENGTHS[0] < length < _LENGTHS[1] and _SIZES[0] < size < _SIZES[1]):
            return math.inf
        objective = _Posterior.of(_Basis(centers, length, size), few)
        prior = float(np.square(scales - usual).sum()) / (2 * _SCALE_WIDTH**2)
        return objective.unseen_loss(*objective.minimum(objective.start)) + prior

    simplex = np.array([usual, usual - [0.7, 0.0], usual + [0.0, 1.0]])
    found = scipy.optimize.minimize(loss_of, usual, method="Nelder-Mead", options={**_SEARCH, "initial_simplex": simplex})
    basis = _Basis(centers, *(float(scale) for scale in np.exp(found.x)))
    objective = _Posterior.of(basis, pairs)
    theta, _ = objective.minimum(objective.start)
    loss = torch.empty_like(pairs.offset)
    for k in range(FOLDS):
        held = pairs.fold == k
        without, _ = objective.only(~held).minimum(theta)
        loss[held] = comparison_loss(objective.only(held).margin(without))
    return basis.process(theta), loss
