"""Generalized linear: logistic, multinomial and Poisson regression, with an intercept and the canonical link."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot
from whichkl.arrays import read_context
from whichkl.families.design import as_column
from whichkl.families.family import Family
from whichkl.families.margins import shown
from whichkl.families.responses import RESPONSES, Response

Word = Literal["bernoulli", "categorical", "poisson"]


@dataclass(frozen=True)
class GeneralizedLinear(Family):
    """q(y|x) with η = W x + b: P(y = 1) = 1 / (1 + e^(−η)), P(y = k) ∝ e^(η_k), or y ~ Poisson(e^η).

    The fit minimises −Σᵢ log q(yᵢ|xᵢ) + ½ · penalty · ‖W‖², summed over the n rows (weights are scaled to the sum n). That is
    the maximum a posteriori under the prior W_kj ~ N(0, s² = 1 / penalty), each by itself, in the units of x as given, with a
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
        if self.response not in RESPONSES:
            instead = f"Choose among {', '.join(RESPONSES)}"
            raise InputError(cannot(f"use `response={self.response!r}`", "it isn't a known one", instead))
        p = self.penalty
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not math.isfinite(p) or p < 0:
            because = "it must be a finite number of at least 0"
            raise InputError(cannot(f"use `penalty={p!r}`", because, "Give 0 for maximum likelihood, or, say, 1.0"))

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
        """Refuse several columns y, and values that the response doesn't take.

        Raises:
            InputError: as said.
        """
        self.check_columns(x.shape[1])
        self.check_count(len(x), 1)
        outside = ~self.law.allows(x[:, 0])
        if bool(outside.any()):
            row = int(outside.nonzero()[0, 0])
            because = f"y holds {shown(float(x[row, 0]))} in row {row}, and `{self.response}` takes {self.law.takes}"
            raise InputError(cannot(f"fit `{self}`", because, self.advice))

    def check_columns(self, count: int) -> None:
        """Refuse several columns y.

        Raises:
            InputError: as said.
        """
        if count != 1:
            because = f"y has {count} columns, and it models one"
            raise InputError(cannot(f"fit `{self}`", because, "Fit each column by itself"))

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
        if not isinstance(model, GeneralizedLinearModel):
            because = f"it is a `{type(model).__name__}`"
            raise InputError(cannot("read a generalised linear model from this", because, "Use a model of this family"))
        return {
            "weight": model.weight,
            "bias": model.bias,
            **({"column": torch.tensor(1, dtype=torch.int64, device="cpu")} if model.column else {}),
        }

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
