"""Regression: the linear regression of y on x, from which a network that models y given x starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_MAX_ROWS, _MAX_COLUMNS = 20_000, 1_000
"""Largest numbers of rows that are read, and of columns of x or y: a start needs no more digits, and takes a second at most."""
_MAX_FEATURE = 4.0
"""Largest size of a standardised x in the regression: few rows far out would otherwise set the slope, or be moved far away."""
_MIN_SD = 1e-4
"""Least standard deviation of a residual, as a share of the column's."""


@dataclass(frozen=True)
class Regression:
    """y ≈ a + Bᵀ h(x) + L z of standardised columns, with h(x) = x between −4 and 4 and constant outside.

    B is a ridge regression whose penalty is that of c/n rows. L is the Cholesky factor of the residuals' covariance, in which the
    correlations are shrunk by the share of their squares that is noise.

    Source: Hoerl & Kennard (1970); Schäfer & Strimmer (2005).
    """

    slope: Float[Tensor, "c d"]
    intercept: Float[Tensor, " d"]
    tril: Float[Tensor, "d d"]

    @staticmethod
    def features(x: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return h(x) of standardised x."""
        return x.clamp(-_MAX_FEATURE, _MAX_FEATURE)

    @classmethod
    def of(cls, y: Float[Tensor, "n d"], x: Float[Tensor, "n c"], w: Float[Tensor, " n"]) -> Regression | None:
        """Regress standardised y on standardised x with weights; None with more than 1,000 columns.

        >>> x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> round(float(Regression.of(2 * x + 1, x, torch.ones(500)).slope), 1)
        2.0
        """
        if max(x.shape[1], y.shape[1]) > _MAX_COLUMNS:
            return None
        step = -(-len(x) // _MAX_ROWS)
        x, y, share = cls.features(x[::step]), y[::step], (w[::step] / w[::step].sum()).to(y)
        rows = 1 / float(share.square().sum())
        at_x, at_y = share @ x, share @ y
        h, z = x - at_x, y - at_y
        weighted = share[:, None] * h
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        slope = torch.cholesky_solve(weighted.mT @ z, torch.linalg.cholesky(weighted.mT @ h + x.shape[1] / rows * eye))
        residual = z - h @ slope
        covariance = residual.mT @ (share[:, None] * residual)
        scale = covariance.diagonal().clamp(min=_MIN_SD**2).sqrt()
        tril = scale[:, None] * torch.linalg.cholesky(_shrunk_correlation(residual / scale, share))
        return cls(slope, at_y - at_x @ slope, tril)


def _shrunk_correlation(z: Float[Tensor, "n d"], share: Float[Tensor, " n"]) -> Float[Tensor, "d d"]:
    """Return the correlations of rows of unit variance, times 1 − Σ var(rᵢⱼ) / Σ rᵢⱼ² over i ≠ j, at least 0."""
    r, squares = z.mT @ (share[:, None] * z), z.square()
    noise = squares.mT @ (share.square()[:, None] * squares) - share.square().sum() * r.square()
    off = ~torch.eye(len(r), dtype=torch.bool, device=r.device)
    kept = (1 - noise[off].sum() / r[off].square().sum().clamp(min=1e-300)).clamp(0, 1 - _MIN_SD**2)
    return torch.where(off, kept * r, torch.ones_like(r))
