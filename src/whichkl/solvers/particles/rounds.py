"""Rounds: a model is drawn from, points and draws are weighted to p, and the model is fitted to them again."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.families import Family
from whichkl.families.family import log_likelihood
from whichkl.importance import effective_sample_size
from whichkl.particles.pool import Points, Pool
from whichkl.solvers.particles.value import Proposal, are_trusted, tail
from whichkl.solvers.solver import Optimum, Solution, Solver
from whichkl.targets import Target


class Rounds:
    """The points and all draws so far, log p there, and the log density of every model that was drawn from."""

    def __init__(self, target: Target, family: Family, engine: Solver, points: Points, first: Solution) -> None:
        self.target, self.family, self.engine, self.points = target, family, engine, points
        self.last, self.model, self.iterations, self.settled = first, first.best.model, first.iterations, False
        self.x, self.log_p, self.weights = points.x, points.log_p, points.weights
        self.log_q = points.log_p.new_zeros(0, len(points.x))
        """Of each proposal at each point and draw."""
        self.proposals: list[Proposal] = []
        self.counts: list[int] = []
        self.ess, self.ratio = 0.0, points.log_p[:0]
        """The ESS of the last model's draws, as a share, and the logarithms of the last draws' weights."""

    @property
    def khat(self) -> float:
        """k̂ of the weights of the last draws."""
        return tail(self.ratio) if len(self.ratio) else math.inf

    @property
    def is_trusted(self) -> bool:
        """Whether these weights can stand for p."""
        return len(self.ratio) > 0 and are_trusted(self.ratio, self.khat)

    @property
    def note(self) -> str:
        """What was drawn, in words."""
        drawn = f"{sum(self.counts):,} draws of {len(self.proposals)} models were weighted to p"
        return f"{drawn}; those of the last model had an ESS of {self.ess:.1%}"

    @property
    def proposal(self) -> Proposal:
        """The model, and a wider law around the points as they are weighted."""
        return Proposal.around(self.model, self.x, self.weights)

    def draw(self, count: int, seed: int) -> float:
        """Draw from the model, weight all points and draws, and return the gain of the ESS since the last round, as a share."""
        before, proposal = self.ess if self.proposals else -math.inf, self.proposal
        x, log_p = proposal.draw(self.target, count, seed)
        by_others = [one.log_prob(x, log_likelihood(one.model, x).detach()) for one in self.proposals]
        self.proposals.append(proposal)
        self.counts.append(count)
        self.x, self.log_p = torch.cat([self.x, x]), torch.cat([self.log_p, log_p])
        log_q = log_likelihood(self.model, self.x).detach()
        mine = proposal.log_prob(self.x, log_q)
        earlier = torch.cat([self.log_q, torch.stack(by_others)], 1) if by_others else mine.new_zeros(0, len(mine))
        self.log_q = torch.cat([earlier, mine[None]])
        own = (log_p - log_q[-count:])[: proposal.own(count)]
        self.ess, self.ratio = effective_sample_size(own) / len(own), log_p - mine[-count:]
        shares = torch.tensor(self.counts, dtype=torch.float64, device="cpu").log() - math.log(sum(self.counts))
        log_m = torch.logsumexp(self.log_q + shares[:, None], 0)
        self.weights = Pool.of(self.points, self.log_p[len(self.points.x) :], log_m).weights
        return self.ess - before

    def fit(self, seed: int) -> None:
        """Fit to all points and draws, from the model as it is."""
        used = self.weights > 0
        rows = weighted_rows(self.target, self.x[used], self.weights[used])
        self.last = self.engine.near(self.model, 0.0).solve(rows, self.family, seed)
        self.model, self.iterations = self.last.best.model, self.iterations + self.last.iterations

    def solution(self, *, is_last: bool) -> Solution:
        """Return the model, with its cross-entropy on the weighted points and draws."""
        log_q = log_likelihood(self.model, self.x).detach()
        loss = -float(torch.where(self.weights > 0, self.weights * log_q, 0.0).sum())
        best = Optimum(self.model, loss, self.last.best.converged and (self.settled or is_last), is_global=True)
        return Solution((best,), self.iterations, self.last.residual, notes=self.last.notes, history=self.last.history)


def weighted_rows(target: Target, x: Float[Tensor, "n d"], w: Float[Tensor, " n"]) -> Target:
    """Return a target that has weighted rows alone."""
    return Target(samples=x, weights=w, names=target.names, support=target.bijection.constraints)
