"""Triangular: the affine map of a lower-triangular matrix, which gives a flow the covariance that it starts from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints, transforms


class Triangular(transforms.Transform):
    """y ↦ loc + L y, with log|∂x/∂y| = Σ log|Lᵢᵢ|.

    Args:
        loc: (d,).
        tril: (d, d), lower triangular, its diagonal without zeros.

    >>> Triangular(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))(torch.ones(1, 2))
    tensor([[3., 2.]])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Float[Tensor, " d"], tril: Float[Tensor, "d d"]) -> None:
        """Take both."""
        super().__init__()
        self.loc, self.tril = loc, tril

    def _call(self, y: Tensor) -> Tensor:
        return self.loc + y @ self.tril.mT

    def _inverse(self, x: Tensor) -> Tensor:
        rows = (x - self.loc).reshape(-1, len(self.loc))
        y: Tensor = torch.linalg.solve_triangular(self.tril, rows.mT, upper=False).mT
        return y.reshape(x.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The same number for every row."""
        return self.tril.diagonal().abs().log().sum().expand(x.shape[:-1])
