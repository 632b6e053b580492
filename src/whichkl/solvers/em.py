"""EM: maximum likelihood for mixtures of Gaussians, several k-means++ starts in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.families import Family, Mixture
from whichkl.families.mixture import mixture
from whichkl.objectives import ForwardKL, Objective
from whichkl.solvers.points import is_exact, points_of
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_BLOCK = 4096
_FLOOR = 1e-6
_SHORT = 21
_ENOUGH = 0.1


@dataclass(frozen=True)
class ExpectationMaximization(Solver):
    """argmin KL(p‖q) over mixtures: responsibilities, then weighted moments, until the likelihood stays.

    Every covariance is kept above a floor of `_FLOOR` times the data's variances plus δ²/12, δ the step in which a column
    was recorded, so that no component can collapse onto a point, or onto a line of rounded values. All starts run as one
    batch, the better two to the end; blocks of rows keep the memory flat. SQUAREM leaps
    make it some times faster. It stops when two cycles in a row gain less than a hundredth of a nat over all rows (on a
    quadrature rule: 1e-10 nats in the mean).

    Source: Dempster, Laird & Rubin (1977); starts, Arthur & Vassilvitskii (2007), Biernacki, Celeux & Govaert (2003);
    leaps, Varadhan & Roland (2008).
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

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run EM from every start and keep the distinct optima."""
        if not isinstance(family, Mixture):
            raise TypeError(family)
        x, w = points_of(target, seed)
        shift, scale = w @ x, (w @ (x - w @ x).square()).sqrt()
        y = (x - shift) / scale
        floor = _FLOOR + (resolution(x) / scale).square() / 12
        state = _start(y, w, self.starts, family.components, seed)
        tolerance = self.tolerance if is_exact(target) else max(self.tolerance, _ENOUGH / len(x))
        diagonal = family.covariance == "diagonal"

        def update(at: State) -> tuple[Tensor, State]:
            return _step(y, w, *at, floor, diagonal=diagonal)

        likelihood, gain, small, iterations = None, math.inf, 0, 0
        while small < 2 and iterations < self.max_iterations:
            before, (likelihood, state) = likelihood, _cycle(state, update)
            iterations += 3
            gain = math.inf if before is None else float((likelihood - before).max())
            small = small + 1 if gain < tolerance / 10 else 0
            if iterations == _SHORT and len(likelihood) > 2:
                best = likelihood.topk(2).indices
                state, likelihood = (state[0][best], state[1][best], state[2][best]), likelihood[best]
        found = []
        for probs, loc, cov in zip(*state, strict=True):
            tril = torch.diag(scale) @ torch.linalg.cholesky(cov)
            model = mixture(probs, shift + scale * loc, tril, family.covariance)
            found.append(Optimum(model, float(ForwardKL().loss(model, x, w)), small == 2, False))
        return Solution(distinct(found), iterations, gain)


def resolution(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The step in which each column was recorded: its smallest gap where most values repeat, 0 where they don't."""
    steps = []
    for column in x.T:
        values = column.unique()
        steps.append(values.diff().min() if 1 < len(values) < len(column) / 2 else column.new_zeros(()))
    return torch.stack(steps)


State = tuple[Float[Tensor, "s k"], Float[Tensor, "s k d"], Float[Tensor, "s k d d"]]


def _cycle(state: State, update: Callable[[State], tuple[Tensor, State]]) -> tuple[Float[Tensor, " s"], State]:
    """Two EM steps, a leap along their difference, and a step from there where the leap raised the likelihood.

    Returns the likelihood at the beginning of the cycle and the state at its end. Source: SQUAREM, Varadhan & Roland (2008).
    """
    here, first = update(state)
    ahead, second = update(first)
    points = [torch.cat([p.log()[:, :, None], m, c.flatten(2)], -1).flatten(1) for p, m, c in (state, first, second)]
    slope = points[1] - points[0]
    bend = points[2] - points[1] - slope
    length = (slope.square().sum(-1) / bend.square().sum(-1).clamp(min=1e-300)).sqrt().clamp(1.0, 1e4)[:, None]
    leap = (points[0] + 2 * length * slope + length.square() * bend).reshape(*state[0].shape, -1)
    dim = state[1].shape[-1]
    probs, loc, cov = leap[..., 0].softmax(-1), leap[..., 1 : dim + 1], leap[..., dim + 1 :].unflatten(-1, (dim, dim))
    safe = (torch.linalg.cholesky_ex(cov)[1] == 0).all(-1) & leap.isfinite().all((-1, -2))
    guarded = tuple(torch.where(_wide(safe, new), new, old) for new, old in zip((probs, loc, cov), second, strict=True))
    there, third = update((guarded[0], guarded[1], guarded[2]))
    better = safe & (there >= ahead)
    ends = tuple(torch.where(_wide(better, new), new, old) for new, old in zip(third, second, strict=True))
    return here, (ends[0], ends[1], ends[2])


def _wide(flag: Tensor, like: Tensor) -> Tensor:
    return flag.reshape(-1, *[1] * (like.ndim - 1))


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
    y: Tensor, w: Tensor, probs: Tensor, loc: Tensor, cov: Tensor, floor: Tensor, *, diagonal: bool
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
    moment = (second / mass[:, None]).reshape(-1, dim, dim) - mean[:, :, None] * mean[:, None, :]
    if diagonal:
        moment = torch.diag_embed(torch.maximum(moment.diagonal(dim1=-2, dim2=-1), floor))
    else:
        moment = _above(moment, floor)
    fresh = (mass / mass.reshape(starts, count).sum(-1).repeat_interleave(count)).reshape(starts, count)
    return likelihood, (fresh, mean.reshape(starts, count, dim), moment.reshape(starts, count, dim, dim))


def _above(covariance: Float[Tensor, "k d d"], floor: Float[Tensor, " d"]) -> Float[Tensor, "k d d"]:
    """Raise covariances to Σ ⪰ diag(floor): the exact M step under that constraint (eigenvalues clipped in its metric)."""
    root = floor.sqrt()
    eigenvalue, vector = torch.linalg.eigh(covariance / (root[:, None] * root))
    if bool((eigenvalue >= 1).all()):
        return covariance
    raised = (vector * eigenvalue.clamp(min=1.0)[:, None]) @ vector.transpose(-1, -2)
    above: Tensor = raised * (root[:, None] * root)
    return above
