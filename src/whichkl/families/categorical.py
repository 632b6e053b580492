"""Categorical: one column of categories, and how often each occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent

from whichkl._checks import InputError, cannot
from whichkl.families.columns import Codes
from whichkl.families.family import MomentFamily
from whichkl.families.field_checks import check_not_negative, check_whole, expect, first_outside
from whichkl.families.margins import CategoricalMargin


@dataclass(frozen=True)
class Categorical(MomentFamily):
    """q(x = k) = π_k for the codes k = 0 … K−1 of one column: πₖ = (n_k + s) / (n + s K).

    The model is `Independent(Categorical, 1)` with event shape (1,). Without `smoothing`, a category that no row has gets
    probability 0, so one such unseen row makes the cross-entropy infinite. For several columns use `Product("categorical")`.

    Args:
        categories: K; None for one more than the largest code, where every code below it must occur.
        smoothing: s ≥ 0, the number of rows that are added to every category; 0 is maximum likelihood, 1 is Laplace's rule.

    Raises:
        InputError: K isn't a whole number of at least 1, or s isn't a finite number of at least 0.

    Source: Laplace (1774) for the rule of succession.

    >>> import torch
    >>> family = Categorical(categories=3)
    >>> x = torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    >>> model = family.from_statistics(family.statistics(x, torch.ones(4), x[0]), x[0], ["side"])
    >>> [round(p, 4) for p in family.parameters(model)["probs"].tolist()]
    [0.75, 0.25, 0.0]
    """

    label: ClassVar[str] = "a table of categories"
    carried: ClassVar[bool] = False

    categories: int | None = None
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.categories is not None:
            check_whole(self, "categories")
        check_not_negative(self, "smoothing")

    def resolve(self, x: Float[Tensor, "n 1"], names: Sequence[str], *, whole: bool = True) -> tuple[Categorical, str]:
        """Set the number of categories if it isn't given, so a part of the rows that lacks some is fitted in the same way."""
        if self.categories is not None or not whole:
            return self, ""
        self.check_samples(x, names)
        x = x.to(torch.float64)
        model = self.from_statistics(self.statistics(x, torch.ones_like(x[:, 0]), x[0]), x[0], names)
        count = len(self.parameters(model)["probs"])
        return Categorical(count, self.smoothing), f"`{names[0]}` holds the codes of {count} categories"

    def with_categories(self, counts: Sequence[int | None], names: Sequence[str]) -> Categorical:
        """Set the number of categories, unless it is given."""
        _refuse_columns(len(counts))
        return Categorical(self.categories or counts[0], self.smoothing)

    def statistics(
        self, x: Tensor, w: Tensor, origin: Tensor, context: Tensor | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Return the weight of each code, and how often it was seen."""
        _refuse_columns(x.shape[1])
        return self._margin.statistics(x[:, 0], w, origin[0])

    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, " 1"], names: Sequence[str]) -> Distribution:
        """Return the frequencies."""
        self.check_count(int(sums["rows"]), 1)
        return Independent(self._margin.from_statistics(sums, origin[0], names[0]).expand((1,)), 1, validate_args=False)

    def minimum_rows(self, dim: int) -> int:
        """One."""
        return 1

    def check_samples(self, x: Float[Tensor, "n 1"], names: Sequence[str]) -> None:
        """Refuse several columns, and values that aren't codes."""
        _refuse_columns(x.shape[1])
        outside = first_outside(x[:, 0], self._margin.values)
        if outside is not None:
            row, value = outside
            top = "K − 1" if self.categories is None else str(self.categories - 1)
            because = f"column `{names[0]}` holds {value} in row {row}, and codes are whole numbers from 0 to {top}"
            instead = "Recode it (torch.unique(x, return_inverse=True)), or correct `categories=`"
            self.refuse(because, instead, row)

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return `probs` (K,)."""
        law = expect(model, Independent, "categories").base_dist
        return {"probs": expect(law, Codes, "categories").logits.exp()[0]}

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from `probs`."""
        return Independent(self._margin.law({"probs": parameters["probs"][None]}), 1, validate_args=False)

    @property
    def _margin(self) -> CategoricalMargin:
        return CategoricalMargin(self.categories, self.smoothing)


def _refuse_columns(count: int) -> None:
    if count != 1:
        because = f"there are {count} columns, and it is a table of one"
        raise InputError(
            cannot("fit `Categorical`", because, "Use Product('categorical'), or code the combinations in one column")
        )
