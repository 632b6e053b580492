"""Descent: what all gradient descent shares: a step, the best weights, the learning rate, the journal's entry, flat weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from whichkl.files.journal import Journal, optimizer_state, tensors_behind
from whichkl.process.threads import threads_for
from whichkl.process.torch_modes import own_defaults

_ROWS = 16
"""Rows of a batch, times the passes over the weights, times the share of a multiplication that counts as a number."""


@dataclass
class Run:
    """A module under training, its optimizer, and the best weights so far."""

    entry: ClassVar[str] = "training"
    """Name of the journal's entry."""
    numbers: ClassVar[dict[str, type]] = {"best_loss": float, "since": int, "round": int, "skipped": int, "trouble": str}
    """Fields that the journal keeps, and their types."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float
    """Largest norm of a gradient."""
    round: int = 0
    """Rounds done."""
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    """The loss on the rows or examples that decide when to stop, under the best weights."""
    since: int = 0
    """Rounds since the best loss last fell."""
    skipped: int = 0
    """Batches without a finite loss and gradient."""
    trouble: str = ""
    """The reason for the first skipped batch."""
    gradient: float = 0.0
    """Norm of the last gradient."""

    def descend(
        self,
        loss: Callable[[], Tensor],
        rate: float,
        what: str = "loss",
        skipped_errors: tuple[type[Exception], ...] = (),
    ) -> float:
        """Take one step, or skip a batch whose loss or gradient isn't finite; return the loss, NaN if skipped.

        `what` names the loss in messages. A batch is skipped, too, if its loss raises one of `skipped_errors`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with threads_for(_ROWS * sum(one.numel() for one in self.module.parameters())):
                found = loss()
                value = float(found.detach())
                if not math.isfinite(value):
                    return self._skip(f"its {what} was {'NaN' if math.isnan(value) else 'infinite'}")
                found.backward()
        except skipped_errors as error:
            return self._skip(" ".join(str(error).split())[:200])
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip))
        if not math.isfinite(norm):
            return self._skip("its gradient was NaN or infinite")
        self.gradient = norm
        with own_defaults():  # the optimizer counts its steps in a tensor
            self.optimizer.step()
        return value

    def keep(self, loss: float) -> bool:
        """Keep the present weights if their loss is the least so far; return whether it is."""
        if loss < self.best_loss:
            self.best_loss, self.since, self.best = loss, 0, state_of(self.module)
            return True
        self.since += 1
        return False

    def save(self, journal: Journal, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Write down everything that the next round depends on."""
        tensors = tensors | {f"now.{name}": value for name, value in state_of(self.module).items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value.clone() for name, value in state.items()}
        journal.save(self.entry, tensors, {**{name: getattr(self, name) for name in self.numbers}, **notes})

    def resume(self, journal: Journal, read: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Any]]) -> bool:
        """Take up what `save` wrote; return whether there was anything.

        `read` makes further fields of the entry's tensors and notes, and raises where they can't be right.
        """
        state, weights = state_of(self.module), [one for group in self.optimizer.param_groups for one in group["params"]]

        def checked(tensors: dict[str, Tensor], notes: dict[str, Any]) -> tuple[Any, ...]:
            fields = {name: kind(notes[name]) for name, kind in self.numbers.items()} | read(tensors, notes)
            fields["best"] = tensors_behind("best.", tensors, state)
            return tensors_behind("now.", tensors, state), optimizer_state("adam.", tensors, weights), fields

        found = journal.load(self.entry, checked)
        if found is None:
            return False
        now, adam, fields = found
        self.module.load_state_dict(now)
        self.optimizer.load_state_dict({"state": adam, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for name, value in fields.items():
            setattr(self, name, value)
        return True

    def _skip(self, why: str) -> float:
        self.skipped += 1
        self.trouble = self.trouble or why
        return math.nan


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a module's parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def grouped(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return the trainable weights in groups for an optimizer: weight decay on matrices and kernels alone.

    Source: Loshchilov & Hutter (2019).
    """
    free = [one for one in module.parameters() if one.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [one for one in free if one.ndim > 1], "weight_decay": decay}]
    groups += [{"params": [one for one in free if one.ndim <= 1], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warm_cosine(done: float, warm_up: float, begin: float) -> float:
    """Return the factor of the learning rate: a line from `begin` to 1, then half a cosine down to a hundredth.

    Args:
        done: fraction of the steps that are done.
        warm_up: fraction of the steps that the line takes.
        begin: the factor of the first step.

    Source: Loshchilov & Hutter (2017).

    >>> [round(warm_cosine(done, 0.02, 0.1), 3) for done in (0.0, 0.02, 1.0)]
    [0.1, 1.0, 0.01]
    """
    if done < warm_up:
        return begin + (1 - begin) * done / warm_up
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2


class Flat:
    """A module's trainable weights as one vector.

    Args:
        module: its parameters with `requires_grad` are trainable.

    >>> flat = Flat(nn.Linear(2, 1))
    >>> flat.read().shape, list(flat.named(torch.zeros(3)))
    (torch.Size([3]), ['weight', 'bias'])
    """

    def __init__(self, module: nn.Module) -> None:
        """Note the parameters; see the class."""
        self.module = module
        self.free = {name: one for name, one in module.named_parameters() if one.requires_grad}

    def read(self) -> Float[Tensor, " p"]:
        """Copy the weights into a vector."""
        return torch.cat([one.detach().reshape(-1) for one in self.free.values()])

    def named(self, row: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """Return views of a vector under the weights' names, in their dtype."""
        parts = row.split([one.numel() for one in self.free.values()])
        return {name: part.view(one.shape).to(one.dtype) for (name, one), part in zip(self.free.items(), parts, strict=True)}

    def write(self, row: Float[Tensor, " p"]) -> None:
        """Copy a vector into the weights."""
        with torch.no_grad():
            for name, value in self.named(row).items():
                self.free[name].copy_(value)

    def call_each(self, theta: Float[Tensor, "s p"], given: Float[Tensor, "s ..."]) -> Any:
        """Call the module with each row of weights and its own argument, as one batch."""
        return vmap(lambda row, argument: functional_call(self.module, self.named(row), (argument,)))(theta, given)
