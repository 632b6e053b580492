"""Network family: models that are modules, whose weights are found by gradient descent on the likelihood."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl._checks import InputError, IntegrityError, cannot
from whichkl.families.data_shape import Shape, Summary
from whichkl.families.family import Family, log_likelihood
from whichkl.families.field_checks import quoted
from whichkl.families.network_model import ConditionalModel, NetworkModel
from whichkl.process.seeds import seeded

_MIN_ROWS = 20
"""Smallest number of rows; with fewer, early stopping has no rows to decide by."""
MAX_CATEGORIES = 4_096
"""Largest number of categories of a column; the network has an output per category."""


class NetworkFamily(Family):
    """A family whose models are `nn.Module`s with a `forward()`, or `forward(x)`, that returns a `Distribution`."""

    decays: ClassVar[bool] = True
    """Whether weight decay is allowed: for networks, whose weights are near zero, but not for parameters with a meaning."""

    @abstractmethod
    def network(self, shape: Shape) -> nn.Module:
        """Build an untrained module for data of this shape."""

    def shape(self, summary: Summary, scalar: bool) -> Shape:
        """Return the shape of the data."""
        return Shape(len(summary.mean), len(summary.context_mean), scalar)

    def start(self, summary: Summary, shape: Shape) -> nn.Module:
        """Build an untrained module that has the data's means and scales; uses torch's global generator.

        Raises:
            InputError: the family models y given x, and there is no x.
        """
        if self.conditional and not self.optional_context and not shape.context:
            because = "it models y given x, and the samples aren't pairs"
            raise InputError(cannot(f"fit `{self}` to this target", because, "Pass `samples=(x, y)`"))
        module = self.network(shape).to(torch.float64)
        settle = getattr(module, "settle", None)
        if settle is not None:
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
        """Refuse values that aren't whole numbers from 0 to `max_value`, if the family has one.

        Raises:
            InputError: there are any.
        """
        most = self.max_value
        wrong = torch.zeros_like(x, dtype=torch.bool) if most is None else (x < 0) | (x != x.floor()) | (x > most)
        if bool(wrong.any()):
            row, column = (int(one) for one in wrong.nonzero()[0])
            because = f"column `{names[column]}` holds {float(x[row, column]):g}, not a whole number from 0 to {most:,}"
            raise InputError(cannot(f"fit `{self}`", because, "Number the categories from 0"))

    def check_summary(self, summary: Summary, names: Sequence[str]) -> None:
        """Refuse too few rows, scales beyond float64, and constant columns where the family has a density.

        Raises:
            InputError: there are any.
        """
        self.check_count(summary.rows, len(summary.mean))
        if self.carried:
            self.refuse_constant((summary.low == summary.high).nonzero().flatten().tolist(), names)
        beyond = ~((summary.scale > 0) & summary.scale.isfinite()) & (summary.low < summary.high)
        if bool(beyond.any()):
            which = quoted(names, beyond.nonzero().flatten().tolist())
            because = f"the variance of column {which} is beyond what a float64 holds"
            raise InputError(cannot(f"fit `{self}`", because, "Give it in other units"))

    def remarks(self, summary: Summary, names: Sequence[str]) -> tuple[str, ...]:
        """Return what the user should know about this family on these data."""
        if not (self.carried and summary.repeats):
            return ()
        return (
            f"column {quoted(names, summary.repeats)} repeats its values: a density grows without limit there, so the value "
            "has little meaning",
        )

    def minimum_rows(self, dim: int) -> int:
        """Return 20, in any dimension."""
        return _MIN_ROWS

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse too few rows, values without a probability, and constant columns where the family has a density.

        Raises:
            InputError: there are any.
        """
        self.check_count(len(x), x.shape[1])
        if self.carried:
            self.refuse_constant((x == x[:1]).all(0).nonzero().flatten().tolist(), names)
        self.check_rows(x, names)

    def wider(self) -> Family | None:
        """Return the next richer family, or None."""
        return None

    def parameters(self, model: Any) -> dict[str, Tensor]:
        """Return the module's state, with ``module.`` before each name, and its `shape` as whole numbers."""
        state = {f"module.{name}": value.detach().clone() for name, value in state_of(model.module).items()}
        return {**state, "shape": model.shape.tensor()}

    def model(self, parameters: Mapping[str, Tensor]) -> Any:
        """Build the model whose module has this state, in the state's dtype; its weights need no gradient.

        Raises:
            IntegrityError: the state is another module's.
        """
        shape = Shape.read(parameters["shape"])
        state = {name.removeprefix("module."): value for name, value in parameters.items() if name != "shape"}
        with seeded(0):
            module = self.network(shape)
        floats = [value for value in state.values() if value.is_floating_point()]
        return self.finished(self._loaded(module, state, floats), shape)

    def finished(self, module: nn.Module, shape: Shape) -> Any:
        """Freeze a module, and return it as a model."""
        module.requires_grad_(False).eval()
        return self.wrap(module, shape)

    def _loaded(self, module: nn.Module, state: Mapping[str, Tensor], floats: Sequence[Tensor]) -> nn.Module:
        if floats:
            module = module.to(dtype=floats[0].dtype, device=floats[0].device)
        return load_state(module, state)


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a state into a module, all of it.

    Raises:
        IntegrityError: names or shapes differ.
    """
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        because = f"the weights are another module's ({' '.join(str(error).split())[:200]})"
        name = type(module).__name__
        raise IntegrityError(cannot(f"load weights into `{name}`", because, "Give the family that was fitted")) from error
    return module


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict.

    Raises:
        InputError: it holds something other than tensors.
    """
    state = module.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        because = f"its state holds `{other[0]}`, which isn't a tensor"
        raise InputError(cannot(f"use the module `{type(module).__name__}`", because, "Keep its state in buffers"))
    return state
