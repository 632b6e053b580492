"""Responses: the law of y given a linear predictor η, with what Newton's method needs of its likelihood."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families.atoms import Codes, Coin, Counts
from whichkl.families.value_ranges import BITS, COUNTS, ValueRange, codes_of


class Response(ABC):
    """An exponential family in its canonical parameter η, of k columns: the gradient in η is mean − y, the curvature Var(y)."""

    label: ClassVar[str]
    values: ClassVar[ValueRange]
    """The values that y may have."""

    @abstractmethod
    def law(self, eta: Float[Tensor, "n k"]) -> Distribution:
        """Return the law of y in each row: batch shape (n,), event shape ()."""

    @abstractmethod
    def mean(self, eta: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        """Return the mean of y, which for categories is their probabilities."""

    def code(self, y: Float[Tensor, " m"], columns: int) -> Float[Tensor, "m k"]:
        """Return y in the shape of the mean: one-hot for categories."""
        return y[:, None]

    def curve(self, mean: Float[Tensor, "m k"], a: int, b: int) -> Float[Tensor, " m"]:
        """Return Cov(y_a, y_b) of each row."""
        return self.turn(mean, torch.ones_like(mean))[:, 0]

    @abstractmethod
    def turn(self, mean: Float[Tensor, "m k"], by: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        """Return Cov(y) · by of each row."""

    @abstractmethod
    def gain(self, change: Float[Tensor, "m k"], y: Float[Tensor, " m"]) -> Float[Tensor, "m j"]:
        """Return numbers per row; if none is below 0 and one is above, the likelihood grows without limit along `change` of η.

        Source: Albert & Anderson (1984).
        """

    def side(self, y: Float[Tensor, " m"]) -> Tensor:
        """Return the group of each row; a column that separates the groups makes the likelihood unbounded."""
        return y.long()


class BernoulliResponse(Response):
    """y ∈ {0, 1}, η = log odds of 1."""

    label = "a logistic regression"
    values = BITS

    def law(self, eta: Tensor) -> Distribution:
        """Bernoulli."""
        return Coin(logits=eta[:, 0], validate_args=False)

    def mean(self, eta: Tensor) -> Tensor:
        """The probability of 1."""
        return eta.sigmoid()

    def turn(self, mean: Tensor, by: Tensor) -> Tensor:
        """P (1 − p) · by."""
        return mean * (1 - mean) * by

    def gain(self, change: Tensor, y: Tensor) -> Tensor:
        """It grows with η for 1, and falls for 0."""
        return (2 * y - 1)[:, None] * change


class CategoricalResponse(Response):
    """y ∈ {0 … K−1}, the softmax of η."""

    label = "a multinomial logistic regression"
    values = codes_of(noun="classes")

    def law(self, eta: Tensor) -> Distribution:
        """Categorical."""
        return Codes(logits=eta, validate_args=False)

    def mean(self, eta: Tensor) -> Tensor:
        """The softmax."""
        return eta.softmax(1)

    def code(self, y: Tensor, columns: int) -> Tensor:
        """One-hot."""
        return torch.nn.functional.one_hot(y.long(), columns).to(y.dtype)

    def curve(self, mean: Tensor, a: int, b: int) -> Tensor:
        """p_a (δ_ab − p_b)."""
        return mean[:, a] * (float(a == b) - mean[:, b])

    def turn(self, mean: Tensor, by: Tensor) -> Tensor:
        """P · (by − Σ p by)."""
        return mean * (by - (mean * by).sum(1, keepdim=True))

    def gain(self, change: Tensor, y: Tensor) -> Tensor:
        """The gain of the row's class over each other class."""
        return change.gather(1, y.long()[:, None]) - change


class PoissonResponse(Response):
    """y ∈ {0, 1, 2, …}, η = log of the mean."""

    label = "a Poisson regression"
    values = COUNTS

    def law(self, eta: Tensor) -> Distribution:
        """Poisson."""
        return Counts(eta[:, 0].exp(), validate_args=False)

    def mean(self, eta: Tensor) -> Tensor:
        """e^η."""
        return eta.exp()

    def turn(self, mean: Tensor, by: Tensor) -> Tensor:
        """λ · by."""
        return mean * by

    def gain(self, change: Tensor, y: Tensor) -> Tensor:
        """It falls with η for 0; elsewhere any change lowers the likelihood."""
        return torch.where(y[:, None] > 0, -change.abs(), -change)

    def side(self, y: Tensor) -> Tensor:
        """0, or more than 0."""
        return (y > 0).long()


RESPONSES: dict[str, Response] = {
    "bernoulli": BernoulliResponse(),
    "categorical": CategoricalResponse(),
    "poisson": PoissonResponse(),
}
