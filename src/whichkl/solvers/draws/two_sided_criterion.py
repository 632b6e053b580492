"""Both sides: a divergence between the directions as a criterion for training, on rows of p and draws of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl._checks import InputError, cannot
from whichkl.families.family import log_likelihood
from whichkl.objectives import Objective
from whichkl.process.seeds import seeded
from whichkl.samples import Block
from whichkl.solvers.draws.criterion import Criterion, judged
from whichkl.targets import Target


@dataclass(frozen=True)
class BothSides(Criterion):
    """The loss of a divergence between the directions, divided by its curvature, on a batch of rows and on fresh draws of q.

    The gradient is unbiased. Let ℓ = log p − log q, and gᵢ the derivative of the loss in ℓᵢ. Rows of p contribute
    −Σ gᵢ ∂ log q(xᵢ)/∂φ. Draws of q contribute Σ gᵢ ∇ₓℓ · ∂x/∂φ along x = x(z; φ), minus Σ (gᵢ − ḡ) ∂ log q(xᵢ)/∂φ with ḡ the
    mean of the other gⱼ, since E_q[∂ log q/∂φ] = 0. Where the loss is linear in ℓ, as in Jeffreys, that is sticking the
    landing; elsewhere it vanishes with the spread of g, as at q = p. Without `rsample` the first term is the score function's,
    Σ (fᵢ − f̄) ∂ log q(xᵢ)/∂φ, with fᵢ the derivative of the loss in the weight of xᵢ. The log of a mean, as in Rényi's
    divergence, is that of the batch, so its gradient has a bias of order 1/batch.

    Args:
        objective: the divergence.
        target: p, in the coordinates of the rows.
        log_z: subtracted from log p at draws of q; from that of the rows it is already.
        draws: of q a step.
        judged_on: draws of q, the same each time, by which the best weights are chosen.
        seed: fixes those.
        notes: what the user should know of log Z.

    Source: Roeder, Wu & Duvenaud (2017); Kool, van Hoof & Welling (2019) for the baseline.
    """

    what: ClassVar[str] = "divergence"
    instead: ClassVar[str] = (
        "Pass `support=` where log p is -inf at draws of the model, or use a bounded divergence such as jensen_shannon; else "
        "look at the starting weights, or give a smaller `learning_rate`"
    )

    objective: Objective
    target: Target
    log_z: float
    draws: int
    judged_on: int
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def scale(self) -> float:  # type: ignore[override]
        """The objective's curvature."""
        return self.objective.curvature

    def check(self, model: Any) -> None:
        """Refuse a law that is drawn along a path, and whose density doesn't change along it.

        Raises:
            InputError: as said.
        """
        if not (self.objective.reads_q and model.has_rsample):
            return
        with seeded(self.seed):
            x = model.sample((2,)).requires_grad_(True)
        (pull,) = torch.autograd.grad(model.log_prob(x).sum(), x, allow_unused=True)
        if pull is None:
            because = "its log density is flat, as that of a uniform law: the ends of its support have no gradient"
            raise InputError(cannot("differentiate along draws of the model", because, "Return a law with a smooth density"))

    def loss(self, model: Any, block: Block, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the loss of a batch, with the gradient that the class says."""
        at_p = w_p = at_q = w_q = block.w[:0]
        if self.objective.reads_p:
            at_p, w_p = _log_p(block) - log_likelihood(model, block.x).to(block.w), block.w / len(block)
        if self.objective.reads_q:
            at_q, w_q = self._drawn(model, block.w)
        return self.objective.loss(at_p, w_p, at_q, w_q) / self.scale

    def measured(self, module: nn.Module, model: Any, rows: Block) -> tuple[float, float]:
        """Return the loss on rows set aside and on the same noise each time, with the error of each point's influence."""
        none = rows.w[:0]
        at_p = at_q = none
        if self.objective.reads_p:
            log_q = judged(module, model, rows)
            if log_q is None:
                return math.inf, math.inf
            at_p = _log_p(rows) - log_q
        if self.objective.reads_q:
            module.eval()
            with torch.no_grad(), seeded(self.seed):
                x = model.sample((self.judged_on,))
                at_q = self._evaluated(x.reshape(len(x), -1)) - model.log_prob(x).to(none)
            module.train()
        w_p = rows.w / rows.w.sum() if len(at_p) else none
        weights = [w_p.clone().requires_grad_(True), torch.full_like(at_q, 1 / max(1, len(at_q))).requires_grad_(True)]
        with torch.enable_grad():
            loss = self.objective.loss(at_p, weights[0], at_q, weights[1]) / self.scale
        if not bool(loss.isfinite()):
            return math.inf, math.inf
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        pairs = [(w.detach(), one) for w, one in zip(weights, slopes, strict=True) if one is not None]
        parts = [(w * (one - w @ one)).square().sum() for w, one in pairs]
        return float(loss.detach()), math.sqrt(sum(float(one) for one in parts))

    def final(self, model: Any, best: float) -> float:
        """Return the loss on the rows set aside: the others were trained on."""
        return best

    @property
    def is_spent(self) -> bool:
        """Of the target's evaluations of any kind."""
        return self.target.evaluations.is_spent

    def _drawn(self, model: Any, like: Tensor) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Return ℓ at draws of q and their weights, both with the gradient that belongs to them."""
        m, has_path = self.draws, model.has_rsample
        x = model.rsample((m,)) if has_path else model.sample((m,))
        at = x.detach().requires_grad_(has_path)
        log_q = model.log_prob(at).to(like)
        score = log_q - log_q.detach()
        apart = (score - score.mean()) / (m - 1)
        if not has_path:
            at_q = self._evaluated(x.reshape(m, -1)) - log_q.detach() - m * apart
            return at_q, 1 / m + apart
        (pull,) = torch.autograd.grad(log_q.sum(), at, retain_graph=True)
        value, slope = self._trial(at.detach().reshape(m, -1))
        path = ((slope - pull.reshape(m, -1).to(like)) * (x - x.detach()).reshape(m, -1).to(like)).sum(-1)
        return value - log_q.detach() + path - m * apart, torch.full_like(log_q, 1 / m)

    def _evaluated(self, x: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        value = self.target.log_prob(x.to(self.target.device, self.target.dtype)).detach()
        return value.to(x.device, torch.float64) - self.log_z

    def _trial(self, x: Float[Tensor, "m d"]) -> tuple[Float[Tensor, " m"], Float[Tensor, "m d"]]:
        """Return log p and its gradient; −∞ and 0 outside the support, and where either isn't a number."""
        at = x.to(self.target.device, torch.float64)
        value, slope = self.target.trial(at)
        inside = self.target.bijection.contains(at) & value.isfinite() & slope.isfinite().all(-1)
        value, slope = torch.where(inside, value, -math.inf), torch.where(inside[:, None], slope, 0.0)
        return value.to(x.device, torch.float64) - self.log_z, slope.to(x.device, torch.float64)


def _log_p(block: Block) -> Float[Tensor, " n"]:
    if block.log_p is None:
        raise TypeError("log p of the rows wasn't evaluated")
    return block.log_p
