"""Network model: a fitted module as a distribution, or as a function of contexts that returns one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from whichkl._checks import InputError, cannot
from whichkl.arrays import read_context
from whichkl.families.data_shape import Shape
from whichkl.process.seeds import seeded

_DRAWS = 16_384
"""Number of draws, with a fixed seed, for a mean or a variance that has no formula."""


class NetworkModel(Distribution):
    """The distribution that a module's `forward()` returns, with events (d,).

    The module gets rows in its own dtype. A mean and a variance without a formula are those of 16,384 draws with a fixed seed;
    their error is about 1/128 of a standard deviation.

    Args:
        module: returns a `Distribution` with event shape (d,), or () where d = 1.
        shape: the shape of the data, with their d columns.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, module: nn.Module, shape: Shape) -> None:
        """Call the module once for its shapes."""
        self.module, self.shape, self.dim = module, shape, shape.dim
        law = self.law
        self.has_rsample = law.has_rsample
        self.is_bound: bool = getattr(module, "is_bound", False)
        """Whether `log_prob` is a lower bound of the log density, and not the log density itself."""
        bare = law.event_shape == () and shape.dim == 1
        super().__init__(law.batch_shape, Size((1,)) if bare else law.event_shape, validate_args=False)

    @property
    def law(self) -> Distribution:
        """What `forward()` returns."""
        return law_of(self.module)

    @property
    def support(self) -> Any:
        """The law's support; ℝᵈ if the law has none."""
        try:
            support = self.law.support
        except NotImplementedError:
            return constraints.real_vector
        return constraints.independent(support, 1) if support is not None and support.event_dim == 0 else support

    @property
    def mean(self) -> Tensor:
        """By the law's formula, else the mean of draws with a fixed seed."""
        return self._moment("mean")

    @property
    def variance(self) -> Tensor:
        """By the law's formula, else the variance of draws with a fixed seed."""
        return self._moment("variance")

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q of rows (…, d)."""
        law = self.law
        rows = value.to(weight_of(self.module).dtype)
        result: Tensor = law.log_prob(rows[..., 0] if law.event_shape == () and self.dim == 1 else rows)
        return result

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw without a gradient."""
        with torch.no_grad():
            return self._column(self.law.sample(Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw with a gradient, if the law can."""
        return self._column(self.law.rsample(Size(sample_shape)))

    def _column(self, drawn: Tensor) -> Tensor:
        return drawn[..., None] if self.law.event_shape == () and self.dim == 1 else drawn

    def _moment(self, name: str) -> Tensor:
        try:
            return self._column(getattr(self.law, name))
        except (NotImplementedError, AttributeError):
            with seeded(0):
                drawn = self.sample((_DRAWS,)).to(torch.float64)
            return (drawn.mean(0) if name == "mean" else drawn.var(0)).to(weight_of(self.module).dtype)

    def __repr__(self) -> str:
        return f"NetworkModel({type(self.module).__name__}, dim={self.dim})"


class ConditionalModel:
    """q(y|x): a module called with (n, c) contexts; returns the law of y, n rows in its batch shape.

    Args:
        module: its `forward(x)` returns a `Distribution`.
        shape: the shape of the data.
    """

    def __init__(self, module: nn.Module, shape: Shape) -> None:
        """Keep both."""
        self.module, self.shape = module, shape

    def __call__(self, x: Any) -> Distribution:
        """Return the law of y at each row of x, a tensor, an array or a DataFrame.

        Raises:
            InputError: x isn't (n, c) finite numbers, with the c columns of the fit.
        """
        return law_of(self.module, read_context(x, self.shape.context, weight_of(self.module)))

    def __repr__(self) -> str:
        return f"ConditionalModel({type(self.module).__name__})"


class Scalar(Distribution):
    """The law of the only coordinate of a vector: event shape () instead of (1,)."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, vector: Distribution) -> None:
        """Take a law with event shape (1,)."""
        self.vector = vector
        self.has_rsample = vector.has_rsample
        super().__init__(vector.batch_shape, Size(()), validate_args=False)

    @property
    def support(self) -> Any:
        """The real line."""
        return constraints.real

    @property
    def mean(self) -> Tensor:
        """That of the vector."""
        return self.vector.mean[..., 0]

    @property
    def variance(self) -> Tensor:
        """That of the vector."""
        return self.vector.variance[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q of numbers."""
        result: Tensor = self.vector.log_prob(value[..., None])
        return result

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw numbers without a gradient."""
        return self.vector.sample(Size(sample_shape))[..., 0]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw numbers with a gradient."""
        return self.vector.rsample(Size(sample_shape))[..., 0]


def law_of(module: nn.Module, *given: Tensor) -> Distribution:
    """Call a module, and return its `Distribution`.

    Raises:
        InputError: it returned something else.
    """
    law = module(*given)
    if not isinstance(law, Distribution):
        kind = "Tensor" if isinstance(law, Tensor) else type(law).__name__
        because = f"its `forward` returned a `{kind}`, not a torch Distribution"
        raise InputError(cannot(f"use the module `{type(module).__name__}`", because, "Return the law of a row"))
    return law


def weight_of(module: nn.Module) -> Tensor:
    """A module's first floating parameter or buffer, for its dtype and device; a float64 on the CPU if it has none."""
    for tensors in (module.parameters(), module.buffers()):
        for one in tensors:
            if one.is_floating_point():
                return one
    return torch.empty(0, dtype=torch.float64, device="cpu")
