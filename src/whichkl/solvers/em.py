"""EM: maximum likelihood for mixtures of Gaussians, several k-means++ starts in one batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.families import Family, Mixture
from whichkl.families.mixture import mixture
from whichkl.objectives import ForwardKL, Objective
from whichkl.solvers.points import points_of
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.targets import Target

_BLOCK = 4096
_PRIOR = 1e-6


@dataclass(frozen=True)
class ExpectationMaximization(Solver):
    """argmin KL(p‖q) over mixtures: responsibilities, then weighted moments, until the likelihood stays.

    Every covariance carries a prior of `_PRIOR` times the data's variances plus δ²/12, δ the step in which a column was
    recorded, so that no component can collapse onto a point, or onto a line of rounded values. All starts run as one
    batch; blocks of rows keep the memory flat.

    Source: Dempster, Laird & Rubin (1977); starts, Arthur & Vassilvitskii (2007).
    """

    name: ClassVar[str] = "em"
    objective: ClassVar[type[Objective]] = ForwardKL
    families: ClassVar[tuple[type[Family], ...]] = (Mixture,)

    starts: int = 5
    tolerance: float = 1e-9
    max_iterations: int = 500

    def quick(self) -> ExpectationMaximization:
        """Two starts and 1e-5 nats a row: far below the error of a held-out mean."""
        return replace(self, starts=min(2, self.starts), tolerance=1e-5, max_iterations=200)

    def solve(self, target: Target, family: Family, seed: int) -> Solution:
        """Run EM from every start and keep the distinct optima."""
        if not isinstance(family, Mixture):
            raise TypeError(family)
        x, w = points_of(target, seed)
        shift, scale = w @ x, (w @ (x - w @ x).square()).sqrt()
        y = (x - shift) / scale
        prior = torch.diag(_PRIOR + (resolution(x) / scale).square() / 12)
        state = _start(y, w, self.starts, family.components, seed)
        before, change = torch.full((self.starts,), -math.inf, dtype=y.dtype), math.inf
        iterations = 0
        while change >= self.tolerance and iterations < self.max_iterations:
            likelihood, state = _step(y, w, *state, prior, diagonal=family.covariance == "diagonal")
            change = float((likelihood - before).abs().max())
            before = likelihood
            iterations += 1
        found = []
        for probs, loc, cov in zip(*state, strict=True):
            tril = torch.diag(scale) @ torch.linalg.cholesky(cov)
            model = mixture(probs, shift + scale * loc, tril, family.covariance)
            found.append(Optimum(model, float(ForwardKL().loss(model, x, w)), change < 1e-6, False))
        return Solution(distinct(found), iterations, change)


def resolution(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The step in which each column was recorded: its smallest gap where most values repeat, 0 where they don't."""
    steps = []
    for column in x.T:
        values = column.unique()
        steps.append(values.diff().min() if 1 < len(values) < len(column) / 2 else column.new_zeros(()))
    return torch.stack(steps)


State = tuple[Float[Tensor, "s k"], Float[Tensor, "s k d"], Float[Tensor, "s k d d"]]


def _start(y: Float[Tensor, "n d"], w: Float[Tensor, " n"], starts: int, count: int, seed: int) -> State:
    """k-means++ seeding: each next centre drawn with probability proportional to w × squared distance."""
    generator = torch.Generator(y.device).manual_seed(seed)
    first = torch.multinomial(w, starts, replacement=True, generator=generator)
    centres = y[first][:, None]
    nearest = torch.cdist(y, centres[:, 0]).square()
    for _ in range(1, count):
        chance = (w[:, None] * nearest).T + 1e-300
        pick = y[torch.multinomial(chance, 1, generator=generator)[:, 0]]
        centres = torch.cat([centres, pick[:, None]], 1)
        nearest = torch.minimum(nearest, torch.cdist(y, pick).square())
    dim = y.shape[1]
    spread = torch.eye(dim, dtype=y.dtype, device=y.device) / max(1.0, count ** (1 / dim)) ** 2
    even = torch.full((starts, count), 1 / count, dtype=y.dtype, device=y.device)
    return even, centres, spread.expand(starts, count, dim, dim)


def _step(
    y: Tensor, w: Tensor, probs: Tensor, loc: Tensor, cov: Tensor, prior: Tensor, *, diagonal: bool
) -> tuple[Tensor, State]:
    """One E and one M step for all starts: one matrix product a block for the densities, two for the moments."""
    starts, count, dim = loc.shape
    tril = torch.linalg.cholesky(cov)
    identity = torch.eye(dim, dtype=y.dtype, device=y.device)
    inverse = torch.linalg.solve_triangular(tril, identity.expand_as(tril), upper=False)
    offset = (inverse @ loc[..., None])[..., 0].reshape(-1)
    rows = inverse.reshape(-1, dim)
    constant = probs.log() - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * dim * math.log(2 * math.pi)
    mass = torch.zeros(starts * count, dtype=y.dtype, device=y.device)
    first = torch.zeros(starts * count, dim, dtype=y.dtype, device=y.device)
    second = torch.zeros(starts * count, dim * dim, dtype=y.dtype, device=y.device)
    likelihood = torch.zeros(starts, dtype=y.dtype, device=y.device)
    for block, weight in zip(y.split(_BLOCK), w.split(_BLOCK), strict=True):
        white = (block @ rows.T - offset).reshape(len(block), starts, count, dim)
        joint = constant - white.square().sum(-1) / 2
        evidence = joint.logsumexp(-1)
        likelihood += weight @ evidence
        share = (torch.exp(joint - evidence[..., None]) * weight[:, None, None]).reshape(len(block), -1)
        mass += share.sum(0)
        first += share.T @ block
        second += share.T @ (block[:, :, None] * block[:, None, :]).reshape(len(block), -1)
    mass = mass.clamp(min=1e-12)
    mean = first / mass[:, None]
    moment = (second / mass[:, None]).reshape(-1, dim, dim) - mean[:, :, None] * mean[:, None, :] + prior
    moment = torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1)) if diagonal else moment
    fresh = (mass / mass.reshape(starts, count).sum(-1).repeat_interleave(count)).reshape(starts, count)
    return likelihood, (fresh, mean.reshape(starts, count, dim), moment.reshape(starts, count, dim, dim))
