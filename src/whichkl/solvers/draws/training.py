"""Training: the loss of batches of rows, a network trained on it, the moving average of its weights, and how it is resumed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl.families.family import log_likelihood
from whichkl.families.network_family import NetworkFamily
from whichkl.files.journal import Journal, tensors_behind
from whichkl.samples import Block
from whichkl.solvers.descent import Run
from whichkl.solvers.rows.rows import Rows, mean_log_likelihood
from whichkl.targets.evaluations import Evaluations

_ROWS_PER_CALL = 4_096
"""Number of rows that are judged at once."""
_STEPS_IN_AVERAGE = 100
"""The number of steps after which a weight's share in the moving average has fallen by a factor e."""


class Criterion(ABC):
    """A loss of batches of p's rows, and its measure on validation rows."""

    what: ClassVar[str]
    """The name of the loss in messages."""
    instead: ClassVar[str] = "Look at the scale of the data and at the starting weights, or give a smaller `learning_rate`"
    """The advice where the loss isn't finite."""
    scale: float = 1.0
    """The factor from the loss to the divergence."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about the loss."""

    @abstractmethod
    def loss(self, model: Any, block: Block, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the loss of a batch in nats, differentiable; weights average 1 over all batches."""

    @abstractmethod
    def measured(self, module: nn.Module, model: Any, rows: Block) -> tuple[float, float]:
        """Return the loss on validation rows and its standard error, in nats; infinite where it isn't a number."""

    def final(self, model: Any, best: float) -> float:
        """Return the loss of the model that is kept; by default `best`, its loss on the validation rows."""
        return best

    @property
    @abstractmethod
    def evaluations(self) -> Evaluations:
        """The counts of the target's evaluations."""

    @property
    def left(self) -> float:
        """The number of evaluations that may still be used."""
        return max(0.0, self.evaluations.most - self.evaluations.total)


@dataclass(frozen=True)
class Likelihood(Criterion):
    """Mean −log q of the rows, or the family's bound of it: forward KL plus H(p)."""

    what: ClassVar[str] = "log density"

    family: NetworkFamily
    kept: Rows
    """The rows that aren't held out."""
    is_stream: bool
    """Whether they are read in parts; then no pass is made for the final loss alone."""

    def loss(self, model: Any, block: Block, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the weighted mean over the batch."""
        losses = self.family.loss(model, block.x, block.context, generator)
        return (block.w.to(losses) * losses).mean()

    def measured(self, module: nn.Module, model: Any, rows: Block) -> tuple[float, float]:
        """Return the weighted mean of −log q over rows."""
        log_q = log_prob_of_rows(module, model, rows)
        if log_q is None:
            return math.inf, math.inf
        share = rows.w / rows.w.sum()
        mean = -float(share @ log_q)
        error = float((share.square() @ (log_q + mean).square()).sqrt())
        return (mean, error) if math.isfinite(mean) else (math.inf, math.inf)

    def final(self, model: Any, best: float) -> float:
        """Return the mean over all rows that aren't held out; for a stream, the mean over the validation rows."""
        return best if self.is_stream else -mean_log_likelihood(model, self.kept)

    @property
    def evaluations(self) -> Evaluations:
        """The counts of the rows."""
        return self.kept.evaluations


def log_prob_of_rows(module: nn.Module, model: Any, rows: Block) -> Float[Tensor, " n"] | None:
    """Return log q of rows under the module without dropout; None if it refuses them."""
    module.eval()
    parts = []
    with torch.no_grad():
        for i in range(0, len(rows), _ROWS_PER_CALL):
            block = rows.take(torch.arange(i, min(i + _ROWS_PER_CALL, len(rows)), device="cpu"))
            try:
                parts.append(log_likelihood(model, block.x, block.context).to(rows.w))
            except ValueError:
                return None
    module.train()
    return torch.cat(parts)


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
        "rate": float,
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
    rate: float = math.nan
    """The peak learning rate."""

    def step(self, block: Block, rate: float, generator: torch.Generator) -> float:
        """Take one step and average its weights, or skip a batch whose loss or gradient isn't finite; return the loss."""
        before = self.skipped
        value = self.descend(
            lambda: self.criterion.loss(self.model, block, generator), rate * self.factor, self.criterion.what, (ValueError,)
        )
        if self.skipped == before:
            self.taken += 1
            now = [one.detach() for one in self.weights]
            if not self.average:
                self.average = [one.clone() for one in now]
            # Over all steps at first, then over the last `_STEPS_IN_AVERAGE` or so.
            torch._foreach_lerp_(self.average, now, 1 / min(1 + self.taken / 10, _STEPS_IN_AVERAGE))
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

    def restore(self) -> None:
        """Go back to the best weights, forget the optimizer's moments, and halve the learning rate."""
        self.module.load_state_dict(self.best)
        self.optimizer.state.clear()
        self.average, self.taken = [], 0
        self.factor /= 2

    @property
    def weights(self) -> list[Tensor]:
        """The weights that are trained."""
        return [one for one in self.module.parameters() if one.requires_grad]

    def write(self, journal: Journal) -> None:
        """Write down everything that the next round depends on."""
        average = {f"average.{i}": value.clone() for i, value in enumerate(self.average)}
        self.save(journal, average, {"history": [str(one) for one in self.history]})

    def read(self, journal: Journal) -> bool:
        """Take up what `write` wrote; return whether there was anything."""

        def fields(tensors: dict[str, Tensor], notes: dict[str, Any]) -> dict[str, Any]:
            like = {str(i): one for i, one in enumerate(self.weights)} if "average.0" in tensors else {}
            average = tensors_behind("average.", tensors, like)
            history = [float(one) for one in notes["history"]]
            return {"average": [average[str(i)] for i in range(len(average))], "history": history}

        return self.resume(journal, fields)

    def _put(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for one, value in zip(self.weights, weights, strict=True):
                one.copy_(value)
