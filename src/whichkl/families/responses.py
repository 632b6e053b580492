"""Responses: the law of y given a linear predictor η, with what Newton's method needs of its likelihood."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families.atoms import Codes, Coin, Counts
from whichkl.families.margins_whole import MOST_CATEGORIES


class Response(ABC):
    """An exponential family in its canonical parameter η, of k columns: the gradient in η is mean − y, the curvature Var(y)."""

    label: ClassVar[str]
    takes: ClassVar[str]

    @abstractmethod
    def allows(self, y: Float[Tensor, " m"]) -> Tensor:
        """Tell which values it takes."""

    @abstractmethod
    def law(self, eta: Float[Tensor, "n k"]) -> Distribution:
        """Return the law of y in each row: batch shape (n,), event shape ()."""

    @abstractmethod
    def mean(self, eta: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        """Return the expected y; of categories, their probabilities."""

    def code(self, y: Float[Tensor, " m"], columns: int) -> Float[Tensor, "m k"]:
        """Return y as the mean is written."""
        return y[:, None]

    def curve(self, mean: Float[Tensor, "m k"], a: int, b: int) -> Float[Tensor, " m"]:
        """Return Cov(y_a, y_b) of each row."""
        return self.turn(mean, torch.ones_like(mean))[:, 0]

    @abstractmethod
    def turn(self, mean: Float[Tensor, "m k"], by: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        """Return Cov(y) · by of each row."""

    @abstractmethod
    def gain(self, change: Float[Tensor, "m k"], y: Float[Tensor, " m"]) -> Float[Tensor, "m j"]:
        """Return numbers for each row: where none is below 0 and one is above, the likelihood grows for ever along `change` of η.

        Source: Albert & Anderson (1984).
        """

    def side(self, y: Float[Tensor, " m"]) -> Tensor:
        """Return the groups of rows that a single column may set apart."""
        return y.long()


class BernoulliResponse(Response):
    """y ∈ {0, 1}, η = log odds of 1."""

    label = "a logistic regression"
    takes = "0 and 1"

    def allows(self, y: Tensor) -> Tensor:
        """0 and 1."""
        return (y == 0) | (y == 1)

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
        """Up for 1, down for 0."""
        return (2 * y - 1)[:, None] * change


class CategoricalResponse(Response):
    """y ∈ {0 … K−1}, the softmax of η."""

    label = "a multinomial logistic regression"
    takes = "whole numbers from 0 to K − 1, the codes of K classes"

    def allows(self, y: Tensor) -> Tensor:
        """Whole numbers from 0."""
        return (y >= 0) & (y < MOST_CATEGORIES) & (y == y.round())

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
        """By how much the row's class gains on each of the others."""
        return change.gather(1, y.long()[:, None]) - change


class PoissonResponse(Response):
    """y ∈ {0, 1, 2, …}, η = log of the mean."""

    label = "a Poisson regression"
    takes = "whole numbers from 0"

    def allows(self, y: Tensor) -> Tensor:
        """Whole numbers from 0."""
        return y.isfinite() & (y >= 0) & (y == y.round())

    def law(self, eta: Tensor) -> Distribution:
        """Poisson."""
        return Counts(eta[:, 0].exp(), validate_args=False)

    def mean(self, eta: Tensor) -> Tensor:
        """Exp η."""
        return eta.exp()

    def turn(self, mean: Tensor, by: Tensor) -> Tensor:
        """λ · by."""
        return mean * by

    def gain(self, change: Tensor, y: Tensor) -> Tensor:
        """Down for 0; any change loses elsewhere."""
        return torch.where(y[:, None] > 0, -change.abs(), -change)

    def side(self, y: Tensor) -> Tensor:
        """Nothing, or something."""
        return (y > 0).long()


RESPONSES: dict[str, Response] = {
    "bernoulli": BernoulliResponse(),
    "categorical": CategoricalResponse(),
    "poisson": PoissonResponse(),
}
