"""Gram: the product of a tall matrix with itself, of which a symmetric kernel computes half."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_NARROW = 32
"""Wider products are shared out among the threads of NumPy's BLAS, so that the last digit would depend on their number."""


def gram(y: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
    """Return yᵀy. NumPy sees that both factors are one matrix; torch doesn't, and takes twice as long where it is narrow.

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[10., 14.],
            [14., 20.]])
    """
    if y.shape[1] > _NARROW or y.device.type != "cpu" or y.requires_grad:
        return y.T @ y
    rows = y.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # infinite sums are refused where they are read
        return torch.from_numpy(rows.T @ rows)
