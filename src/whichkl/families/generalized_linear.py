"""Generalized linear: logistic, multinomial and Poisson regression, with an intercept and the canonical link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot
from whichkl.arrays import read_context
from whichkl.families.design import as_column, column_flag
from whichkl.families.family import Family
from whichkl.families.field_checks import check_choice, check_not_negative, expect
from whichkl.families.responses import RESPONSES, Response
from whichkl.families.value_ranges import first_outside

Word = Literal["bernoulli", "categorical", "poisson"]


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
        """Check both fields."""
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
        """Refuse several columns of y, and values that the response doesn't take.

        Raises:
            InputError: there are any.
        """
        self.check_columns(x.shape[1])
        self.check_count(len(x), 1)
        outside = first_outside(x[:, 0], self.law.values)
        if outside is not None:
            row, value = outside
            because = f"y holds {value} in row {row}, and `{self.response}` takes {self.law.values.words}"
            raise InputError(cannot(f"fit `{self}`", because, self.advice))

    def check_columns(self, count: int) -> None:
        """Refuse several columns of y.

        Raises:
            InputError: there are several.
        """
        if count != 1:
            because = f"y has {count} columns, and it models one"
            raise InputError(cannot(f"fit `{self}`", because, "Fit each column alone"))

    @property
    def advice(self) -> str:
        """What to do with values that the response doesn't take."""
        if self.response == "poisson":
            return "Correct y, or use LinearGaussian()"
        return "Recode the classes as 0 … K−1 (torch.unique(y, return_inverse=True))"

    def parameters(self, model: Any) -> dict[str, Tensor]:
        """Return `weight` (K or 1, c) and `bias` (K or 1,).

        Raises:
            InputError: the model is of another family.
        """
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
