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
from whichkl.families.network_model import ConditionalModel, NetworkModel
from whichkl.process.seeds import seeded

FEWEST = 20
"""Rows below which nothing is left to stop early by."""


class NetworkFamily(Family):
    """A family whose models are `nn.Module`s with a `forward()`, or `forward(x)`, that returns a `Distribution`."""

    decays: ClassVar[bool] = True
    """Whether weight decay is allowed: it is for networks, whose weights are near zero, not for parameters with a meaning."""

    @abstractmethod
    def network(self, shape: Shape) -> nn.Module:
        """Build an untrained module for data of this shape."""

    def shape(self, summary: Summary, scalar: bool) -> Shape:
        """Return the shape of the data."""
        return Shape(len(summary.mean), len(summary.context_mean), scalar)

    def start(self, summary: Summary, shape: Shape) -> nn.Module:
        """Build an untrained module that has the data's means and scales; uses torch's global generator."""
        module = self.network(shape).to(torch.float64)
        settle = getattr(module, "settle", None)
        if settle is not None:
            settle(summary)
        return module

    def wrap(self, module: nn.Module, shape: Shape) -> Any:
        """Return the module as a model."""
        return (ConditionalModel if shape.context else NetworkModel)(module, shape)

    def loss(self, model: Any, x: Tensor, context: Tensor | None, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Return what training minimises the mean of, a row: −log q(x), or a bound of it."""
        return -log_likelihood(model, x, context)

    def check_rows(self, x: Float[Tensor, "m d"], names: Sequence[str]) -> None:
        """Refuse rows that the family has no probability for.

        Raises:
            InputError: there are any.
        """

    def check_summary(self, summary: Summary, names: Sequence[str]) -> None:
        """Refuse too few rows, scales without digits, and constant columns where the family has a density.

        Raises:
            InputError: as said.
        """
        self.check_count(summary.rows, len(summary.mean))
        if self.carried:
            self.refuse_constant((summary.low == summary.high).nonzero().flatten().tolist(), names)
        beyond = ~((summary.scale > 0) & summary.scale.isfinite()) & (summary.low < summary.high)
        if bool(beyond.any()):
            which = ", ".join(f"`{names[i]}`" for i in beyond.nonzero().flatten().tolist())
            because = f"the variance of column {which} is beyond what a float64 holds"
            raise InputError(cannot(f"fit `{self}`", because, "Give it in other units"))

    def remarks(self, summary: Summary, names: Sequence[str]) -> tuple[str, ...]:
        """Say what the user should know of this family on these data."""
        if not (self.carried and summary.repeats):
            return ()
        which = ", ".join(f"`{names[i]}`" for i in summary.repeats)
        return (f"column {which} repeats its values: a density grows without limit there, so the value has little meaning",)

    def minimum_rows(self, dim: int) -> int:
        """Return `FEWEST`."""
        return FEWEST

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse too few rows, and constant columns where the family has a density.

        Raises:
            InputError: as said.
        """
        self.check_count(len(x), x.shape[1])
        if self.carried:
            self.refuse_constant((x == x[:1]).all(0).nonzero().flatten().tolist(), names)
        self.check_rows(x, names)

    def refuse_single_rows(self, shape: Shape) -> None:
        """Refuse rows without an x to condition on.

        Raises:
            InputError: there is no x.
        """
        if not shape.context:
            because = "it models y given x, and the samples aren't pairs"
            raise InputError(cannot(f"fit `{self}` to this target", because, "Pass `samples=(x, y)`"))

    def wider(self) -> Family | None:
        """Return the next richer family, if there is a natural one."""
        return None

    def parameters(self, model: Any) -> dict[str, Tensor]:
        """Return the module's state, each name behind ``module.``, and its `shape` as whole numbers."""
        state = {f"module.{name}": value.detach().clone() for name, value in state_of(model.module).items()}
        return {**state, "shape": model.shape.tensor()}

    def model(self, parameters: Mapping[str, Tensor]) -> Any:
        """Build the model whose module has this state, in the state's dtype; its weights ask for no gradient.

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
        because = f"its state holds `{other[0]}`, which is no tensor"
        raise InputError(cannot(f"use the module `{type(module).__name__}`", because, "Keep its state in buffers"))
    return state
