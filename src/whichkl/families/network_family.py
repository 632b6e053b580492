"""Network family: models that are modules, as distributions or as functions of contexts that return one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from whichkl._checks import InputError, IntegrityError, cannot
from whichkl.arrays import read_context
from whichkl.families.family import Family, log_likelihood
from whichkl.families.field_checks import quoted
from whichkl.families.layers import Shape, Summary
from whichkl.process.seeds import seeded

_MIN_ROWS = 20
"""Smallest number of rows; with fewer, early stopping has no rows to decide by."""
MAX_CATEGORIES = 4_096
"""Largest number of categories of a column; the network has an output per category."""
_DRAWS = 16_384
"""Number of draws, with a fixed seed, for a mean or a variance that has no formula."""


class NetworkFamily(Family):
    """A family whose models are `nn.Module`s with a `forward()`, or `forward(x)`, that returns a `Distribution`."""

    decays: ClassVar[bool] = True
    """Whether weight decay is allowed: for networks, whose weights are near zero, but not for parameters with a meaning."""
    has_own_dtype: ClassVar[bool] = False
    """Whether a module loads its weights in its own dtype, and not in theirs."""
    starts_from_regression: ClassVar[bool] = False
    """Whether `start` needs the linear regression of y on x."""

    @abstractmethod
    def network(self, shape: Shape) -> nn.Module:
        """Build an untrained module for data of this shape."""

    def shape(self, summary: Summary, scalar: bool) -> Shape:
        """Return the shape of the data."""
        return Shape(len(summary.mean), len(summary.context_mean), scalar)

    def start(self, summary: Summary, shape: Shape) -> nn.Module:
        """Build an untrained module that has the data's means and scales; uses torch's global generator."""
        if self.conditional and not self.optional_context and not shape.context:
            because = "it models y given x, and the samples aren't pairs"
            raise InputError(cannot(f"fit `{self}` to this target", because, "Pass `samples=(x, y)`"))
        module = self.network(shape).to(torch.float64)
        if settle := getattr(module, "settle", None):
            settle(summary)
        return module

    def wrap(self, module: nn.Module, shape: Shape) -> Any:
        """Return the module as a model."""
        return (ConditionalModel if shape.context else NetworkModel)(module, shape)

    def loss(self, model: Any, x: Tensor, context: Tensor | None, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Return the loss of each row, whose mean training minimises: −log q(x), or an upper bound of it."""
        return -log_likelihood(model, x, context)

    @property
    def max_value(self) -> int | None:
        """The largest whole number that a column may hold; None if columns hold real numbers."""
        return None

    def check_rows(self, x: Float[Tensor, "m d"], names: Sequence[str]) -> None:
        """Refuse values that aren't whole numbers from 0 to `max_value`, if the family has one."""
        most = self.max_value
        wrong = torch.zeros_like(x, dtype=torch.bool) if most is None else (x < 0) | (x != x.floor()) | (x > most)
        if bool(wrong.any()):
            row, column = (int(one) for one in wrong.nonzero()[0])
            because = f"column `{names[column]}` holds {float(x[row, column]):g}, not a whole number from 0 to {most:,}"
            self.refuse(because, "Number the categories from 0")

    def check_summary(self, summary: Summary, names: Sequence[str]) -> None:
        """Refuse too few rows, scales beyond float64, and constant columns where the family has a density."""
        self.check_count(summary.rows, len(summary.mean))
        if self.carried:
            self.refuse_constant(summary.low == summary.high, names)
        beyond = ~((summary.scale > 0) & summary.scale.isfinite()) & (summary.low < summary.high)
        if bool(beyond.any()):
            self.refuse(
                f"the variance of column {quoted(names, beyond)} is beyond what a float64 holds", "Give it in other units"
            )

    def remarks(self, summary: Summary, names: Sequence[str]) -> tuple[str, ...]:
        """Return what the user should know about this family on these data."""
        if not (self.carried and summary.repeats):
            return ()
        which = ", ".join(f"`{names[i]}`" for i in summary.repeats)
        return (f"column {which} repeats its values: a density grows without limit there, so the value has little meaning",)

    def minimum_rows(self, dim: int) -> int:
        """Return 20, in any dimension."""
        return _MIN_ROWS

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse too few rows, values without a probability, and constant columns where the family has a density."""
        self.check_count(len(x), x.shape[1])
        if self.carried:
            self.refuse_constant((x == x[:1]).all(0), names)
        self.check_rows(x, names)

    def wider(self) -> Family | None:
        """Return the next richer family, or None."""
        return None

    def parameters(self, model: Any) -> dict[str, Tensor]:
        """Return the module's state, with ``module.`` before each name, and its `shape` as whole numbers."""
        state = {f"module.{name}": value.detach().clone() for name, value in state_of(model.module).items()}
        return {**state, "shape": model.shape.tensor()}

    def model(self, parameters: Mapping[str, Tensor]) -> Any:
        """Build the model whose module has this state, in the state's dtype; its weights need no gradient."""
        shape = Shape.read(parameters["shape"])
        state = {name.removeprefix("module."): value for name, value in parameters.items() if name != "shape"}
        with seeded(0):
            module = self.network(shape)
        first = next((value for value in state.values() if value.is_floating_point()), None)
        if first is not None:
            module = module.to(device=first.device, dtype=None if self.has_own_dtype else first.dtype)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            because = f"the weights are another module's ({' '.join(str(error).split())[:200]})"
            do = f"load weights into `{type(module).__name__}`"
            raise IntegrityError(cannot(do, because, "Give the family that was fitted")) from error
        return self.finished(module, shape)

    def finished(self, module: nn.Module, shape: Shape) -> Any:
        """Freeze a module, and return it as a model."""
        module.requires_grad_(False).eval()
        return self.wrap(module, shape)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict."""
    state = module.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        because = f"its state holds `{other[0]}`, which isn't a tensor"
        raise InputError(cannot(f"use the module `{type(module).__name__}`", because, "Keep its state in buffers"))
    return state


class NetworkModel(Distribution):
    """The distribution that a module's `forward()` returns, with events (d,).

    The module gets rows in its own dtype. A mean and a variance without a formula are those of 16,384 draws with a fixed seed;
    their error is about 1/128 of a standard deviation.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, module: nn.Module, shape: Shape) -> None:
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
    """q(y|x): a module called with (n, c) contexts; returns the law of y, n rows in its batch shape."""

    def __init__(self, module: nn.Module, shape: Shape) -> None:
        self.module, self.shape = module, shape

    def __call__(self, x: Any) -> Distribution:
        """Return the law of y at each row of x, a tensor, an array or a DataFrame.

        Raises:
            InputError: x isn't (n, c) finite numbers, with the c columns of the fit.
        """
        return law_of(self.module, read_context(x, self.shape.context, weight_of(self.module)))

    def __repr__(self) -> str:
        return f"ConditionalModel({type(self.module).__name__})"


def law_of(module: nn.Module, *given: Tensor) -> Distribution:
    """Call a module, and return its `Distribution`."""
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
