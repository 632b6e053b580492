"""Mixture density: a network from x to a mixture of normals of y, and with one component heteroscedastic regression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from whichkl.families.data_shape import Shape
from whichkl.families.gaussian import Covariance, check_covariance, multivariate_normal
from whichkl.families.layers import Standardised, check_count, check_widths, perceptron
from whichkl.families.network_family import NetworkFamily

FLOOR = 1e-3
"""Of a column's standard deviation: the least that a component may have, so that no likelihood is infinite."""


@dataclass(frozen=True)
class MixtureDensityNetwork(NetworkFamily):
    """q(y|x) = Σₖ πₖ(x) N(y; mₖ(x), Σₖ(x)), all of them a network's outputs.

    Each component's standard deviations (given the columns before, where Σ is full) are at least 0.1 % of those of y as a
    whole: a finer relation looks like one of that width.

    Args:
        components: K ≥ 1; 1 is regression with a mean and a width that depend on x.
        hidden: widths of the layers.
        covariance: ``"full"`` or ``"diagonal"``, for y of several columns.

    Raises:
        InputError: a field isn't one of these.

    Source: Bishop (1994); one component, Nix & Weigend (1994).

    >>> MixtureDensityNetwork(2).label
    'a mixture density network of 2 components'
    """

    conditional: ClassVar[bool] = True

    components: int = 3
    hidden: tuple[int, ...] = (64, 64)
    covariance: Covariance = "full"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_count("MixtureDensityNetwork", "components", self.components)
        object.__setattr__(self, "hidden", check_widths("MixtureDensityNetwork", self.hidden))
        check_covariance(self.covariance)

    @property
    def label(self) -> str:
        """Such as ``"a mixture density network of 3 components"``."""
        return f"a mixture density network of {self.components} component{'s' * (self.components > 1)}"

    def network(self, shape: Shape) -> nn.Module:
        """Build the network.

        Raises:
            InputError: there is no x.
        """
        self.refuse_single_rows(shape)
        return _Network(shape, self)

    def wider(self) -> MixtureDensityNetwork:
        """Return the network with one component more."""
        return replace(self, components=self.components + 1)


class _Network(Standardised):
    """Contexts in; weights, means and Cholesky factors of the components out."""

    def __init__(self, shape: Shape, family: MixtureDensityNetwork) -> None:
        super().__init__(shape)
        self.count = family.components
        self.below = shape.dim * (shape.dim - 1) // 2 if family.covariance == "full" else 0
        self.net = perceptron(shape.context, family.hidden, self.count * (1 + 2 * shape.dim + self.below))
        last = self.net[-1]
        if self.count > 1 and isinstance(last, nn.Linear):  # components start apart from each other
            with torch.no_grad():
                last.bias[self.count : self.count * (1 + shape.dim)].normal_()

    def forward(self, x: Tensor) -> Distribution:
        """Return the law of y at each row of x."""
        count, dim = self.count, self.dim
        out = self.net(self.standard_context(x))
        logits, centre, width, below = out.split([count, count * dim, count * dim, count * self.below], -1)
        loc = self.mean + self.scale * centre.unflatten(-1, (count, dim))
        sigma = self.scale * (FLOOR + nn.functional.softplus(width.unflatten(-1, (count, dim)) + 0.5))
        each: Distribution
        if self.is_scalar and dim == 1:
            each = Normal(loc[..., 0], sigma[..., 0], validate_args=False)
        elif self.below:
            row, column = torch.tril_indices(dim, dim, -1, device=out.device)
            tril = torch.diag_embed(sigma)
            tril[..., row, column] = self.scale[row] * below.unflatten(-1, (count, self.below))
            each = multivariate_normal(loc, tril)
        else:
            each = Independent(Normal(loc, sigma, validate_args=False), 1, validate_args=False)
        if count > 1:
            return MixtureSameFamily(Categorical(logits=logits, validate_args=False), each, validate_args=False)
        return _only(each)


def _only(each: Distribution) -> Distribution:
    """Return the one component of a batch (n, 1) as a law with batch (n,)."""
    if isinstance(each, MultivariateNormal):
        return multivariate_normal(each.loc[..., 0, :], each.scale_tril[..., 0, :, :])
    if isinstance(each, Independent) and isinstance(each.base_dist, Normal):
        inner = each.base_dist
        normal = Normal(inner.loc[..., 0, :], inner.scale[..., 0, :], validate_args=False)
        return Independent(normal, 1, validate_args=False)
    if not isinstance(each, Normal):
        raise TypeError(each)
    return Normal(each.loc[..., 0], each.scale[..., 0], validate_args=False)
