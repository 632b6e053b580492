"""Breast cancer: a real posterior that needs no file of its own, the logistic regression of scikit-learn's data."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from whichkl._checks import require
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target


@plain_modes()
def breast_cancer() -> Target:
    """Return the posterior of a logistic regression, unnormalised, in β ∈ ℝ³¹: an intercept and 30 coefficients.

    yᵢ ~ Bernoulli(σ(β₀ + xᵢ β)) for 569 tumours, the columns of x at mean 0 and standard deviation 1, and β ~ N(0, 1).

    Raises:
        InputError: scikit-learn, which has the data, isn't installed.

    Source: Street, Wolberg & Mangasarian (1993).

    >>> breast_cancer()
    Target(dim=31, access: log_prob, differentiable)
    """
    x, y, names = breast_cancer_rows()

    def log_prob(u: Float[Tensor, "n 31"]) -> Float[Tensor, " n"]:
        z = u @ x.to(u).T
        return (y.to(u) * z - softplus(z)).sum(-1) - u.square().sum(-1) / 2

    return Target(log_prob=log_prob, dim=x.shape[1], names=names)


def breast_cancer_rows() -> tuple[Float[Tensor, "569 31"], Float[Tensor, " 569"], list[str]]:
    """Return the design with its column of ones, the labels (1 where the tumour is benign) and the columns' names."""
    data = require("sklearn.datasets", "sklearn").load_breast_cancer()
    x, y = torch.from_numpy(data.data), torch.from_numpy(data.target).to(torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    return torch.cat([torch.ones(len(x), 1, dtype=x.dtype, device="cpu"), x], 1), y, ["intercept", *map(str, data.feature_names)]
