"""Tempering: sequential Monte Carlo from a wide Gaussian to p, every step a few calls of the target with all particles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.particles.hamiltonian import Cloud, move
from whichkl.particles.resampling import next_step, systematic
from whichkl.particles.result import Particles, island_mean
from whichkl.targets import Target

_ACCEPTED = 0.75
"""The acceptance rate that the step sizes aim at."""
_TOO_FEW = 0.35
"""Below it, the particles are moved again with a shorter step."""
_TRIES = 3


@dataclass(frozen=True)
class Reference:
    """N(m, LLᵀ): where the particles start, and what the log density is compared with."""

    loc: Float[Tensor, " d"]
    tril: Float[Tensor, "d d"]

    def log_prob(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log density at x = m + L y."""
        d = len(self.loc)
        return -y.square().sum(-1) / 2 - self.tril.diagonal().log().sum() - d * math.log(2 * math.pi) / 2

    def place(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Carry points of N(0, I) to x = m + L y."""
        return self.loc + y @ self.tril.T


def temper(
    target: Target,
    base: Reference | None = None,
    *,
    particles: int = 1024,
    islands: int = 8,
    keep: float = 0.5,
    leapfrogs: int = 5,
    last_moves: int = 2,
    settle: bool = False,
    max_calls: int = 1000,
    seed: int = 0,
) -> Particles:
    """Carry particles from a Gaussian to p along base^(1−β) p^β, β from 0 to 1.

    Each rise of β is as large as the conditional ESS allows. Then every island resamples, and all particles make a
    Hamiltonian move whose mass matrix is their covariance and whose step follows the acceptance rate. Log Z is the sum over the
    rises of log mean (p / base)^Δβ. Islands share temperatures and steps and nothing else, so that their differences give
    errors.

    Args:
        target: p in unconstrained coordinates (`Target.unconstrained`).
        base: where to begin; N(0, 10² I) unless said. Mass of p that it hardly reaches is found late or never.
        particles: n, on all islands together.
        islands: how many groups resample by themselves.
        keep: the conditional ESS, as a share, that a rise of β must leave.
        leapfrogs: steps of a trajectory, each one batched call with n points.
        last_moves: trajectories at the temperature of p.
        settle: whether to go on there, with twice as many trajectories each time, until means of x, x² and log p stay within what
            chance allows.
        max_calls: calls of the target after which it ends, if need be above the temperature of p (`Particles.finished`).
        seed: fixes every random choice.

    Raises:
        InputError: the numbers don't go together.
        TargetError: log p is −∞ at all points of the base.

    Source: Del Moral, Doucet & Jasra (2006); Dai, Heng, Jacob & Whiteley (2022); Buchholz, Chopin & Jacob (2021) on moves.

    >>> p = temper(Target(log_prob=lambda x: -(x - 3).square().sum(-1) / 2, dim=2), particles=512)
    >>> p.finished, abs(p.log_z - math.log(2 * math.pi)) < 5 * p.log_z_stderr
    (True, True)
    """
    if islands < 2 or particles < 2 * islands or particles % islands or not 0 < keep < 1 or leapfrogs < 1 or max_calls < 1:
        because = f"particles={particles}, islands={islands}, keep={keep}, leapfrogs={leapfrogs}, max_calls={max_calls}"
        instead = "Use at least two islands of equally many particles, at least two each, 0 < keep < 1, and positive counts"
        raise InputError(cannot("run sequential Monte Carlo with these numbers", because, instead))
    if base is None:
        eye = torch.eye(target.dim, dtype=torch.float64, device="cpu")
        base = Reference(torch.zeros(target.dim, dtype=torch.float64, device="cpu"), 10 * eye)
    generator = torch.Generator().manual_seed(seed)
    calls, refused = 0, target.evaluations["rejected"]

    def density(y: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        value, score = target.trial(base.place(y).to(target.device))
        return value.to("cpu", torch.float64), score.to("cpu", torch.float64) @ base.tril

    y = torch.randn(particles, target.dim, generator=generator, dtype=torch.float64, device="cpu")
    cloud = Cloud(y, *density(y))
    if not bool((cloud.value > -math.inf).any()):
        because = f"its log density is −∞ at all {particles} points of the base"
        raise TargetError(cannot("follow this target with particles", because, "Pass `support=`, or a base nearer to its mass"))
    log_z = torch.zeros(islands, dtype=torch.float64, device="cpu")
    temperatures, step, rate = [0.0], 1.5 * target.dim**-0.25 / leapfrogs**0.5, _ACCEPTED
    while temperatures[-1] < 1 and calls + leapfrogs <= max_calls:
        ratio = cloud.value - base.log_prob(cloud.y)
        rise = next_step(ratio, 1 - temperatures[-1], keep)
        log_weights = (rise * ratio).view(islands, -1)
        log_z = log_z + log_weights.logsumexp(1) - math.log(particles // islands)
        chosen = systematic(log_weights, generator) + torch.arange(islands, device="cpu")[:, None] * (particles // islands)
        cloud = cloud.take(chosen.flatten())
        beta = 1.0 if rise >= 1 - temperatures[-1] else temperatures[-1] + rise
        temperatures.append(beta)
        for attempt in range(_TRIES if beta < 1 else _TRIES + last_moves):
            if calls + leapfrogs > max_calls:
                break
            cloud, rate = move(cloud, density, beta, step, leapfrogs, generator)
            step = _adapted(step, rate)
            if rate >= _TOO_FEW and (beta < 1 or attempt + 1 >= last_moves):
                break
    log_weights = (log_z - torch.logsumexp(log_z, 0) - math.log(particles // islands)).repeat_interleave(particles // islands)
    drift: float | None = math.inf if settle else None
    before: Cloud | None = None
    moves = last_moves
    while drift is not None and drift > 1 and temperatures[-1] == 1 and calls + moves * leapfrogs <= max_calls:
        before = cloud
        for _ in range(moves):
            cloud, rate = move(cloud, density, 1.0, step, leapfrogs, generator)
            step = _adapted(step, rate)
        drift, moves = _drift(before, cloud, log_weights, islands), 2 * moves
    target.evaluations["rejected"] = refused  # far from p, where the base begins, this says nothing against it
    whole = torch.logsumexp(log_z, 0) - math.log(islands)
    relative = (log_z - whole).exp()
    return Particles(
        x=base.place(cloud.y),
        log_weights=log_weights,
        islands=islands,
        log_z=float(whole),
        log_z_stderr=float(relative.std() / math.sqrt(islands)),
        temperatures=tuple(temperatures),
        gradients=calls * particles,
        calls=calls,
        acceptance=rate,
        drift=drift,
        before=None if before is None else base.place(before.y),
    )


def _adapted(step: float, rate: float) -> float:
    """A longer step where more moves are accepted than aimed at, a shorter one where fewer are."""
    return min(step * math.exp(max(-1.2, min(0.4, 2 * (rate - _ACCEPTED)))), 2.0)


def _drift(before: Cloud, after: Cloud, log_weights: Float[Tensor, " n"], islands: int) -> float:
    """The largest change of a mean in standard errors, over the 99 % bound for the largest of so many (Bonferroni)."""
    change = torch.cat(
        [after.y - before.y, after.y.square() - before.y.square(), (after.value - before.value)[:, None]], dim=1
    ).nan_to_num(0.0)
    mean, stderr = island_mean(log_weights, islands, change)
    bound = float(scipy.stats.t.isf(0.005 / len(mean), islands - 1))
    return float((mean.abs() / stderr.clamp(min=1e-300)).max()) / bound
