"""Margins: families of one column, fitted by sums over its values; `Product` has one for each of its columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot

Sums = dict[str, Tensor]


class Margin(ABC):
    """One column's family: what values it takes, which sums it needs, and its law of maximum likelihood."""

    name: ClassVar[str]
    takes: ClassVar[str]
    """The values that it takes, in words."""
    discrete: ClassVar[bool] = False
    free: ClassVar[int] = 2
    """How many parameters it has."""
    about_median: ClassVar[bool] = False
    """Whether the origin must be the column's weighted median."""
    safe: ClassVar[float] = 0.0
    """A value that it takes."""

    @abstractmethod
    def allows(self, values: Float[Tensor, " m"]) -> Bool[Tensor, " m"]:
        """Tell which values lie in its support."""

    @abstractmethod
    def sums(self, values: Float[Tensor, " m"], w: Float[Tensor, " m"], origin: Float[Tensor, ""]) -> Sums:
        """Return sums over these values beside Σw, which add up over blocks; all values and the origin are allowed ones."""

    @abstractmethod
    def law(self, sums: Mapping[str, Tensor], origin: Float[Tensor, ""], column: str) -> Distribution:
        """Return the law of maximum likelihood.

        Raises:
            InputError: the likelihood has no maximum, as where all values are the same.
        """

    @abstractmethod
    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return a law's parameters by name."""

    @abstractmethod
    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the law with these parameters."""

    def statistics(self, values: Float[Tensor, " m"], w: Float[Tensor, " m"], origin: Float[Tensor, ""]) -> Sums:
        """Return `sums`, Σw, the number of rows that count, and how many values lie outside the support."""
        inside = self.allows(values)
        at = origin if bool(self.allows(origin[None])) else torch.full_like(origin, self.safe)
        values = torch.where(inside, values, at)
        counted = {"rows": (w > 0).sum(), "weight": w.sum(), "outside": (~inside).sum()}
        return {**counted, **self.sums(values, w, at)}

    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, ""], column: str) -> Distribution:
        """Return the law of maximum likelihood.

        Raises:
            InputError: values outside the support, or a likelihood without a maximum.
        """
        outside = int(sums["outside"])
        if outside:
            self.refuse(column, f"it holds {outside:,} {'value' if outside == 1 else 'values'} outside {self.takes}")
        at = origin if bool(self.allows(origin[None])) else torch.full_like(origin, self.safe)
        return self.law(sums, at, column)

    def refuse(self, column: str, because: str, instead: str = "Drop the column, or give it another margin") -> NoReturn:
        """Say why a column can't be fitted.

        Raises:
            InputError: always.
        """
        raise InputError(cannot(f"fit `{self.name}` to column `{column}`", because, instead))

    def refuse_constant(self, column: str) -> NoReturn:
        """Say that all values of a column are the same.

        Raises:
            InputError: always.
        """
        self.refuse(column, "it is constant, so its density is unbounded", "Drop the column")


def shown(value: float) -> str:
    """Write a number for a message, with a real minus sign."""
    return f"{value:g}".replace("-", "−")
