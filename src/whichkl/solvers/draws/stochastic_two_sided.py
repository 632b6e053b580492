"""Stochastic two-sided: divergences between the directions, to flows, networks of categories and users' modules, by batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.draws import bridge
from whichkl.families import Autoregressive, Family, Flow, Gaussian
from whichkl.families.flow import FlowNetwork
from whichkl.families.network_family import NetworkFamily
from whichkl.families.user_module import Module
from whichkl.objectives import Jeffreys, Objective
from whichkl.process.seeds import seeded
from whichkl.samples import Block
from whichkl.solvers.draws.batches import Data, Shuffled, data_of
from whichkl.solvers.draws.cosine_cycles import judging_seed
from whichkl.solvers.draws.criterion import BothSides, Criterion
from whichkl.solvers.draws.sticking_the_landing import gaussians_to_start
from whichkl.solvers.draws.stochastic import TRIAL, Stochastic
from whichkl.solvers.draws.training import Training
from whichkl.solvers.rows.closed_form import ClosedForm
from whichkl.solvers.rows.rows import log_prob_at_points
from whichkl.solvers.solver import check_counts
from whichkl.solvers.work import Work
from whichkl.targets import Target

_MAX_DRAWS_FOR_LOG_Z = 16_384
"""Largest number of draws of each side for the bridge to log Z."""
_SHARE_OF_ROWS, _SHARE_OF_TRIALS, _SHARE_OF_STEPS = 0.1, 0.25, 0.95
"""Shares of a budget: for draws of p, for trials of learning rates, and for the steps with their judging."""
_MAX_UNTRIED_RATE = 0.05
"""Largest learning rate that is used without a trial."""
_STARTS = 8
"""Number of Gaussians whose draws replace p's where p can't be sampled."""


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
        if not objective.is_between:
            raise TypeError(objective)
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
            data = replace(data, kept=replace(data.kept, evaluations=None))
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
        return max(1, min(total, int((_SHARE_OF_STEPS * criterion.left - 2 * self.judged_on) / self._cost(data))))

    def _best_rate(self, family: NetworkFamily, criterion: Criterion, data: Data, seed: int, work: Work) -> float:
        """Choose by trials if they take little of the budget; otherwise return a high rate, since there are few steps."""
        rates = self._rates(family)
        if len(rates) * TRIAL * self._cost(data) > _SHARE_OF_TRIALS * criterion.left:
            return min(rates[-1], _MAX_UNTRIED_RATE)
        return super()._best_rate(family, criterion, data, seed, work)

    def _cost(self, data: Data) -> float:
        """Return the evaluations of the target per step, with those of judging."""
        rows, judged = 0 if data.kept.evaluations is None else data.batches.size, len(data.validation)
        drawn, judged_on = (self._draws(data), self.judged_on) if self.minimised.reads_q else (0, 0)
        return max(1.0, rows + drawn + (judged_on + (judged if rows else 0)) / data.batches.steps)


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
