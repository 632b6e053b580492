"""Coordinate ascent: reverse KL to independent columns of categories, too many states to list, by local expectations on draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family, Product
from whichkl.objectives import Direction
from whichkl.solvers.solver import Solution, Solver
from whichkl.solvers.states.category_tables import categories_for, distinct_tables, is_table, log_prob_of_states
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_TWO = 2.0
_BOLD = 8
"""Sweeps whose answers are taken whole, before they are averaged."""
_CLOSE = 3.0
_BLOCK = 1 << 22
"""Numbers in the points of one call of the target."""
_JUDGED_ON = 4_096


@dataclass(frozen=True)
class CoordinateAscent(Solver):
    """argmin KL(q‖p) over q = ∏ qⱼ: log qⱼ(k) = E_q[log p(xⱼ = k, rest)] + const., every value of a column tried on each draw.

    That is the natural gradient, its expectation over xⱼ exact and over the rest by `draws`, which takes most of the noise a
    score-function gradient has, and needs no derivative of log p. Several starts at once, column by column; the first sweeps
    take their answers whole, later ones average them, t-th by 1/t. It stops where what the noise costs, ½ Σⱼ Var of log
    qⱼ under q, and what the last sweeps were off beyond noise, are both below `tolerance` nats.

    Args:
        draws: of q, for each column.
        starts: at once; those 3 nats above the best after the first sweeps aren't followed.
        sweeps: at most.
        tolerance: nats.

    Raises:
        InputError: a field is out of range.

    Source: Titsias & Lázaro-Gredilla (2015), "Local expectation gradients for black box variational inference"; Robbins & Monro
    (1951) for the averages.
    """

    name: ClassVar[str] = "coordinate_ascent"
    direction: ClassVar[Direction] = "reverse"
    families: ClassVar[tuple[type[Family], ...]] = (Product,)

    draws: int = 32
    starts: int = 8
    sweeps: int = 200
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        """Check the fields."""
        for name, least in (("draws", 2), ("starts", 1), ("sweeps", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                because = f"`{name}={value!r}` isn't a whole number of at least {least}"
                raise InputError(cannot("use `CoordinateAscent`", because, f"Leave `{name}` out"))
        if not 0 < self.tolerance < math.inf:
            because = f"`tolerance={self.tolerance!r}` isn't a positive number"
            raise InputError(cannot("use `CoordinateAscent`", because, "Give, say, tolerance=0.02"))

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the columns are categories."""
        return is_table(family)

    def quick(self) -> CoordinateAscent:
        """Fewer starts, and a looser end."""
        return replace(self, starts=max(1, self.starts // 2), tolerance=4 * self.tolerance)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Sweep from all starts, then from the distinct good ones until they have settled."""
        counts = categories_for(target, family)
        state = _Columns.at(counts, self.starts, seed)
        off, noise = _zeros(state), _zeros(state)
        for t in range(1, self.sweeps + 1):
            work.tell("sweeping over the columns", t / self.sweeps)
            rate = 1.0 if t <= _BOLD else 1 / (t - _BOLD + 1)
            now_off, now_noise = state.sweep(target, self.draws, rate, seed * 1_000 + t)
            off, noise = 0.8 * off + 0.2 * (now_off - now_noise), now_noise
            if t == _BOLD:
                keep = _good(state.losses(target, seed + 7), state)
                state, off, noise = state.take(keep), off[keep], noise[keep]
            spread = noise / max(1, t - _BOLD)
            is_settled = t >= 2 * _BOLD and bool(((off <= self.tolerance) & (spread <= self.tolerance)).all())
            if is_settled or target.evaluations.is_spent:
                break
        losses, settled = state.losses(target, seed + 7), (off <= self.tolerance) & (spread <= self.tolerance)
        loss = losses.mean(-1).nan_to_num(math.inf, math.inf)
        if not bool(loss.isfinite().any()):
            because = "the ELBO isn't finite: `log_prob` is -inf, or not a number, at states that the model draws"
            raise TargetError(cannot("minimise `reverse_kl` here", because, "Give these states a finite penalty"))
        best = int(loss.argmin())
        ends = [(float(loss[i]), state.logs(i), bool(settled[i])) for i in range(len(loss)) if math.isfinite(float(loss[i]))]
        optima = distinct_tables(family, ends, tie=2 * float(losses[best].std()) / math.sqrt(_JUDGED_ON))
        return Solution(optima, t, float(off[best].clamp(min=0).sqrt()), nodes=self.draws)


@dataclass
class _Columns:
    """Log probabilities of every column, a row a start; −∞ beyond a column's categories."""

    log_q: Float[Tensor, "s d k"]
    counts: Sequence[int]

    @classmethod
    def at(cls, counts: Sequence[int], starts: int, seed: int) -> _Columns:
        """Start from uniform probabilities, and from random ones."""
        generator = torch.Generator().manual_seed(seed)
        logits = _TWO * torch.randn(starts, len(counts), max(counts), generator=generator, dtype=torch.float64, device="cpu")
        logits[0] = 0.0
        beyond = torch.arange(max(counts), device="cpu") >= torch.tensor(counts, dtype=torch.int64, device="cpu")[:, None]
        return cls(logits.masked_fill(beyond, -math.inf).log_softmax(-1), counts)

    def take(self, keep: list[int]) -> _Columns:
        """Return some of the starts."""
        return _Columns(self.log_q[keep], self.counts)

    def logs(self, start: int) -> list[Tensor]:
        """Return the log probabilities of each column of a start."""
        return [one[:count] for one, count in zip(self.log_q[start], self.counts, strict=True)]

    def draw(self, uniforms: Float[Tensor, "m d"]) -> Float[Tensor, "s m d"]:
        """Carry uniform numbers to draws of every start."""
        return _carried(self.log_q, uniforms)

    def sweep(self, target: Target, draws: int, rate: float, seed: int) -> tuple[Tensor, Tensor]:
        """Update every column in turn; return what the answers were off, and what their noise costs, in nats a start."""
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(draws, len(self.counts), generator=generator, dtype=torch.float64, device="cpu")
        x = self.draw(uniforms)
        starts = len(x)
        off, noise = (
            torch.zeros(starts, dtype=torch.float64, device="cpu"),
            torch.zeros(starts, dtype=torch.float64, device="cpu"),
        )
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
        """Log q − log p on draws of every start."""
        generator = torch.Generator().manual_seed(seed)
        x = self.draw(torch.rand(_JUDGED_ON, len(self.counts), generator=generator, dtype=torch.float64, device="cpu"))
        each = self.log_q[:, None].expand(-1, x.shape[1], -1, -1).gather(-1, x.long()[..., None])[..., 0]
        return each.sum(-1) - log_prob_of_states(target, x)


def _carried(log_q: Float[Tensor, "s d k"], uniforms: Float[Tensor, "m d"]) -> Float[Tensor, "s m d"]:
    """The inverse of each column's distribution function."""
    below = log_q.exp().cumsum(-1)[:, None, :, :-1]
    return (uniforms[None, :, :, None] > below).sum(-1).to(torch.float64)


def _good(losses: Float[Tensor, "s m"], state: _Columns) -> list[int]:
    """The starts near the best one in loss, without those that repeat a better one."""
    mean = losses.mean(-1).nan_to_num(math.inf, math.inf)
    kept: list[int] = []
    for i in mean.argsort().tolist():
        near = mean[i] <= mean.min() + _CLOSE
        is_new = all(float((state.log_q[i].exp() - state.log_q[k].exp()).abs().max()) > 0.1 for k in kept)
        if near and is_new:
            kept.append(i)
    return kept or [0]


def _zeros(state: _Columns) -> Float[Tensor, " s"]:
    return torch.zeros(len(state.log_q), dtype=torch.float64, device="cpu")
