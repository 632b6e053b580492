"""Tempering: sequential Monte Carlo from a wide Gaussian to p, every step a few calls of the target with all particles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.importance import effective_sample_size
from whichkl.particles.hamiltonian import Cloud, move
from whichkl.targets import Target

_GOAL_ACCEPTANCE = 0.75
"""The acceptance rate that the step sizes aim at."""
_MIN_ACCEPTANCE = 0.35
"""Least acceptance rate; below it, the particles are moved again with a shorter step."""
_MAX_MOVES_PER_TEMPERATURE = 3


@dataclass(frozen=True)
class Reference:
    """N(m, LLᵀ): where the particles start, and the density that log p is compared with."""

    loc: Float[Tensor, " d"]
    tril: Float[Tensor, "d d"]

    def log_prob(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log density at x = m + L y."""
        d = len(self.loc)
        return -y.square().sum(-1) / 2 - self.tril.diagonal().log().sum() - d * math.log(2 * math.pi) / 2

    def place(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Carry points of N(0, I) to x = m + L y."""
        return self.loc + y @ self.tril.T


@dataclass(frozen=True)
class Particles:
    """Points x with weights W, so that Σ W f(x) ≈ E_p f, in the free coordinates of the target."""

    x: Float[Tensor, "n d"]
    log_p: Float[Tensor, " n"]
    """log p̃ at the points."""
    log_weights: Float[Tensor, " n"]
    """Natural logs of the weights; their sum is 1."""
    islands: int
    """The number of groups of n / islands neighbouring rows that never mixed."""
    log_z: float
    """log ∫ p̃, in nats; Z is unbiased up to the choice of temperatures and steps from the particles."""
    log_z_stderr: float
    """From the islands' differences; infinite where one island found nearly all."""
    temperatures: tuple[float, ...]
    """The inverse temperatures, from 0 on; the last is 1 where it finished."""
    gradients: int
    """Points at which log p and its gradient were evaluated."""
    calls: int
    """Batched calls of the target."""
    acceptance: float
    """Mean chance that a move was accepted, over the last trajectory."""
    drift: float | None = None
    """The change of the means of x, x² and log p when the last moves were doubled, as a share of what chance allows; above 1 the
    particles hadn't settled. None unless requested."""
    before: Float[Tensor, "n d"] | None = None
    """The points before the last moves were doubled, if that was requested."""

    @property
    def finished(self) -> bool:
        """Whether the temperature of p was reached before the calls were used up."""
        return self.temperatures[-1] == 1.0

    @property
    def ess(self) -> float:
        """Effective number of particles by their weights; copies of one ancestor count as different."""
        return effective_sample_size(self.log_weights)

    @property
    def log_z_islands(self) -> Float[Tensor, " g"]:
        """Log Z by each island alone."""
        return self.log_weights.view(self.islands, -1).logsumexp(1) + math.log(self.islands) + self.log_z

    def mean(self, f: Float[Tensor, "n k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Return Σ W f, f a function's value at every particle, and its standard error, from the islands' differences.

        Each island is weighted by its Z.
        """
        return island_mean(self.log_weights, self.islands, f)

    def draws(self, n: int, seed: int = 0) -> Float[Tensor, "n d"]:
        """Draw n of the particles by their weights, in random order; particles can repeat."""
        generator = torch.Generator().manual_seed(seed)
        shift = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
        at = (torch.arange(n, dtype=torch.float64, device="cpu") + shift) / n
        cumulative = self.log_weights.exp().cumsum(0)
        chosen = torch.searchsorted(cumulative / cumulative[-1], at).clamp(max=len(cumulative) - 1)
        return self.x[chosen[torch.randperm(n, generator=generator, device="cpu")]]


def island_mean(
    log_weights: Float[Tensor, " n"], islands: int, f: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return Σ W f and its standard error, that of a ratio of sums over independent islands of neighbouring rows; Σ W = 1."""
    w = log_weights.exp()[:, None]
    value = (w * f).sum(0)
    parts = (w * (f - value)).view(islands, -1, f.shape[1]).sum(1)
    return value, (parts.square().sum(0) * (islands / (islands - 1))).sqrt()


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
    rises of log mean (p / base)^Δβ. Islands share only temperatures and steps, so their differences give errors.

    Args:
        target: p in unconstrained coordinates (`Target.unconstrained`).
        base: where to begin; by default N(0, 10² I). Mass of p that it hardly reaches is found late or never.
        particles: n, on all islands together.
        islands: the number of groups that resample separately.
        keep: the conditional ESS, as a share, that a rise of β must leave.
        leapfrogs: steps of a trajectory, each one batched call with n points.
        last_moves: trajectories at the temperature of p.
        settle: whether to continue there, with twice as many trajectories each time, until means of x, x² and log p change only
            by chance.
        max_calls: largest number of calls of the target; it may end above the temperature of p (`Particles.finished`).
        seed: fixes every random choice.

    Raises:
        InputError: the numbers don't fit together.
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
        base = standard_base(target.dim)
    refused = target.evaluations["rejected"]
    run = _Tempering(target, base, particles, islands, leapfrogs, max_calls, seed)
    run.climb(keep, last_moves)
    drift, before = run.settle(last_moves) if settle else (None, None)
    target.evaluations["rejected"] = refused  # the base begins far from p, where a density that fails does no harm
    return run.result(drift, before)


def standard_base(dim: int) -> Reference:
    """Return N(0, 10² I), where particles begin if nothing is known about p."""
    return Reference(torch.zeros(dim, dtype=torch.float64, device="cpu"), 10 * torch.eye(dim, dtype=torch.float64, device="cpu"))


class _Tempering:
    """The particles at the present temperature, log Z of each island, and what the moves have learned."""

    def __init__(
        self, target: Target, base: Reference, particles: int, islands: int, leapfrogs: int, max_calls: int, seed: int
    ) -> None:
        self.target, self.base, self.islands, self.size = target, base, islands, particles // islands
        self.leapfrogs, self.max_calls, self.calls = leapfrogs, max_calls, 0
        self.generator = torch.Generator().manual_seed(seed)
        y = torch.randn(particles, target.dim, generator=self.generator, dtype=torch.float64, device="cpu")
        rejected = target.evaluations["rejected"]
        self.cloud = Cloud(y, *self.density(y))
        if not bool((self.cloud.value > -math.inf).any()):
            count = target.evaluations["rejected"] - rejected
            number = "NaN" if count >= particles else "NaN or −∞" if count else "−∞"
            because = f"its log density is {number} at all {particles} points of the base"
            instead = "Pass `support=`, or a base nearer to its mass"
            raise TargetError(cannot("follow this target with particles", because, instead))
        self.log_z = torch.zeros(islands, dtype=torch.float64, device="cpu")
        self.temperatures, self.rate = [0.0], _GOAL_ACCEPTANCE
        # The optimal step of Hamiltonian moves falls as d^(−1/4) (Beskos et al., 2013).
        self.step = 1.5 * target.dim**-0.25 / leapfrogs**0.5

    @property
    def beta(self) -> float:
        """The inverse temperature."""
        return self.temperatures[-1]

    def density(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p and its gradient at x = m + L y, one call."""
        self.calls += 1
        value, score = self.target.trial(self.base.place(y).to(self.target.device))
        return value.to("cpu", torch.float64), score.to("cpu", torch.float64) @ self.base.tril

    def can_move(self, trajectories: int = 1) -> bool:
        """Whether calls are left for some trajectories."""
        return self.calls + trajectories * self.leapfrogs <= self.max_calls

    def rise(self, keep: float) -> None:
        """Raise the inverse temperature as far as the conditional ESS allows, and resample every island."""
        # Weights depend on the points before the move alone: they are known before the rise is chosen.
        ratio = self.cloud.value - self.base.log_prob(self.cloud.y)
        left = 1 - self.beta
        rise = next_step(ratio, left, keep)
        log_weights = (rise * ratio).view(self.islands, -1)
        # Per island, so that the islands' estimates of Z stay independent.
        self.log_z = self.log_z + log_weights.logsumexp(1) - math.log(self.size)
        chosen = systematic(log_weights, self.generator) + torch.arange(self.islands, device="cpu")[:, None] * self.size
        self.cloud = self.cloud.take(chosen.flatten())
        self.temperatures.append(1.0 if rise >= left else self.beta + rise)

    def move_all(self) -> None:
        """Move all particles by one trajectory, and adapt the step: longer if more moves are accepted than the goal."""
        self.cloud, self.rate = move(self.cloud, self.density, self.beta, self.step, self.leapfrogs, self.generator)
        # The step falls faster than it rises: while it is too long, the particles stand still.
        self.step = min(self.step * math.exp(max(-1.2, min(0.4, 2 * (self.rate - _GOAL_ACCEPTANCE)))), 2.0)

    def climb(self, keep: float, last_moves: int) -> None:
        """Raise the inverse temperature to 1; after each rise, move until enough moves are accepted."""
        while self.beta < 1 and self.can_move():
            self.rise(keep)
            for attempt in range(_MAX_MOVES_PER_TEMPERATURE + (0 if self.beta < 1 else last_moves)):
                if not self.can_move():
                    break
                self.move_all()
                if self.rate >= _MIN_ACCEPTANCE and (self.beta < 1 or attempt + 1 >= last_moves):
                    break

    def settle(self, moves: int) -> tuple[float, Tensor | None]:
        """Move, twice as often each time, until means change only by chance; return that change and the points before."""
        drift, before = math.inf, None
        while drift > 1 and self.beta == 1 and self.can_move(moves):
            before = self.cloud
            for _ in range(moves):
                self.move_all()
            drift, moves = _drift(before, self.cloud, self.log_weights(), self.islands), 2 * moves
        return drift, None if before is None else self.base.place(before.y)

    def log_weights(self) -> Float[Tensor, " n"]:
        """Return natural logs of the particles' weights, whose sum is 1."""
        each = self.log_z - torch.logsumexp(self.log_z, 0) - math.log(self.size)
        return each.repeat_interleave(self.size)

    def result(self, drift: float | None, before: Tensor | None) -> Particles:
        """Return the particles as they are."""
        whole = torch.logsumexp(self.log_z, 0) - math.log(self.islands)
        return Particles(
            x=self.base.place(self.cloud.y),
            log_p=self.cloud.value,
            log_weights=self.log_weights(),
            islands=self.islands,
            log_z=float(whole),
            log_z_stderr=float((self.log_z - whole).exp().std() / math.sqrt(self.islands)),
            temperatures=tuple(self.temperatures),
            gradients=self.calls * len(self.cloud.y),
            calls=self.calls,
            acceptance=self.rate,
            drift=drift,
            before=before,
        )


def conditional_ess(log_weights: np.ndarray) -> float:
    """Return the share of equally weighted particles that are effective under weights whose largest is 1: (mean w)² / mean w².

    On a few hundred numbers NumPy takes a fifth of torch's time. Source: Zhou, Johansen & Aston (2016).
    """
    w = np.exp(log_weights)
    return float(w.sum() ** 2 / (w @ w) / len(w))


def next_step(log_ratio: Float[Tensor, ...], left: float, keep: float) -> float:
    """Return the largest rise of β, up to `left` = 1 − β, at which the conditional ESS stays above `keep`.

    `log_ratio` is log p − log base of every particle, and `keep` a share of the particles where it is above −∞.

    Source: bisection as in Jasra et al. (2011).
    """
    finite = log_ratio[log_ratio > -math.inf].detach().cpu().numpy()
    if len(finite) == 0:
        return left
    finite = finite - finite.max()
    if conditional_ess(left * finite) >= keep:
        return left
    low, high = 0.0, left
    for _ in range(200):
        # Geometric: the first rise may be 1e-10 where the base lies far from p.
        middle = math.sqrt(low * high) if low > 0 else high / 16
        low, high = (middle, high) if conditional_ess(middle * finite) >= keep else (low, middle)
        if low > 0 and high / low < 1.01:
            break
    return low or high


def systematic(log_weights: Float[Tensor, "g n"], generator: torch.Generator) -> Int[Tensor, "g n"]:
    """Return which particles of each island continue: copies by one uniform number per island, spaced by 1/n.

    An island whose weights are all 0 stays unchanged; its weight is 0.

    Source: Kitagawa (1996).
    """
    islands, n = log_weights.shape
    dead = ~(log_weights > -math.inf).any(1, keepdim=True)
    cumulative = torch.softmax(torch.where(dead, 0.0, log_weights), 1).cumsum(1)
    uniform = torch.rand(islands, 1, generator=generator, dtype=torch.float64, device="cpu")
    at = (torch.arange(n, dtype=torch.float64, device="cpu") + uniform) / n
    chosen = torch.searchsorted(cumulative / cumulative[:, -1:], at).clamp(max=n - 1)
    return torch.where(dead, torch.arange(n, device="cpu"), chosen)


def _drift(before: Cloud, after: Cloud, log_weights: Float[Tensor, " n"], islands: int) -> float:
    """The largest change of a mean in standard errors, over the 99 % bound for the largest of all (Bonferroni)."""
    change = torch.cat(
        [after.y - before.y, after.y.square() - before.y.square(), (after.value - before.value)[:, None]], dim=1
    ).nan_to_num(0.0)
    mean, stderr = island_mean(log_weights, islands, change)
    # Two-sided at 1 %, shared by all means that are tested.
    bound = -float(scipy.special.stdtrit(islands - 1, 0.005 / len(mean)))
    return float((mean.abs() / stderr.clamp(min=1e-300)).max()) / bound
