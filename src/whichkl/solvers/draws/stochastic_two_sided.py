"""Stochastic two-sided: divergences between the directions, to flows, networks of categories and users' modules, by batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.draws import bridge
from whichkl.families import Autoregressive, Family, Flow, Gaussian
from whichkl.families.family import log_likelihood
from whichkl.families.flow import FlowNetwork
from whichkl.families.network_family import NetworkFamily
from whichkl.families.user_module import Module
from whichkl.objectives import Jeffreys, Objective
from whichkl.process.seeds import seeded
from whichkl.samples import Block
from whichkl.solvers.draws.batches import Data, Shuffled, data_of
from whichkl.solvers.draws.cosine_cycles import judging_seed
from whichkl.solvers.draws.sticking_the_landing import gaussians_to_start
from whichkl.solvers.draws.stochastic import TRIAL, Stochastic
from whichkl.solvers.draws.training import Criterion, Training, log_prob_of_rows
from whichkl.solvers.rows.closed_form import ClosedForm
from whichkl.solvers.rows.rows import log_prob_at_points
from whichkl.solvers.solver import check_counts
from whichkl.solvers.work import Work
from whichkl.targets import Target
from whichkl.targets.evaluations import Evaluations

_MAX_DRAWS_FOR_LOG_Z = 16_384
"""Largest number of draws of each side for the bridge to log Z."""
_SHARE_OF_ROWS, _SHARE_OF_TRIALS, _SHARE_OF_STEPS = 0.1, 0.25, 0.95
"""Shares of a budget: for draws of p, for trials of learning rates, and for the steps with their judging."""
_MAX_UNTRIED_RATE = 0.05
"""Largest learning rate that is used without a trial."""
_STARTS = 8
"""Number of Gaussians whose draws replace p's where p can't be sampled."""


@dataclass(frozen=True)
class BothSides(Criterion):
    """The loss of a divergence between the directions, divided by its curvature, on a batch of rows and on fresh draws of q.

    The gradient is unbiased. Let ℓ = log p − log q, and gᵢ the derivative of the loss in ℓᵢ. Rows of p contribute
    −Σ gᵢ ∂ log q(xᵢ)/∂φ. Draws of q contribute Σ gᵢ ∇ₓℓ · ∂x/∂φ along x = x(z; φ), minus Σ (gᵢ − ḡ) ∂ log q(xᵢ)/∂φ with ḡ the
    mean of the other gⱼ, since E_q[∂ log q/∂φ] = 0. If the loss is linear in ℓ, as in Jeffreys, this is sticking the landing;
    otherwise the second term vanishes with the spread of g, as at q = p. Without `rsample` the first term is the score
    function's, Σ (fᵢ − f̄) ∂ log q(xᵢ)/∂φ, with fᵢ the derivative of the loss in the weight of xᵢ. The log of a mean, as in
    Rényi's divergence, is that of the batch, so its gradient has a bias of order 1/batch.

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
    """Subtracted from log p at draws of q; log p of the rows is already normalised."""
    draws: int
    judged_on: int
    """Number of draws of q by which the best weights are chosen, the same ones each time."""
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def scale(self) -> float:  # type: ignore[override]
        """The objective's curvature."""
        return self.objective.curvature

    def check(self, model: Any) -> None:
        """Refuse a law whose draws are differentiable, and whose density is flat along them."""
        if not (self.objective.reads_q and model.has_rsample):
            return
        with seeded(self.seed):
            x = model.sample((2,)).requires_grad_(True)
        (pull,) = torch.autograd.grad(model.log_prob(x).sum(), x, allow_unused=True)
        if pull is None:
            because = "its log density is flat, as that of a uniform law: the ends of its support have no gradient"
            raise InputError(cannot("differentiate along draws of the model", because, "Return a law with a smooth density"))

    def loss(self, model: Any, block: Block, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the loss of a batch, with the gradient given above."""
        at_p = w_p = at_q = w_q = block.w[:0]
        if self.objective.reads_p:
            at_p, w_p = _log_p(block) - log_likelihood(model, block.x).to(block.w), block.w / len(block)
        if self.objective.reads_q:
            at_q, w_q = self._drawn(model, block.w)
        return self.objective.loss(at_p, w_p, at_q, w_q) / self.scale

    def measured(self, module: nn.Module, model: Any, rows: Block) -> tuple[float, float]:
        """Return the loss on validation rows and on fixed noise, with the standard error from each point's influence."""
        none = rows.w[:0]
        at_p = at_q = none
        if self.objective.reads_p:
            log_q = log_prob_of_rows(module, model, rows)
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

    @property
    def evaluations(self) -> Evaluations:
        """The counts of the target's evaluations."""
        return self.target.evaluations

    def _drawn(self, model: Any, like: Tensor) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Return ℓ at draws of q and their weights, both with their gradients."""
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
        """Return log p and its gradient; −∞ and 0 outside the support, and where either isn't finite."""
        at = x.to(self.target.device, torch.float64)
        value, slope = self.target.trial(at)
        inside = self.target.bijection.contains(at) & value.isfinite() & slope.isfinite().all(-1)
        value, slope = torch.where(inside, value, -math.inf), torch.where(inside[:, None], slope, 0.0)
        return value.to(x.device, torch.float64) - self.log_z, slope.to(x.device, torch.float64)


@dataclass(frozen=True)
class StochasticTwoSided(Stochastic):
    """argmin of a divergence between the directions over a network's weights, trained as `Stochastic` trains, on both sides.

    A step reads a batch of p's rows and makes `draws` draws of q. The objectives use them as follows:

    | objective | rows of p | draws of q | log p, log Z |
    |---|---|---|---|
    | Jeffreys | −w mean log q | −(1 − w) mean ℓ | at draws of q; log Z is a constant |
    | Jensen–Shannon | w mean log p/m | (1 − w) mean log q/m | at both, normalised |
    | skew forward KL | mean log p/m | none | at rows of p, normalised |
    | skew reverse KL | none | mean log q/m | at draws of q, normalised |
    | Rényi, order a < 1 | half of J | half of J | at both; log Z by bridge sampling, once, before training |
    | Rényi, order a > 1 | log mean (p/q)ᵃ⁻¹ | none | at rows of p; log Z is a constant |

    A flow starts at rest, as the normal law with the means and scales of the rows. Gradients are those of `BothSides`:
    reparameterised if the law has `rsample`, otherwise by the score function. log p is evaluated once at p's rows. The best
    weights have the least divergence on a tenth of the rows and on `judged_on` draws of q from fixed noise. Batches whose
    divergence is infinite or NaN are skipped and counted. log Z is bridged between the rows and their Gaussian of maximum
    likelihood, in free coordinates.

    Args:
        draws: number of draws of q per step; by default as many as rows per batch.
        judged_on: number of draws of q by which weights are judged.

    Raises:
        InputError: a field is out of range.

    Source: Roeder, Wu & Duvenaud (2017); Meng & Wong (1996) for log Z; the objectives name their own.

    >>> StochasticTwoSided(draws=64).quick().steps
    1000
    """

    name = "stochastic_two_sided"
    direction = "between"
    families = (Flow, Autoregressive, Module)

    draws: int | None = None
    judged_on: int = 2_048
    minimised: Objective = field(default_factory=Jeffreys)
    """The objective, which `fit` sets."""

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_counts(self, draws=2, judged_on=2)

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the network needs no context."""
        return not family.conditional or family.optional_context

    def toward(self, objective: Objective) -> StochasticTwoSided:
        """Return the solver of this objective."""
        return replace(self, minimised=objective)

    def _problem(self, target: Target, family: NetworkFamily, seed: int, work: Work, stride: int) -> tuple[Data, Criterion]:
        """Return the rows with their log p, and the divergence."""
        rows = target if target.access.can_sample else _gaussian_draws(target, family, seed)
        data = data_of(rows, family, seed, work, stride, self.batch, share=_SHARE_OF_ROWS)
        if not isinstance(data.batches, Shuffled):
            raise TypeError(data.batches)
        log_z, notes = 0.0, tuple[str, ...]()
        if self.minimised.reads_p:
            blocks = (data.batches.block, data.validation)
            log_p = [log_prob_at_points(target, one.x) for one in blocks]
            if self.minimised.reads_log_z and not target.normalized:
                log_z, notes = _log_z(target, blocks[0], self.minimised, seed)
            train, aside = (replace(one, log_p=value - log_z) for one, value in zip(blocks, log_p, strict=True))
            data.batches.block, data = train, replace(data, validation=aside)
        else:  # rows set the number of steps; nothing else of them is used
            data = replace(data, kept=replace(data.kept, evaluations=Evaluations()))
        numbers = (self._draws(data), self.judged_on, judging_seed(seed))
        return data, BothSides(self.minimised, target, log_z, *numbers, notes)

    def _draws(self, data: Data) -> int:
        """Return the number of draws of q per step."""
        return self.draws or max(2, data.batches.size)

    def _begin(self, family: NetworkFamily, criterion: Criterion, data: Data, seed: int) -> Training:
        """Put a flow at rest, and refuse a law without a gradient if one is needed."""
        run = super()._begin(family, criterion, data, seed)
        if isinstance(run.module, FlowNetwork):
            run.module.rest()
        if isinstance(criterion, BothSides):
            criterion.check(run.model)
        return run

    def _total(self, data: Data, criterion: Criterion) -> int:
        """Return the steps of the schedule, or those that the budget allows, so that the learning rate falls to its end."""
        total = super()._total(data, criterion)
        if math.isinf(criterion.left):
            return total
        return max(1, min(total, int((_SHARE_OF_STEPS * criterion.left - 2 * self.judged_on) / self._cost(data, criterion))))

    def _best_rate(self, family: NetworkFamily, criterion: Criterion, data: Data, seed: int, work: Work) -> float:
        """Choose by trials if they take little of the budget; otherwise return a high rate, since there are few steps."""
        rates = self._rates(family)
        if len(rates) * TRIAL * self._cost(data, criterion) > _SHARE_OF_TRIALS * criterion.left:
            return min(rates[-1], _MAX_UNTRIED_RATE)
        return super()._best_rate(family, criterion, data, seed, work)

    def _cost(self, data: Data, criterion: Criterion) -> float:
        """Return the evaluations of the target per step, with those of judging."""
        are_counted = data.kept.evaluations is criterion.evaluations
        rows, judged = (data.batches.size, len(data.validation)) if are_counted else (0, 0)
        drawn, judged_on = (self._draws(data), self.judged_on) if self.minimised.reads_q else (0, 0)
        return max(1.0, rows + drawn + (judged_on + judged) / data.batches.steps)


def _log_z(target: Target, block: Block, objective: Objective, seed: int) -> tuple[float, tuple[str, ...]]:
    """Return log Z and doubts: a sum over all states, or a bridge between rows of p and their maximum-likelihood Gaussian.

    Raises:
        TargetError: there is neither, or the Gaussian and p don't overlap.
    """
    if Access.ENUMERABLE in target.access:
        return float(target.atoms[1].logsumexp(0)), ()
    if target.bijection.is_discrete:
        because = "log Z isn't known, and the states are too many to list"
        raise TargetError(cannot(f"minimise `{objective.spec}` here", because, "Give a normalised log density"))
    free, generator = target.unconstrained(), torch.Generator().manual_seed(seed)
    rows = torch.multinomial(block.w.cpu(), min(_MAX_DRAWS_FOR_LOG_Z, len(block)), replacement=False, generator=generator)
    if bool((block.w != block.w[0]).any()):
        rows = torch.multinomial(block.w.cpu(), len(rows), replacement=True, generator=generator)
    x = target.bijection.inverse(block.x[rows.to(block.x.device)])
    near = ClosedForm().solve(Target(samples=x), Gaussian(), seed).best.model
    with seeded(seed):
        drawn = near.sample((len(x),))
    at = [free.log_prob(one.to(free.dtype)).detach().to(x) - near.log_prob(one) for one in (x, drawn)]
    found = bridge.bridge(at[0], at[1])
    doubt = f"log Z, on which the divergence depends, is known from only {found.ess:.0f} effective draws"
    return found.log_z, (doubt,) if found.ess < bridge.MIN_ESS else ()


def _gaussian_draws(target: Target, family: NetworkFamily, seed: int) -> Target:
    """Return a target of draws of the reverse-KL Gaussians, which give a network its place and scale where p can't be sampled.

    Raises:
        TargetError: the target is discrete.
    """
    if target.bijection.is_discrete:
        because = "it is discrete and can't be sampled, so the network's categories aren't known"
        raise TargetError(cannot(f"fit `{family}` to this target", because, "Pass `sampler=` or `samples=`"))
    locs, trils = gaussians_to_start(target.unconstrained(), seed, _STARTS)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(locs), (n,), generator=generator, device="cpu").to(locs.device)
        z = torch.randn(n, locs.shape[1], generator=generator, dtype=locs.dtype, device="cpu").to(locs.device)
        return target.bijection.forward(locs[which] + (trils[which] @ z[:, :, None])[..., 0])

    return Target(sampler=draw, dim=target.dim, names=target.names, device=target.device)


def _log_p(block: Block) -> Float[Tensor, " n"]:
    if block.log_p is None:
        raise TypeError("log p of the rows wasn't evaluated")
    return block.log_p
