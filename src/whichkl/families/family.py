"""Family: what every set of models offers to the solvers, and nothing about how a fit is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, IntegrityError, cannot


class Family(ABC):
    """An immutable description of a set of models on ℝᵈ; a model is a `torch.distributions.Distribution`.

    A concrete family is a frozen dataclass, so its fields are its configuration.
    """

    kinds: ClassVar[dict[str, type[Family]]] = {}

    def __init_subclass__(cls) -> None:
        """Register a family under its class name, which is what a saved fit calls it."""
        Family.kinds[cls.__name__] = cls

    @property
    @abstractmethod
    def label(self) -> str:
        """The family in a few words, for titles and sentences."""

    @abstractmethod
    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return the model's parameters by name, in their natural form."""

    @abstractmethod
    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model with these parameters."""

    @abstractmethod
    def pack(self, model: Distribution) -> Float[Tensor, " k"]:
        """Write a model as one vector without constraints."""

    @abstractmethod
    def unpack(self, theta: Float[Tensor, " k"], dim: int) -> Distribution:
        """Read the model that a vector without constraints stands for; differentiable."""

    @abstractmethod
    def nodes(
        self, model: Distribution, z: Float[Tensor, "m d"], w: Float[Tensor, " m"]
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
        """Carry a rule for N(0, I) to one for the model: points and weights, differentiable in the parameters."""

    @abstractmethod
    def affine(self, model: Distribution, shift: Float[Tensor, " d"], scale: Float[Tensor, "d d"]) -> Distribution:
        """Return the law of shift + scale · x for x ~ model; `scale` is lower triangular, as `whitening` gives it."""

    @abstractmethod
    def whitening(self, model: Distribution) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Return the mean and a lower-triangular scale of the model, diagonal where the family's covariance is."""

    @abstractmethod
    def minimum_rows(self, dim: int) -> int:
        """The fewest distinct samples that determine a model of this family."""

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse samples under which this family's likelihood is unbounded.

        Raises:
            InputError: too few rows, or a constant column.
        """
        n, dim = x.shape
        needed = self.minimum_rows(dim)
        if n < needed:
            because = f"it needs at least {needed} rows in dimension {dim}, and there are {n}"
            raise InputError(cannot(f"fit `{self}`", because, "Give more samples, or a smaller family"))
        constant = [names[i] for i in (x == x[:1]).all(0).nonzero().flatten().tolist()]
        if constant:
            which = ", ".join(f"`{name}`" for name in constant)
            because = f"column {which} is constant, so its density is unbounded"
            raise InputError(cannot(f"fit `{self}`", because, "Drop the column"))

    def config(self) -> dict[str, Any]:
        """Return the class name and the fields, as JSON can hold them."""
        return {"family": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


def family_from_config(config: Mapping[str, Any]) -> Family:
    """Rebuild a family from `Family.config`.

    Raises:
        IntegrityError: the name or a field isn't known.
    """
    fields = dict(config)
    kind = Family.kinds.get(str(fields.pop("family", "")))
    try:
        if kind is None:
            raise TypeError(f"no family is called {config.get('family')!r}")
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise IntegrityError(cannot("rebuild the family", str(error), "Load it with the version that wrote it")) from error


def cast(family: Family, model: Distribution, like: torch.dtype, device: torch.device) -> Distribution:
    """Return the same model with parameters of another dtype and device."""
    moved = {name: value.detach().to(dtype=like, device=device) for name, value in family.parameters(model).items()}
    return family.model(moved)
