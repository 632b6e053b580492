"""Training: the state of a run of gradient descent, one step and one round of it, and how it is written down and read back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from whichkl.families.network_family import NetworkFamily
from whichkl.files.journal import Journal, optimizer_state, tensors_behind
from whichkl.process.torch_modes import own_defaults
from whichkl.samples import Block
from whichkl.solvers.draws.criterion import Criterion

_ENTRY = "training"
_MEMORY = 100


@dataclass
class Run:
    """A module under training, its optimizer, and the best weights so far."""

    family: NetworkFamily
    criterion: Criterion
    module: nn.Module
    model: Any
    optimizer: torch.optim.Optimizer
    clip: float
    average: list[Tensor] = field(default_factory=list)
    """A moving average of the weights, over the last hundred steps or so: it is what is judged and kept."""
    taken: int = 0
    """Steps in that average."""
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    """The criterion on the rows to stop by, under the best weights."""
    best_error: float = math.inf
    """Its standard error."""
    start_loss: float = math.inf
    history: list[float] = field(default_factory=list)
    """The best loss after each round."""
    since: int = 0
    """Rounds since it last fell."""
    round: int = 0
    skipped: int = 0
    trouble: str = ""
    """What the first skipped batch ran into."""
    factor: float = 1.0
    """What the learning rate was multiplied by after rounds that diverged."""
    gradient: float = 0.0

    def step(self, block: Block, rate: float, generator: torch.Generator) -> float:
        """Take one step, or skip a batch whose loss or gradient isn't finite; return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.factor
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self.criterion.loss(self.model, block, generator)
            value = float(loss.detach())
            if not math.isfinite(value):
                return self._skip(f"its {self.criterion.what} was {'NaN' if math.isnan(value) else 'infinite'}")
            loss.backward()
        except ValueError as error:
            return self._skip(" ".join(str(error).split())[:200])
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip))
        if not math.isfinite(norm):
            return self._skip("its gradient was NaN or infinite")
        self.gradient = norm
        with own_defaults():  # it counts its steps in a tensor
            self.optimizer.step()
        self._mix()
        return value

    def judge(self, validation: Block) -> float:
        """Measure the loss on the rows to stop by, and keep the weights where it's the least so far."""
        now = [one.detach().clone() for one in self.weights]
        self._put(self.average or now)
        loss, error = self.criterion.measured(self.module, self.model, validation)
        if loss < self.best_loss:
            self.best_loss, self.best_error, self.since = loss, error, 0
            self.best = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        else:
            self.since += 1
        self._put(now)
        self.history.append(self.best_loss)
        return loss

    def restore(self, *, slower: float = 1.0) -> None:
        """Go back to the best weights; forget the optimizer's moments, and go on more slowly."""
        self.module.load_state_dict(self.best)
        self.optimizer.state.clear()
        self.average, self.taken = [], 0
        self.factor *= slower

    @property
    def optimized(self) -> list[Tensor]:
        """The weights in the optimizer's order."""
        return [one for group in self.optimizer.param_groups for one in group["params"]]

    @property
    def weights(self) -> list[Tensor]:
        """The weights that are trained."""
        return [one for one in self.module.parameters() if one.requires_grad]

    def save(self, journal: Journal, rate: float) -> None:
        """Write down everything that the next round depends on."""
        tensors = {f"now.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"average.{i}": value for i, value in enumerate(self.average)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        history = [str(one) for one in self.history]
        journal.save(
            _ENTRY, {name: value.clone() for name, value in tensors.items()}, {**numbers, "history": history, "rate": rate}
        )

    def resume(self, journal: Journal) -> float | None:
        """Take up what `save` wrote; return its learning rate, or None where there is nothing."""
        state, weights = self.module.state_dict(), self.optimized

        def read(tensors: dict[str, Tensor], notes: dict[str, Any]) -> tuple[Any, ...]:
            average = {str(i): one for i, one in enumerate(self.weights)} if "average.0" in tensors else {}
            averages = tensors_behind("average.", tensors, average)
            numbers = {name: kind(notes[name]) for name, kind in _NUMBERS.items()}
            numbers |= {"average": [averages[str(i)] for i in range(len(averages))]}
            numbers |= {"history": [float(one) for one in notes["history"]], "best": tensors_behind("best.", tensors, state)}
            return (
                tensors_behind("now.", tensors, state),
                optimizer_state("adam.", tensors, weights),
                numbers,
                float(notes["rate"]),
            )

        found = journal.load(_ENTRY, read)
        if found is None:
            return None
        now, adam, numbers, rate = found
        self.module.load_state_dict(now)
        self.optimizer.load_state_dict({"state": adam, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for name, value in numbers.items():
            setattr(self, name, value)
        return float(rate)

    def _mix(self) -> None:
        """Take the weights into their average: of all steps at first, then with a memory of `_MEMORY` steps.

        Source: Polyak & Juditsky (1992).
        """
        self.taken += 1
        now = [one.detach() for one in self.weights]
        if not self.average:
            self.average = [one.clone() for one in now]
        torch._foreach_lerp_(self.average, now, 1 / min(1 + self.taken / 10, _MEMORY))

    def _put(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for one, value in zip(self.weights, weights, strict=True):
                one.copy_(value)

    def _skip(self, why: str) -> float:
        self.skipped += 1
        self.trouble = self.trouble or why
        return math.nan


_NUMBERS: dict[str, type] = {
    "best_loss": float,
    "best_error": float,
    "start_loss": float,
    "since": int,
    "round": int,
    "taken": int,
    "skipped": int,
    "trouble": str,
    "factor": float,
    "gradient": float,
}


def started(family: NetworkFamily, criterion: Criterion, module: nn.Module, model: Any, decay: float, clip: float) -> Run:
    """Begin a run: AdamW, with weight decay on matrices alone, and on none where the family's weights have a meaning.

    Source: Loshchilov & Hutter (2019).
    """
    free = [one for one in module.parameters() if one.requires_grad]
    matrices = [one for one in free if one.ndim > 1]
    others = [one for one in free if one.ndim <= 1]
    groups: Iterable[Any] = [{"params": matrices, "weight_decay": decay if family.decays else 0.0}, {"params": others}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3, weight_decay=0.0)
    return Run(family, criterion, module, model, optimizer, clip)
