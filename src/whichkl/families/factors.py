"""Factors: maximum-likelihood factor analysis, the covariance WWᵀ + D of the greatest likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot

_MIN_OWN_SHARE = 1e-6
"""Least share of a column's variance that is its own, of the variance that the other columns leave unexplained; Heywood cases,
where the likelihood has its supremum at 0, end there."""
_MIN_OWN_VARIANCE = 1e-13
"""Least variance of a standardised column that is its own; rounding decides below it."""
_MIN_UNEXPLAINED = 1e-12
"""Least share of a column's variance that counts as left unexplained by the others; below it rounding decides."""

_ROUNDING = 1e-6
"""Nats per row by which rounding can raise the value where columns nearly agree."""
_MAX_SCORING_STEPS = 50
"""Largest number of steps after L-BFGS; each reduces the gradient about tenfold."""


def maximum_likelihood_factors(
    covariance: Float[Tensor, "d d"], rank: int, names: Sequence[str]
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " d"]]:
    """Return W and diag D that minimise log|Σ| + tr(Σ⁻¹S) over Σ = WWᵀ + D; WᵀD⁻¹W is diagonal, the first factor the strongest.

    For given D the best W follows from the eigenvectors of D^(−½) S D^(−½), which leaves a function of log D. L-BFGS minimises
    it from three starts, on the scale of correlations; scoring steps follow from the best end.

    Args:
        covariance: S.
        rank: k < d, the columns of W.
        names: the columns' names, for messages.

    Raises:
        InputError: the likelihood is unbounded, since some columns determine each other.

    Source: Jöreskog (1967); Robertson & Symons (2007) for when it is bounded.
    """
    sd = covariance.diagonal().sqrt()
    correlation = (covariance / torch.outer(sd, sd)).cpu().numpy()
    floor = np.log(np.maximum(_MIN_OWN_SHARE * _unexplained(correlation), _MIN_OWN_VARIANCE))
    bounds = [(low, 0.0) for low in floor]
    options = {"maxiter": 5_000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}
    ends = [
        scipy.optimize.minimize(
            _profile, np.log(start), args=(correlation, rank), jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        for start in _starts(correlation, rank)
    ]
    best = _polished(min(ends, key=lambda end: float(end.fun)).x, correlation, rank, floor)
    nothing_own = np.flatnonzero(best <= floor + np.log(2))
    if len(nothing_own) > rank:
        which = ", ".join(f"`{names[i]}`" for i in nothing_own.tolist())
        because = f"{rank} factors explain the columns {which} exactly, so the density is unbounded"
        raise InputError(cannot("fit a low-rank Gaussian", because, "Drop one of them, give more rows, or lower the rank"))
    own = np.exp(best)
    theta, vectors = np.linalg.eigh(correlation / np.sqrt(np.outer(own, own)))
    loadings = np.sqrt(own)[:, None] * vectors[:, -rank:] * np.sqrt(np.maximum(theta[-rank:] - 1, 0))
    loadings *= np.sign(np.take_along_axis(loadings, np.abs(loadings).argmax(0)[None], 0))  # the sign of a factor is free
    return sd[:, None] * torch.from_numpy(loadings[:, ::-1].copy()).to(sd), sd.square() * torch.from_numpy(own).to(sd)


def _profile(log_own: np.ndarray, correlation: np.ndarray, rank: int) -> tuple[float, np.ndarray]:
    """Return log|Σ| + tr(Σ⁻¹R) at the best W for this D, and its gradient in log D: (Σ − R)ᵢᵢ / Dᵢᵢ."""
    root = np.exp(log_own / 2)
    theta, vectors = np.linalg.eigh(correlation / np.outer(root, root))
    top = np.maximum(theta[-rank:], 1)
    value = log_own.sum() + np.log(top).sum() + (theta[-rank:] / top).sum() + theta[:-rank].sum()
    explained = (vectors[:, -rank:] ** 2) @ (top - 1)
    return float(value), 1 + explained - np.exp(-log_own)


def _unexplained(correlation: np.ndarray) -> np.ndarray:
    """Return the share of each column's variance that a regression on the others leaves; 1 where columns determine each other."""
    theta, vectors = np.linalg.eigh(correlation)
    if theta[0] < _MIN_UNEXPLAINED * theta[-1]:
        return np.ones(len(theta))
    share: np.ndarray = 1 / ((vectors**2) @ (1 / theta))
    return share


def _polished(log_own: np.ndarray, correlation: np.ndarray, rank: int, floor: np.ndarray) -> np.ndarray:
    """Take scoring steps while they reduce the gradient.

    L-BFGS compares values, which rounding leaves equal about 1e-8 from the minimum; the gradient has twice as many digits. The
    matrix of the steps, (Σₘ vᵢₘ vⱼₘ)² over the vectors outside the factors, is the curvature where Σ = R (Jöreskog, 1967).
    """

    def profile(at: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _profile(at, correlation, rank)
        return value, np.where((at > floor) & (at < 0.0), gradient, 0.0)

    most, here = profile(log_own)
    for _ in range(_MAX_SCORING_STEPS):
        root = np.exp(log_own / 2)
        rest = np.linalg.eigh(correlation / np.outer(root, root))[1][:, :-rank]
        step = np.linalg.lstsq((rest @ rest.T) ** 2, here, rcond=None)[0]
        there = np.clip(log_own - np.where(here != 0.0, step, 0.0), floor, 0.0)
        value, ahead = profile(there)
        if value > most + _ROUNDING or not np.abs(ahead).max() < np.abs(here).max():  # a step can end in a corner of the bounds
            break
        log_own, here = there, ahead
    return log_own


def _starts(correlation: np.ndarray, rank: int) -> list[np.ndarray]:
    """Half of each variance; the part that other columns leave unexplained (Jöreskog); the rest of principal components."""
    dim = len(correlation)
    theta, vectors = np.linalg.eigh(correlation)
    floor = max(float(theta[-1]) * 1e-10, 1e-10)
    inverse = (vectors**2) @ (1 / np.maximum(theta, floor))
    alone = (1 - rank / (2 * dim)) / inverse
    rest = 1 - (vectors[:, -rank:] ** 2) @ theta[-rank:]
    least = np.minimum(1e-4, 0.1 * _unexplained(correlation))
    return [np.clip(start, least, 1.0) for start in (np.full(dim, 0.5), alone, rest)]
