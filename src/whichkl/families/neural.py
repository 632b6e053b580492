"""Neural: a network from x to the one parameter of a simple law of y: classification, counts, least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from whichkl._checks import InputError, cannot
from whichkl.families.atoms import Codes, Coin, Counts
from whichkl.families.autoregressive import categories_of, check_categories
from whichkl.families.data_shape import Shape, Summary
from whichkl.families.layers import Standardised, check_widths, perceptron
from whichkl.families.mixture_density import FLOOR
from whichkl.families.network_family import NetworkFamily

Response = Literal["bernoulli", "categorical", "poisson", "normal"]


@dataclass(frozen=True)
class Neural(NetworkFamily):
    """q(y|x) with a network f: Bernoulli(σ(f(x))), Categorical(softmax f(x)), Poisson(ȳ e^f(x)) or N(f(x), s).

    Classification by cross-entropy is ``Neural("categorical")``: maximum likelihood, KL(p‖q) up to the entropy of p. Columns
    of a y with several are independent given x; in a categorical one they have as many categories as the largest needs.

    Args:
        response: the law. ``"normal"`` has one standard deviation a column, the same at every x (another one at each:
            `MixtureDensityNetwork(1)`), of at least 0.1 % of that of y.
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
        object.__setattr__(self, "hidden", check_widths("Neural", self.hidden))
        if self.response not in get_args(Response):
            because = f"`response={self.response!r}` is none of {', '.join(get_args(Response))}"
            raise InputError(cannot("use `Neural`", because, "Use, say, Neural('categorical')"))
        object.__setattr__(self, "carried", self.response == "normal")

    @property
    def label(self) -> str:
        """Such as ``"a categorical neural network"``."""
        return f"a {self.response} neural network"

    def shape(self, summary: Summary, scalar: bool) -> Shape:
        """Count the categories."""
        counts = categories_of(summary) if self.response == "categorical" else ()
        return Shape(len(summary.mean), len(summary.context_mean), scalar, (max(counts),) if counts else ())

    def network(self, shape: Shape) -> nn.Module:
        """Build the network.

        Raises:
            InputError: there is no x.
        """
        self.refuse_single_rows(shape)
        return _Network(shape, self)

    def check_rows(self, x: Float[Tensor, "m d"], names: Sequence[str]) -> None:
        """Refuse what the response has no probability for.

        Raises:
            InputError: as said.
        """
        most = {"bernoulli": 2, "categorical": 4_096, "poisson": 2**53}
        if self.response != "normal":
            check_categories(x, names, self, most[self.response])


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
        sigma = scale * (FLOOR + nn.functional.softplus(self.noise[columns] + 0.5))
        return Normal(mean + scale * out, sigma, validate_args=False)

    def _of_rows(self, law: Distribution) -> Distribution:
        return Independent(law, 1, validate_args=False)
