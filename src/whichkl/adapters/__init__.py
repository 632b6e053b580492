"""Adapters: densities of other libraries as functions of tensors.

A new adapter is one file in this folder and one entry in `FUNCTION_ADAPTERS` or `MODEL_ADAPTERS`. No other part of the library
names an ecosystem. No adapter imports its ecosystem before an object of it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from whichkl.adapters import jax, numpyro


class FunctionAdapter(Protocol):
    """A library of arrays: its functions are recognised by what they return, by what they raise, or by being traced."""

    FOLDERS: tuple[str, ...]
    """Folders of the library's own code, which error messages skip when they name a line."""

    def claims_value(self, value: Any, /) -> bool:
        """Whether a function that returned this value is the library's."""

    def claims_error(self, error: BaseException | None, /) -> bool:
        """Whether a function that raised this error, given a tensor or a NumPy array, is the library's."""

    def claims_function(self, function: Callable[..., Any], x: Float[Tensor, "n d"], gradient: bool = False) -> bool:
        """Whether the library can trace a function that fails on tensors and on NumPy arrays."""

    def log_density(self, function: Callable[..., Any], batched: bool | None = None) -> Callable[[Tensor], Tensor]:
        """Return a log density as a function of tensors, (n, d) → (n,), which autograd differentiates."""

    def score(self, function: Callable[..., Any], batched: bool | None = None) -> Callable[[Tensor], Tensor]:
        """Return the gradient of a log density as a function of tensors, (n, d) → (n, d)."""


class Model(Protocol):
    """A probabilistic program: its posterior in unconstrained coordinates, and the way back to its own names and shapes."""

    @property
    def log_prob(self) -> Callable[[Tensor], Tensor]:
        """The log density at u, (n, d) → (n,), up to a constant."""

    @property
    def dim(self) -> int:
        """The number of unconstrained coordinates, d."""

    @property
    def names(self) -> Sequence[str]:
        """One name per coordinate."""

    def constrain(self, u: Float[Tensor, "n d"], /) -> Mapping[str, Any]:
        """Return the model's own variables at each row of u, as arrays of shape (n, …)."""


class ModelAdapter(Protocol):
    """A library of probabilistic programs."""

    KIND: str
    """What a model of the library is called, with its article, for messages."""

    def claims(self, obj: Any, args: Sequence[Any], kwargs: Mapping[str, Any], /) -> bool:
        """Whether an object is a model of the library."""

    def posterior(self, obj: Any, args: Sequence[Any], kwargs: Mapping[str, Any], /) -> Model:
        """Return the posterior of a model that was given these arguments."""


FUNCTION_ADAPTERS: list[FunctionAdapter] = [jax]
"""The adapters of functions; append your own."""
MODEL_ADAPTERS: list[ModelAdapter] = [numpyro]
"""The adapters of models; append your own."""


def library_folders() -> list[str]:
    """Return the folders of every adapted library, for `user_code.place_of`."""
    return [folder for adapter in FUNCTION_ADAPTERS for folder in adapter.FOLDERS]
