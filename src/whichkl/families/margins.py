"""Margins: families of one column, fitted by sums over its values; `Product` has one for each of its columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot
from whichkl.families.value_ranges import ValueRange

Sums = dict[str, Tensor]


class Margin(ABC):
    """One column's family: its values, the sums that it needs, and its law of maximum likelihood."""

    name: ClassVar[str]
    values: ValueRange
    """The values that it takes."""
    distribution: ClassVar[Any]
    """Torch's class of its law."""
    parameter_names: ClassVar[tuple[str, ...]]
    """What `distribution` calls the law's parameters."""
    about_median: ClassVar[bool] = False
    """Whether the origin must be the column's weighted median."""
    inner_value: ClassVar[float] = 0.0
    """A value that it takes, for values and origins that it doesn't."""

    @property
    def is_discrete(self) -> bool:
        """Whether it has probabilities of whole numbers, not a density."""
        return self.values.is_whole

    @abstractmethod
    def sums(self, x: Float[Tensor, " m"], w: Float[Tensor, " m"], origin: Float[Tensor, ""]) -> Sums:
        """Return sums over these values, besides Σw, which add up over blocks; all values and the origin are inside."""

    @abstractmethod
    def fitted(self, sums: Mapping[str, Tensor], origin: Float[Tensor, ""], column: str) -> dict[str, Tensor]:
        """Return the parameters of maximum likelihood.

        Raises:
            InputError: the likelihood has no maximum, as where all values are the same.
        """

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return a law's parameters by name."""
        return {name: getattr(law, name) for name in self.parameter_names}

    def law(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the law with these parameters."""
        law: Distribution = self.distribution(**parameters, validate_args=False)
        return law

    def statistics(self, x: Float[Tensor, " m"], w: Float[Tensor, " m"], origin: Float[Tensor, ""]) -> Sums:
        """Return `sums`, Σw, the number of rows with a weight, and the number of values outside the range."""
        inside = self.values.contains(x)
        at = self._inner(origin)
        counted = {"rows": (w > 0).sum(), "weight": w.sum(), "outside": (~inside).sum()}
        return {**counted, **self.sums(torch.where(inside, x, at), w, at)}

    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, ""], column: str) -> Distribution:
        """Return the law of maximum likelihood.

        Raises:
            InputError: values outside the range, or a likelihood without a maximum.
        """
        outside = int(sums["outside"])
        if outside:
            self.refuse(column, f"it holds {outside:,} {'value' if outside == 1 else 'values'} outside {self.values.words}")
        return self.law(self.fitted(sums, self._inner(origin), column))

    def count_parameters(self, x: Float[Tensor, " m"]) -> int:
        """Return the number of free parameters on a column."""
        return len(self.parameter_names)

    def refuse(self, column: str, because: str, instead: str = "Drop the column, or give it another margin") -> NoReturn:
        """Refuse a column that can't be fitted.

        Raises:
            InputError: always.
        """
        raise InputError(cannot(f"fit `{self.name}` to column `{column}`", because, instead))

    def refuse_constant(self, column: str) -> NoReturn:
        """Refuse a column whose values are all the same.

        Raises:
            InputError: always.
        """
        self.refuse(column, "it is constant, so its density is unbounded", "Drop the column")

    def _inner(self, origin: Tensor) -> Tensor:
        """Return the origin if it is in the range, else a value that is."""
        return origin if bool(self.values.contains(origin)) else torch.full_like(origin, self.inner_value)
