"""Coordinate ascent: reverse KL to independent columns of categories, too many states to list, by local expectations on draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family, Product
from whichkl.solvers.solver import Solution, Solver, check_counts, check_positive
from whichkl.solvers.states.category_tables import categories_for, distinct_tables, is_table, log_prob_of_states
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_FULL_SWEEPS = 8
"""Number of sweeps whose answers are taken whole; later ones are averaged."""
_NEAR_BEST = 3.0
"""Nats. Starts that are this much above the best after `_FULL_SWEEPS` sweeps aren't followed."""
_JUDGED_ON = 4_096
"""Number of draws by which starts are compared."""


@dataclass(frozen=True)
class CoordinateAscent(Solver):
    """argmin KL(q‖p) over q = ∏ qⱼ: log qⱼ(k) = E_q[log p(xⱼ = k, rest)] + const., every value of a column tried on each draw.

    This is the natural gradient. Its expectation over xⱼ is exact, and the one over the other columns is over `draws`, which
    removes most of the noise of a score-function gradient. It needs no derivative of log p. Several starts run at once, column
    by column. The first sweeps take their answers whole; the t-th later one averages with weight 1/t. The ascent stops when the
    cost of the noise, ½ Σⱼ Var of log qⱼ under q, and the error of the last sweeps beyond noise are both below `tolerance`.

    Args:
        draws: number of draws of q per column.
        starts: number of starts; those 3 nats above the best after the first sweeps aren't followed.
        sweeps: largest number of sweeps.
        tolerance: nats.

    Raises:
        InputError: a field is out of range.

    Source: Titsias & Lázaro-Gredilla (2015), "Local expectation gradients for black box variational inference"; Robbins & Monro
    (1951) for the averages.
    """

    name = "coordinate_ascent"
    direction = "reverse"
    families = (Product,)

    draws: int = 32
    starts: int = 8
    sweeps: int = 200
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        """Check the fields."""
        check_counts(self, draws=2, starts=1, sweeps=1)
        check_positive(self, "tolerance")

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the columns are categories."""
        return is_table(family)

    def quick(self) -> CoordinateAscent:
        """Return a solver with fewer starts and a larger tolerance."""
        return replace(self, starts=max(1, self.starts // 2), tolerance=4 * self.tolerance)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Sweep from all starts, then from the distinct good ones until they have settled."""
        counts = categories_for(target, family)
        state = _Columns.at(counts, self.starts, seed)
        off = noise = torch.zeros(self.starts, dtype=torch.float64, device="cpu")
        for t in range(1, self.sweeps + 1):
            work.tell("sweeping over the columns", t / self.sweeps)
            rate = 1.0 if t <= _FULL_SWEEPS else 1 / (t - _FULL_SWEEPS + 1)
            now_off, now_noise = state.sweep(target, self.draws, rate, seed * 1_000 + t)
            off, noise = 0.8 * off + 0.2 * (now_off - now_noise), now_noise
            if t == _FULL_SWEEPS:
                keep = _good(state.losses(target, seed + 7), state)
                state, off, noise = _Columns(state.log_q[keep], counts), off[keep], noise[keep]
            spread = noise / max(1, t - _FULL_SWEEPS)
            is_settled = t >= 2 * _FULL_SWEEPS and bool(((off <= self.tolerance) & (spread <= self.tolerance)).all())
            if is_settled or target.evaluations.is_spent:
                break
        losses, settled = state.losses(target, seed + 7), (off <= self.tolerance) & (spread <= self.tolerance)
        loss = losses.mean(-1).nan_to_num(math.inf, math.inf)
        if not bool(loss.isfinite().any()):
            because = "the ELBO isn't finite: `log_prob` is -inf, or not a number, at states that the model draws"
            raise TargetError(cannot("minimise `reverse_kl` here", because, "Give these states a finite penalty"))
        best = int(loss.argmin())
        ends = [
            (float(loss[i]), [one[:count] for one, count in zip(state.log_q[i], counts, strict=True)], bool(settled[i]))
            for i in loss.isfinite().nonzero()[:, 0].tolist()
        ]
        optima = distinct_tables(family, ends, tie=2 * float(losses[best].std()) / math.sqrt(_JUDGED_ON))
        return Solution(optima, t, float(off[best].clamp(min=0).sqrt()), nodes=self.draws)


@dataclass
class _Columns:
    """Log probabilities of every column, one row per start; −∞ beyond a column's categories."""

    log_q: Float[Tensor, "s d k"]
    counts: Sequence[int]

    @classmethod
    def at(cls, counts: Sequence[int], starts: int, seed: int) -> _Columns:
        """Start from uniform probabilities, and from random ones."""
        generator = torch.Generator().manual_seed(seed)
        logits = 2.0 * torch.randn(starts, len(counts), max(counts), generator=generator, dtype=torch.float64, device="cpu")
        logits[0] = 0.0
        beyond = torch.arange(max(counts), device="cpu") >= torch.tensor(counts, dtype=torch.int64, device="cpu")[:, None]
        return cls(logits.masked_fill(beyond, -math.inf).log_softmax(-1), counts)

    def sweep(self, target: Target, draws: int, rate: float, seed: int) -> tuple[Tensor, Tensor]:
        """Update every column in turn; return the error of the former answers and the cost of the noise, in nats per start."""
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(draws, len(self.counts), generator=generator, dtype=torch.float64, device="cpu")
        x = _carried(self.log_q, uniforms)
        off, noise = torch.zeros(2, len(x), dtype=torch.float64, device="cpu")
        for j, count in enumerate(self.counts):
            tried = x[:, :, None].expand(-1, -1, count, -1).clone()
            tried[..., j] = torch.arange(count, dtype=torch.float64, device="cpu")
            log_p = log_prob_of_states(target, tried)
            old = self.log_q[:, j, :count]
            chance = old.exp()
            log_p = log_p - (chance[:, None] * log_p).sum(-1, keepdim=True)
            apart = log_p.mean(1) - (old - (chance * old).sum(-1, keepdim=True))
            off += (chance * apart.square()).sum(-1) / 2
            noise += (chance * log_p.var(1)).sum(-1) / (2 * draws)
            self.log_q[:, j, :count] = torch.lerp(old, log_p.mean(1), rate).log_softmax(-1)
            x[:, :, j] = _carried(self.log_q[:, j : j + 1], uniforms[:, j : j + 1])[..., 0]
        return off, noise

    def losses(self, target: Target, seed: int) -> Float[Tensor, "s m"]:
        """Return log q − log p on draws of every start."""
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(_JUDGED_ON, len(self.counts), generator=generator, dtype=torch.float64, device="cpu")
        x = _carried(self.log_q, uniforms)
        each = self.log_q[:, None].expand(-1, x.shape[1], -1, -1).gather(-1, x.long()[..., None])[..., 0]
        return each.sum(-1) - log_prob_of_states(target, x)


def _carried(log_q: Float[Tensor, "s d k"], uniforms: Float[Tensor, "m d"]) -> Float[Tensor, "s m d"]:
    """Return the inverses of the columns' distribution functions at uniform numbers."""
    below = log_q.exp().cumsum(-1)[:, None, :, :-1]
    return (uniforms[None, :, :, None] > below).sum(-1).to(torch.float64)


def _good(losses: Float[Tensor, "s m"], state: _Columns) -> list[int]:
    """Return the starts near the best one in loss, without those that repeat a better one."""
    mean = losses.mean(-1).nan_to_num(math.inf, math.inf)
    kept: list[int] = []
    for i in mean.argsort().tolist():
        near = mean[i] <= mean.min() + _NEAR_BEST
        is_new = all(float((state.log_q[i].exp() - state.log_q[k].exp()).abs().max()) > 0.1 for k in kept)
        if near and is_new:
            kept.append(i)
    return kept or [0]
