"""Generalized linear: logistic, multinomial and Poisson regression, with an intercept and the canonical link."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.arrays import read_context
from whichkl.families.columns import Codes, Coin, Counts
from whichkl.families.design import as_column, column_flag
from whichkl.families.family import Family
from whichkl.families.field_checks import (
    BITS,
    COUNTS,
    ValueRange,
    check_choice,
    check_not_negative,
    codes_of,
    expect,
    first_outside,
)

Word = Literal["bernoulli", "categorical", "poisson"]


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


class _Bernoulli(Response):
    """y ∈ {0, 1}, η = log odds of 1; Cov(y) = p (1 − p)."""

    label, values = "a logistic regression", BITS

    def law(self, eta: Tensor) -> Distribution:
        return Coin(logits=eta[:, 0], validate_args=False)

    def mean(self, eta: Tensor) -> Tensor:
        return eta.sigmoid()

    def turn(self, mean: Tensor, by: Tensor) -> Tensor:
        return mean * (1 - mean) * by

    def gain(self, change: Tensor, y: Tensor) -> Tensor:
        return (2 * y - 1)[:, None] * change  # the likelihood grows with η for 1, and falls for 0


class _Categorical(Response):
    """y ∈ {0 … K−1}, the softmax of η; Cov(y_a, y_b) = p_a (δ_ab − p_b)."""

    label, values = "a multinomial logistic regression", codes_of(noun="classes")

    def law(self, eta: Tensor) -> Distribution:
        return Codes(logits=eta, validate_args=False)

    def mean(self, eta: Tensor) -> Tensor:
        return eta.softmax(1)

    def code(self, y: Tensor, columns: int) -> Tensor:
        return torch.nn.functional.one_hot(y.long(), columns).to(y.dtype)

    def curve(self, mean: Tensor, a: int, b: int) -> Tensor:
        return mean[:, a] * (float(a == b) - mean[:, b])

    def turn(self, mean: Tensor, by: Tensor) -> Tensor:
        return mean * (by - (mean * by).sum(1, keepdim=True))

    def gain(self, change: Tensor, y: Tensor) -> Tensor:
        return change.gather(1, y.long()[:, None]) - change  # of the row's class over each other class


class _Poisson(Response):
    """y ∈ {0, 1, 2, …}, η = log of the mean λ; Cov(y) = λ."""

    label, values = "a Poisson regression", COUNTS

    def law(self, eta: Tensor) -> Distribution:
        return Counts(eta[:, 0].exp(), validate_args=False)

    def mean(self, eta: Tensor) -> Tensor:
        return eta.exp()

    def turn(self, mean: Tensor, by: Tensor) -> Tensor:
        return mean * by

    def gain(self, change: Tensor, y: Tensor) -> Tensor:
        # for 0 the likelihood falls with η; elsewhere any change lowers it
        return torch.where(y[:, None] > 0, -change.abs(), -change)

    def side(self, y: Tensor) -> Tensor:
        return (y > 0).long()


RESPONSES: dict[str, Response] = {"bernoulli": _Bernoulli(), "categorical": _Categorical(), "poisson": _Poisson()}


@dataclass(frozen=True)
class GeneralizedLinear(Family):
    """q(y|x) with η = W x + b: P(y = 1) = 1 / (1 + e^(−η)), P(y = k) ∝ e^(η_k), or y ~ Poisson(e^η).

    The fit minimises −Σᵢ log q(yᵢ|xᵢ) + ½ · penalty · ‖W‖², summed over the n rows (weights are scaled to the sum n). That is
    the maximum a posteriori under independent priors W_kj ~ N(0, s² = 1 / penalty), in the units of x as given, with a
    flat prior on b. In scikit-learn's words C = 1 / penalty. At 0 it is maximum likelihood. For categories W and b have K rows,
    whose sums over the classes are 0, since the same number added to all η changes nothing.

    Args:
        response: ``"bernoulli"`` (y is 0 or 1), ``"categorical"`` (codes 0 … K−1) or ``"poisson"`` (counts).
        penalty: the precision of the prior, at least 0.

    Raises:
        InputError: another word, or a penalty that isn't a finite number of at least 0.

    Source: Nelder & Wedderburn (1972).

    >>> import torch
    >>> model = GeneralizedLinear("bernoulli").model({"weight": torch.tensor([[2.0]]), "bias": torch.tensor([-1.0])})
    >>> model
    GeneralizedLinearModel(bernoulli y given x of 1 column)
    >>> [round(p, 4) for p in model(torch.tensor([[0.5], [1.0]])).mean.tolist()]
    [0.5, 0.7311]
    """

    carried: ClassVar[bool] = False
    conditional: ClassVar[bool] = True

    response: Word = "bernoulli"
    penalty: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "response", tuple(RESPONSES))
        check_not_negative(self, "penalty")

    @property
    def law(self) -> Response:
        """The law of y given η."""
        return RESPONSES[self.response]

    @property
    def label(self) -> str:
        """Such as ``"a logistic regression"``."""
        return self.law.label

    def minimum_rows(self, dim: int) -> int:
        """Two."""
        return 2

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse several columns of y, and values that the response doesn't take."""
        self.check_columns(x.shape[1])
        self.check_count(len(x), 1)
        outside = first_outside(x[:, 0], self.law.values)
        if outside is not None:
            row, value = outside
            because = f"y holds {value} in row {row}, and `{self.response}` takes {self.law.values.words}"
            self.refuse(because, self.advice, row)

    def with_categories(self, counts: Sequence[int | None], names: Sequence[str]) -> Family:
        """Take categories as classes."""
        return self if self.response == "categorical" else super().with_categories(counts, names)

    def check_columns(self, count: int) -> None:
        """Refuse several columns of y."""
        if count != 1:
            self.refuse(f"y has {count} columns, and it models one", "Fit each column alone")

    @property
    def advice(self) -> str:
        """What to do with values that the response doesn't take."""
        if self.response == "poisson":
            return "Correct y, or use LinearGaussian()"
        return "Recode the classes as 0 … K−1 (torch.unique(y, return_inverse=True))"

    def parameters(self, model: Any) -> dict[str, Tensor]:
        """Return `weight` (K or 1, c) and `bias` (K or 1,)."""
        law = expect(model, GeneralizedLinearModel, "a generalised linear model")
        return {"weight": law.weight, "bias": law.bias, **column_flag(law.column)}

    def model(self, parameters: Mapping[str, Tensor]) -> Any:
        """Build the model from `weight` and `bias`."""
        p = parameters
        return GeneralizedLinearModel(self.response, p["weight"], p["bias"], "column" in p)


@dataclass(frozen=True, repr=False, eq=False)
class GeneralizedLinearModel:
    """x (n, c) ↦ the law of y in each row: batch shape (n,), event shape (), or (1,) where y came as (n, 1)."""

    response: Word
    weight: Float[Tensor, "k c"]
    bias: Float[Tensor, " k"]
    column: bool = False
    """Whether y came as (n, 1)."""

    def __call__(self, x: Float[Tensor, "n c"]) -> Distribution:
        """Return the law of y for each row of x."""
        law = RESPONSES[self.response].law(read_context(x, self.weight.shape[1], self.weight) @ self.weight.T + self.bias)
        return as_column(law) if self.column else law

    def __repr__(self) -> str:
        k, c = self.weight.shape
        classes = f" of {k} classes" if self.response == "categorical" else ""
        return f"GeneralizedLinearModel({self.response} y{classes} given x of {c} column{'s' * (c > 1)})"
