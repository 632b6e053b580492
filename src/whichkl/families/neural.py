"""Neural: a network from x to the one parameter of a simple law of y: classification, counts, least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from whichkl.families.atoms import Codes, Coin, Counts
from whichkl.families.data_shape import Shape, Summary
from whichkl.families.field_checks import check_choice, check_widths
from whichkl.families.layers import Standardised, perceptron
from whichkl.families.mixture_density import MIN_SHARE_OF_SD
from whichkl.families.network_family import MAX_CATEGORIES, NetworkFamily

Response = Literal["bernoulli", "categorical", "poisson", "normal"]


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
        law: Distribution
        if self.response == "categorical":
            law = Codes(logits=out.unflatten(-1, (self.dim, self.count)), validate_args=False)
            return self._of_rows(law) if not self.is_scalar else Codes(logits=out, validate_args=False)
        if self.is_scalar and self.dim == 1:
            return self._law(out[..., 0], 0)
        return self._of_rows(self._law(out, slice(None)))

    def _law(self, out: Tensor, columns: int | slice) -> Distribution:
        mean, scale = self.mean[columns], self.scale[columns]
        if self.response == "bernoulli":
            return Coin(logits=out, validate_args=False)
        if self.response == "poisson":
            return Counts(mean.clamp(min=1e-12) * out.clamp(max=50.0).exp(), validate_args=False)
        sigma = scale * (MIN_SHARE_OF_SD + nn.functional.softplus(self.noise[columns] + 0.5))
        return Normal(mean + scale * out, sigma, validate_args=False)

    def _of_rows(self, law: Distribution) -> Distribution:
        return Independent(law, 1, validate_args=False)
