"""Neural: networks from x to the law of y: to its one parameter, or to a mixture of normals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from whichkl.families.columns import Codes, Coin, Counts
from whichkl.families.family import Family
from whichkl.families.field_checks import check_choice, check_whole, check_widths
from whichkl.families.gaussian import Covariance, diagonal_gaussian, multivariate_normal
from whichkl.families.layers import Shape, Standardised, Summary, perceptron
from whichkl.families.network_family import MAX_CATEGORIES, NetworkFamily

Response = Literal["bernoulli", "categorical", "poisson", "normal"]
_MIN_SHARE_OF_SD = 1e-3
"""Least standard deviation of a normal law, as a share of the column's; it keeps every likelihood finite."""


@dataclass(frozen=True)
class Neural(NetworkFamily):
    """q(y|x) with a network f: Bernoulli(σ(f(x))), Categorical(softmax f(x)), Poisson(ȳ e^f(x)) or N(f(x), s).

    Classification by cross-entropy is ``Neural("categorical")``: maximum likelihood, KL(p‖q) up to the entropy of p. Several
    columns of y are independent given x; categorical columns all have the categories of the one with the most.

    Args:
        response: the law. ``"normal"`` has one standard deviation per column, at least 0.1 % of that of y, which is the same
            at every x; in `MixtureDensityNetwork(1)` it depends on x.
        hidden: widths of the layers; () is a linear model.

    Raises:
        InputError: a field isn't one of these.

    Source: Rumelhart, Hinton & Williams (1986); as maximum likelihood, Bridle (1990).

    >>> Neural("categorical", hidden=(32,)).label
    'a categorical neural network'
    """

    conditional: ClassVar[bool] = True

    response: Response = "categorical"
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        """Check the fields; only a normal response lives on ℝᵈ."""
        check_widths(self)
        check_choice(self, "response", get_args(Response))
        object.__setattr__(self, "carried", self.response == "normal")

    @property
    def label(self) -> str:
        """Such as ``"a categorical neural network"``."""
        return f"a {self.response} neural network"

    @property
    def max_value(self) -> int | None:
        """The largest value that the response has a probability for."""
        most = {"bernoulli": 1, "categorical": MAX_CATEGORIES - 1, "poisson": 2**53 - 1}
        return most.get(self.response)

    def with_categories(self, counts: Sequence[int | None], names: Sequence[str]) -> Family:
        """Take categories as classes."""
        return self if self.response == "categorical" else super().with_categories(counts, names)

    def shape(self, summary: Summary, scalar: bool) -> Shape:
        """Count the categories."""
        counts = (max(summary.categories),) if self.response == "categorical" else ()
        return Shape(len(summary.mean), len(summary.context_mean), scalar, counts)

    def network(self, shape: Shape) -> nn.Module:
        """Build the network."""
        return _Network(shape, self)


class _Network(Standardised):
    """Contexts in, the law's parameter out."""

    def __init__(self, shape: Shape, family: Neural) -> None:
        super().__init__(shape)
        self.response = family.response
        self.count = shape.categories[0] if shape.categories else 1
        self.net = perceptron(shape.context, family.hidden, shape.dim * self.count)
        if self.response == "normal":
            self.noise = nn.Parameter(torch.zeros(shape.dim, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Distribution:
        """Return the law of y at each row of x."""
        out = self.net(self.standard_context(x))
        if self.response == "categorical":
            out = out if self.is_scalar else out.unflatten(-1, (self.dim, self.count))
            law: Distribution = Codes(logits=out, validate_args=False)
        else:
            law = self._law(out[..., 0], 0) if self.is_scalar else self._law(out, slice(None))
        return law if self.is_scalar else Independent(law, 1, validate_args=False)

    def _law(self, out: Tensor, columns: int | slice) -> Distribution:
        mean, scale = self.mean[columns], self.scale[columns]
        if self.response == "bernoulli":
            return Coin(logits=out, validate_args=False)
        if self.response == "poisson":
            return Counts(mean.clamp(min=1e-12) * out.clamp(max=50.0).exp(), validate_args=False)
        sigma = scale * (_MIN_SHARE_OF_SD + nn.functional.softplus(self.noise[columns] + 0.5))
        return Normal(mean + scale * out, sigma, validate_args=False)


@dataclass(frozen=True)
class MixtureDensityNetwork(NetworkFamily):
    """q(y|x) = Σₖ πₖ(x) N(y; mₖ(x), Σₖ(x)), all of them a network's outputs.

    Each component's standard deviations (given the earlier columns, if Σ is full) are at least 0.1 % of those of all of y: a
    finer relation looks like one of that width.

    Args:
        components: K ≥ 1; 1 is regression whose mean and standard deviation depend on x.
        hidden: widths of the layers.
        covariance: ``"full"`` or ``"diagonal"``, for several columns of y.

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
        check_whole(self, "components")
        check_widths(self)
        check_choice(self, "covariance", ("full", "diagonal"))

    @property
    def label(self) -> str:
        """Such as ``"a mixture density network of 3 components"``."""
        return f"a mixture density network of {self.components} component{'s' * (self.components > 1)}"

    def network(self, shape: Shape) -> nn.Module:
        """Build the network."""
        return _MixtureNetwork(shape, self)

    def wider(self) -> MixtureDensityNetwork:
        """Return the network with one more component."""
        return replace(self, components=self.components + 1)


class _MixtureNetwork(Standardised):
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
        sigma = self.scale * (_MIN_SHARE_OF_SD + nn.functional.softplus(width.unflatten(-1, (count, dim)) + 0.5))
        tril = torch.diag_embed(sigma)
        if self.below:
            row, column = torch.tril_indices(dim, dim, -1, device=out.device)
            tril[..., row, column] = self.scale[row] * below.unflatten(-1, (count, self.below))
        if count == 1:  # a law with batch (n,), not (n, 1)
            loc, sigma, tril = loc[..., 0, :], sigma[..., 0, :], tril[..., 0, :, :]
        each: Distribution
        if self.is_scalar and dim == 1:
            each = Normal(loc[..., 0], sigma[..., 0], validate_args=False)
        else:
            each = multivariate_normal(loc, tril) if self.below else diagonal_gaussian(loc, sigma)
        if count == 1:
            return each
        return MixtureSameFamily(Categorical(logits=logits, validate_args=False), each, validate_args=False)
