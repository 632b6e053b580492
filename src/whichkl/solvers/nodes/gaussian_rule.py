"""Gaussian rules: fixed antithetic nodes of N(0, I), on which an expectation under q is a deterministic sum."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_STEP, _REACH = 0.05, 9.0
"""Step and end of the trapezoid rule in one dimension."""


def gaussian_rule(dim: int, count: int, seed: int, apart: int = 0) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """Return points z and weights w with Σ w = 1, Σ w z = 0, Σ w z zᵀ = I to rounding, and z, −z in pairs.

    In one dimension it's the trapezoid rule on [−9, 9] with step 0.05, whose error for a function that is analytic
    in a strip of half-width a around the real line falls as exp(−2πa/0.05) (Trefethen & Weideman, 2014), for any `count`. In more
    dimensions it is `count` scrambled Sobol points and their negatives, mapped linearly to have covariance I, so that a quadratic
    log density is integrated exactly. With fewer than 4d nodes no such map would leave them normal. Then every column has
    variance 1, and is uncorrelated with the first `apart` columns and with its neighbours: on each side, m nodes allow about
    m/8 of them. The same holds above 21,201 dimensions, the largest number for which torch has Sobol points.

    >>> z, w = gaussian_rule(dim=3, count=64, seed=0)
    >>> torch.allclose(z.T @ (w[:, None] * z), torch.eye(3, dtype=z.dtype))
    True
    """
    if dim == 1:
        z = torch.arange(-_REACH, _REACH + _STEP / 2, _STEP, dtype=torch.float64, device="cpu")
        # Exactly antisymmetric, which steps of 0.05 added up aren't.
        z = (z - z.flip(0)) / 2
        w = torch.exp(-z.square() / 2)
        return z[:, None], w / w.sum()
    if count < 4 * dim or dim > torch.quasirandom.SobolEngine.MAXDIM:
        half = _neighbours_apart(dim, count // 2, seed, apart)
        z = torch.cat([half, -half])
        return z, torch.full((len(z),), 1 / len(z), dtype=torch.float64, device="cpu")
    half = sobol(dim, count // 2, seed)
    # Keeps 0 and 1 out, where the normal quantile is infinite.
    tiny = 2.0**-33
    half = math.sqrt(2) * torch.erfinv(2 * half.clamp(tiny, 1 - tiny) - 1)
    z = torch.cat([half, -half])
    tril = torch.linalg.cholesky(z.T @ z / len(z))
    z = torch.linalg.solve_triangular(tril, z.T, upper=False).T
    return z.contiguous(), torch.full((len(z),), 1 / len(z), dtype=torch.float64, device="cpu")


def sobol(dim: int, count: int, seed: int) -> Float[Tensor, "n d"]:
    """Return the first points of a scrambled Sobol sequence in the unit cube, the very first one in float32.

    Torch computes that one in the default dtype, whatever dtype is requested; float32 is that dtype by default.
    """
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    first = engine.quasi.to(torch.float32) / 2**engine.MAXBIT
    points: Tensor = engine.draw(count, dtype=torch.float64)
    points[0] = first
    return points


def _neighbours_apart(dim: int, count: int, seed: int, apart: int) -> Float[Tensor, "m d"]:
    """Normal draws, mapped so that each block of columns has covariance I and is uncorrelated with the two blocks before it.

    The first `apart` columns are a block with which all others are uncorrelated.

    Sobol points are unsuitable: with this few points some pairs of columns have correlations of 0.9.
    """
    z = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    # A block and the two before it must fit into `count` dimensions, with room for the draws to stay normal.
    width = max(1, (count - apart) // 4)
    for begin in ([0] if apart else []) + list(range(apart, dim, width)):
        end = begin + width if begin >= apart else apart
        before = torch.cat([z[:, : min(apart, begin)], z[:, max(apart, begin - 2 * width) : begin]], -1)
        block = z[:, begin:end] - before @ (before.T @ z[:, begin:end]) / count
        tril = torch.linalg.cholesky(block.T @ block / count)
        z[:, begin:end] = torch.linalg.solve_triangular(tril, block.T, upper=False).T
    return z


def least_count(dim: int) -> int:
    """Return a power of two well above the dimension; with fewer nodes q's scale is unbounded."""
    return max(64, 1 << math.ceil(math.log2(8 * (dim + 1))))


def first_count(dim: int) -> int:
    """Return the smallest number of nodes whose optimum is judged."""
    return max(256, least_count(dim))
