"""Training: a network trained on batches of rows, the moving average of its weights, and how the run is resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whichkl.families.network_family import NetworkFamily
from whichkl.files.journal import Journal, tensors_behind
from whichkl.samples import Block
from whichkl.solvers.descent import Run, grouped
from whichkl.solvers.draws.criterion import Criterion

_STEPS_IN_AVERAGE = 100
"""The number of steps after which a weight's share in the moving average has fallen by a factor e."""


@dataclass
class Training(Run):
    """A run on batches of p's rows; what is judged and kept is the moving average of the weights.

    Source: Polyak & Juditsky (1992) for the average.
    """

    numbers: ClassVar[dict[str, type]] = {
        **Run.numbers,
        "best_error": float,
        "start_loss": float,
        "taken": int,
        "factor": float,
        "gradient": float,
    }

    family: NetworkFamily = field(kw_only=True)
    criterion: Criterion = field(kw_only=True)
    model: Any = field(kw_only=True)
    average: list[Tensor] = field(default_factory=list)
    """The moving average of the weights."""
    taken: int = 0
    """Steps in the average."""
    best_error: float = math.inf
    """Standard error of the best loss."""
    start_loss: float = math.inf
    history: list[float] = field(default_factory=list)
    """The best loss after each round."""
    factor: float = 1.0
    """The learning rate's factor, which falls after rounds that diverged."""

    def step(self, block: Block, rate: float, generator: torch.Generator) -> float:
        """Take one step, or skip a batch whose loss or gradient isn't finite; return the loss."""
        before = self.skipped
        value = self.descend(
            lambda: self.criterion.loss(self.model, block, generator), rate * self.factor, self.criterion.what, (ValueError,)
        )
        if self.skipped == before:
            self._mix()
        return value

    def judge(self, validation: Block) -> float:
        """Measure the loss on the rows set aside, and keep the averaged weights if it is the least so far."""
        now = [one.detach().clone() for one in self.weights]
        self._put(self.average or now)
        loss, error = self.criterion.measured(self.module, self.model, validation)
        if self.keep(loss):
            self.best_error = error
        self._put(now)
        self.history.append(self.best_loss)
        return loss

    def restore(self, *, slower: float = 1.0) -> None:
        """Go back to the best weights, forget the optimizer's moments, and multiply the learning rate by `slower`."""
        self.module.load_state_dict(self.best)
        self.optimizer.state.clear()
        self.average, self.taken = [], 0
        self.factor *= slower

    @property
    def weights(self) -> list[Tensor]:
        """The weights that are trained."""
        return [one for one in self.module.parameters() if one.requires_grad]

    def write(self, journal: Journal, rate: float) -> None:
        """Write down everything that the next round depends on."""
        average = {f"average.{i}": value.clone() for i, value in enumerate(self.average)}
        self.save(journal, average, {"history": [str(one) for one in self.history], "rate": rate})

    def read(self, journal: Journal) -> float | None:
        """Take up what `write` wrote; return its learning rate, or None where there is nothing."""
        rates = []

        def fields(tensors: dict[str, Tensor], notes: dict[str, Any]) -> dict[str, Any]:
            like = {str(i): one for i, one in enumerate(self.weights)} if "average.0" in tensors else {}
            average = tensors_behind("average.", tensors, like)
            rates.append(float(notes["rate"]))
            return {
                "average": [average[str(i)] for i in range(len(average))],
                "history": [float(one) for one in notes["history"]],
            }

        return rates[-1] if self.resume(journal, fields) else None

    def _mix(self) -> None:
        """Take the weights into their average: over all steps at first, then over the last `_STEPS_IN_AVERAGE` or so."""
        self.taken += 1
        now = [one.detach() for one in self.weights]
        if not self.average:
            self.average = [one.clone() for one in now]
        torch._foreach_lerp_(self.average, now, 1 / min(1 + self.taken / 10, _STEPS_IN_AVERAGE))

    def _put(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for one, value in zip(self.weights, weights, strict=True):
                one.copy_(value)


def start_training(
    family: NetworkFamily, criterion: Criterion, module: nn.Module, model: Any, decay: float, clip: float
) -> Training:
    """Begin a run of AdamW; a family whose weights have a meaning, such as a user's module, has no weight decay."""
    optimizer = torch.optim.AdamW(grouped(module, decay if family.decays else 0.0), lr=1e-3, weight_decay=0.0)
    return Training(module, optimizer, clip, family=family, criterion=criterion, model=model)
