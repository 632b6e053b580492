"""Criterion: what minibatch training minimises, and how it is measured on rows that training doesn't see."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl.families.family import log_likelihood
from whichkl.families.network_family import NetworkFamily
from whichkl.samples import Block
from whichkl.solvers.rows.rows import Rows, mean_log_likelihood

CHUNK = 4_096
"""Rows that are judged at once."""


class Criterion(ABC):
    """A loss of batches of p's rows, its measure on rows set aside, and when the target's evaluations are used up."""

    what: ClassVar[str]
    """What isn't a number where the loss isn't, for messages."""
    instead: ClassVar[str] = "Look at the scale of the data and at the starting weights, or give a smaller `learning_rate`"
    """What to do about it."""
    scale: float = 1.0
    """What a loss is multiplied by to be the divergence."""
    notes: tuple[str, ...] = ()
    """What the user should know of it."""

    @abstractmethod
    def loss(self, model: Any, block: Block, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the loss of a batch in nats, its gradient attached; its weights average 1 over all batches."""

    @abstractmethod
    def measured(self, module: nn.Module, model: Any, rows: Block) -> tuple[float, float]:
        """Return the loss on rows set aside and its standard error, in nats; infinite where it isn't a number."""

    @abstractmethod
    def final(self, model: Any, best: float) -> float:
        """Return the loss of the model that is kept, whose loss on the rows set aside was `best`."""

    @property
    @abstractmethod
    def is_spent(self) -> bool:
        """Whether as many evaluations of the target were used as may be."""


@dataclass(frozen=True)
class Likelihood(Criterion):
    """Mean −log q of the rows, or the family's bound of it: forward KL plus H(p).

    Args:
        family: whose loss it is.
        kept: the rows that aren't held out.
        is_stream: whether they are read in parts, so that no pass is made for the final loss alone.
    """

    what: ClassVar[str] = "log density"

    family: NetworkFamily
    kept: Rows
    is_stream: bool

    def loss(self, model: Any, block: Block, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the weighted mean over the batch."""
        losses = self.family.loss(model, block.x, block.context, generator)
        return (block.w.to(losses) * losses).mean()

    def measured(self, module: nn.Module, model: Any, rows: Block) -> tuple[float, float]:
        """Return the weighted mean of −log q over rows."""
        log_q = judged(module, model, rows)
        if log_q is None:
            return math.inf, math.inf
        share = rows.w / rows.w.sum()
        mean = -float(share @ log_q)
        error = float((share.square() @ (log_q + mean).square()).sqrt())
        return (mean, error) if math.isfinite(mean) else (math.inf, math.inf)

    def final(self, model: Any, best: float) -> float:
        """Return the mean over all rows that aren't held out; of a stream, that over the rows set aside."""
        return best if self.is_stream else -mean_log_likelihood(model, self.kept)

    @property
    def is_spent(self) -> bool:
        """Of reads of the rows."""
        return self.kept.is_spent


def judged(module: nn.Module, model: Any, rows: Block) -> Float[Tensor, " n"] | None:
    """Return log q of rows under the module as it is used, without dropout; None where it refuses them."""
    module.eval()
    parts = []
    with torch.no_grad():
        for i in range(0, len(rows), CHUNK):
            block = rows.take(torch.arange(i, min(i + CHUNK, len(rows)), device="cpu"))
            try:
                parts.append(log_likelihood(model, block.x, block.context).to(rows.w))
            except ValueError:
                return None
    module.train()
    return torch.cat(parts)
