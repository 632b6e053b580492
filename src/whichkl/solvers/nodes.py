"""Fixed antithetic rules for N(0, I): the nodes on which an expectation under q becomes a deterministic sum."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_STEP, _REACH = 0.05, 9.0


def gaussian_rule(dim: int, count: int, seed: int) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """Return points z and weights w with Σ w = 1, Σ w z = 0, Σ w z zᵀ = I to rounding, and z, −z in pairs.

    In one dimension it's the trapezoid rule on [−9, 9] with step 0.05, whose error for a function that is analytic
    in a strip of half-width a around the real line falls as exp(−2πa/0.05) (Trefethen & Weideman, 2014), whatever
    `count`. Above, `count` scrambled Sobol points and their negatives, mapped linearly to have covariance I, so that
    a quadratic log density is integrated exactly.

    >>> z, w = gaussian_rule(dim=3, count=64, seed=0)
    >>> torch.allclose(z.T @ (w[:, None] * z), torch.eye(3, dtype=z.dtype))
    True
    """
    if dim == 1:
        z = torch.arange(-_REACH, _REACH + _STEP / 2, _STEP, dtype=torch.float64)
        z = (z - z.flip(0)) / 2
        w = torch.exp(-z.square() / 2)
        return z[:, None], w / w.sum()
    half = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count // 2, dtype=torch.float64)
    tiny = 2.0**-33
    half = math.sqrt(2) * torch.erfinv(2 * half.clamp(tiny, 1 - tiny) - 1)
    z = torch.cat([half, -half])
    tril = torch.linalg.cholesky(z.T @ z / len(z))
    z = torch.linalg.solve_triangular(tril, z.T, upper=False).T
    return z.contiguous(), torch.full((len(z),), 1 / len(z), dtype=torch.float64)


def first_count(dim: int) -> int:
    """The number of nodes to begin with: a power of two, well above the dimension (below it, q's scale is unbounded)."""
    return max(256, 1 << math.ceil(math.log2(8 * (dim + 1))))
