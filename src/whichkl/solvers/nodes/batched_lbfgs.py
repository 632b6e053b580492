"""Ascent: L-BFGS from many points at once, each with its own step, one batched call of the target an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_MEMORY = 10
_ARMIJO = 1e-4
TRIES = 30
"""Of ever shorter steps, after which a row ends."""
_BLUR = 1e-14


@dataclass(frozen=True)
class Peaks:
    """Where the ascents ended."""

    x: Float[Tensor, "b d"]
    value: Float[Tensor, " b"]
    score: Float[Tensor, "b d"]
    decrement: Float[Tensor, " b"]
    """By how much another quasi-Newton step would raise the value: ½ gᵀ H g, in nats."""
    curvature: Curvature
    """H, as the ascent has learnt it."""


class Curvature(Protocol):
    """What an ascent has learnt of the curvature at each row."""

    def scale(self, row: int) -> Float[Tensor, " d"]:
        """Standard deviations that it suggests, √diag(H)."""


def ascend(
    trial: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Float[Tensor, "b d"],
    tolerance: float = 1e-7,
    max_calls: int = 250,
    foreseen: Callable[[Peaks, Tensor, Tensor], Tensor] | None = None,
    patience: float = math.inf,
    first: tuple[Tensor, Tensor] | None = None,
    memory: Memory | None = None,
) -> Peaks:
    """Climb a function, such as a log density, from every row of x by L-BFGS with backtracking.

    The rows don't wait for each other: a row whose step was refused tries a shorter one while the others go on, so that
    the number of calls is that of the slowest row, and the number of points falls as rows arrive.

    Args:
        trial: points (n, d) and the numbers of their rows (n,) → value and gradient, −∞ where it isn't a number.
        x: where to begin; a row whose value isn't finite stays.
        tolerance: a row has arrived when ½ gᵀ H g, the rise that a quasi-Newton step promises, is below so much.
        max_calls: at most so many calls of `trial`.
        foreseen: where all rows are, the numbers of those that have just arrived, and of those that have just moved on → which of
            the latter needn't go on, since it's known where they would arrive.
        patience: when three quarters of the rows have ended, the others get so many times the calls that there were till then.
        first: value and gradient at x, where they are known.
        memory: what an earlier ascent of much the same function has learnt, row by row.

    Source: Liu & Nocedal (1989); where rounding hides a rise, a smaller gradient counts (Hager & Zhang, 2005).

    >>> peaks = ascend(lambda x, rows: (-x.square().sum(-1) / 2, -x), torch.ones(3, 2, dtype=torch.float64))
    >>> float(peaks.x.abs().max()) < 1e-9
    True
    """
    every = torch.arange(len(x), device=x.device)
    value, score = first or trial(x, every)
    x, value, score = x.clone(), value.clone(), score.clone()
    step = score / torch.linalg.vector_norm(score, dim=-1, keepdim=True).clamp(min=1.0)
    if memory is None:
        memory = Memory.empty(x)
    else:
        memory = memory.take(every)  # a copy
        step = torch.where(memory.held[:, -1:], memory.times(every, score), step)
    length, tries = torch.ones_like(value), torch.zeros_like(value)
    rise = (score * step).sum(-1)
    active = value.isfinite() & (rise / 2 > tolerance)
    last = float(max_calls)
    for call in range(max_calls):
        left = int(active.sum())
        last = min(last, patience * call) if call and 4 * left <= len(x) and last == max_calls else last
        if left == 0 or call >= last:
            break
        rows = active.nonzero()[:, 0]
        new = x[rows] + length[rows, None] * step[rows]
        new_value, new_score = trial(new, rows)
        slope = length[rows] * rise[rows]
        risen = has_risen(new_value, new_score, value[rows], score[rows], slope)
        good, refused = risen.nonzero()[:, 0], (~risen).nonzero()[:, 0]
        if len(refused):
            bad = rows[refused]
            length[bad] = length[bad] * shortened(new_value[refused] - value[bad], slope[refused])
            tries[bad] += 1
            active[bad[tries[bad] >= TRIES]] = False
        if len(good):
            won = rows[good]
            memory.add(won, new[good] - x[won], score[won] - new_score[good])
            x[won], value[won], score[won] = new[good], new_value[good], new_score[good]
            step[won] = memory.times(won, score[won])
            rise[won] = (score[won] * step[won]).sum(-1)
            length[won], tries[won] = 1.0, 0.0
            goes_on = (rise[won] / 2 > tolerance) & (x[won].abs().amax(-1) < 1e12)
            active[won] = goes_on
            if foreseen is not None:
                going = won[goes_on]
                active[going] = ~foreseen(Peaks(x, value, score, rise / 2, memory), won[~goes_on], going)
    step = memory.times(every, score)
    return Peaks(x, value, score, (score * step).sum(-1) / 2, memory)


def has_risen(
    new_value: Float[Tensor, " a"],
    new_score: Float[Tensor, "a d"],
    value: Float[Tensor, " a"],
    score: Float[Tensor, "a d"],
    slope: Float[Tensor, " a"],
) -> Bool[Tensor, " a"]:
    """Whether a step of first-order rise `slope` is to be taken: by Armijo's rule, by the gradient where rounding hides it."""
    gain = new_value - value
    blurred = gain.abs() <= _BLUR * value.abs()
    falls = new_score.square().sum(-1) < 0.8 * score.square().sum(-1)
    good: Bool[Tensor, " a"] = ((gain >= _ARMIJO * slope) | (blurred & falls)) & new_value.isfinite()
    return good


def shortened(gain: Float[Tensor, " a"], slope: Float[Tensor, " a"]) -> Float[Tensor, " a"]:
    """Return the share of a refused step to try next: the top of the parabola through both values and the slope, 0.1 to 0.5."""
    share: Float[Tensor, " a"] = (slope / (2 * (slope - gain))).nan_to_num(0.1, 0.1, 0.1).clamp(0.1, 0.5)
    return share


@dataclass
class Memory:
    """The last steps s and falls of the gradient y of each row, newest last; zero where there are none yet."""

    s: Float[Tensor, "b m d"]
    y: Float[Tensor, "b m d"]
    held: Bool[Tensor, "b m"]
    reach: Float[Tensor, " b"]
    """How far a step along the gradient may go where there is no curvature to read it from."""

    @classmethod
    def empty(cls, x: Float[Tensor, "b d"], steps: int | None = None) -> Memory:
        """Nothing is known of any row; so many steps will be kept, ten unless said."""
        zero = x.new_zeros(len(x), steps or _MEMORY, x.shape[1])
        return cls(zero, zero.clone(), torch.zeros_like(zero[..., 0], dtype=torch.bool), x.new_ones(len(x)))

    def blank(self, rows: int) -> Memory:
        """Nothing is known of so many rows like these."""
        return Memory.empty(self.s.new_empty(rows, self.s.shape[-1]), self.s.shape[1])

    def take(self, rows: Tensor) -> Memory:
        """Return a copy of what is known of some rows."""
        return Memory(self.s[rows], self.y[rows], self.held[rows], self.reach[rows])

    def put(self, rows: Tensor, other: Memory) -> Memory:
        """Return a copy in which what is known of some rows is replaced."""
        parts = ((self.s, other.s), (self.y, other.y), (self.held, other.held), (self.reach, other.reach))
        return Memory(*(mine.index_copy(0, rows, theirs) for mine, theirs in parts))

    def scale(self, row: int) -> Float[Tensor, " d"]:
        """Read the diagonal of H from its columns."""
        dim = self.s.shape[-1]
        columns = self.times(
            torch.full((dim,), row, dtype=torch.int64, device="cpu"), torch.eye(dim, dtype=self.s.dtype, device=self.s.device)
        )
        return columns.diagonal().clamp(min=0).sqrt()

    def add(self, rows: Tensor, s: Float[Tensor, "a d"], y: Float[Tensor, "a d"]) -> None:
        """Keep pairs of positive curvature; where there is none, forget, and let the next step be twice as long."""
        length = torch.linalg.vector_norm(s, dim=-1)
        curved = (s * y).sum(-1) > 1e-12 * length * torch.linalg.vector_norm(y, dim=-1)
        if not bool(curved.all()):
            flat = rows[~curved]
            self.s[flat], self.y[flat], self.held[flat] = 0.0, 0.0, False
            self.reach[flat] = 2 * length[~curved]
            rows, s, y = rows[curved], s[curved], y[curved]
        for store, new in ((self.s, s), (self.y, y), (self.held, torch.ones_like(rows, dtype=torch.bool))):
            store[rows] = torch.cat([store[rows, 1:], new[:, None]], 1)

    def times(self, rows: Tensor, g: Float[Tensor, "a d"]) -> Float[Tensor, "a d"]:
        """Return H g, in the compact form of the two-loop recursion; along g, `reach` far, for a row without pairs.

        H = γI + [S, γY] [[R⁻ᵀ(D + γYᵀY)R⁻¹, −R⁻ᵀ], [−R⁻¹, 0]] [S, γY]ᵀ, R the upper triangle of SᵀY and D its diagonal.

        Source: Byrd, Nocedal & Schnabel (1994), theorem 2.2.
        """
        s, y, held = self.s[rows], self.y[rows], self.held[rows]
        across = s @ y.transpose(1, 2)
        inner = across.diagonal(dim1=1, dim2=2)
        upper = across.triu() + torch.diag_embed((~held).to(g.dtype))
        square = y @ y.transpose(1, 2)
        plain = self.reach[rows] / torch.linalg.vector_norm(g, dim=-1).clamp(min=1e-300)
        scale = torch.where(held[:, -1], inner[:, -1] / square[:, -1, -1], plain)[:, None, None]
        column = g[..., None]
        p = torch.linalg.solve_triangular(upper, s @ column, upper=True)
        q = inner[..., None] * p + scale * (square @ p - y @ column)
        q = torch.linalg.solve_triangular(upper.transpose(1, 2), q, upper=False)
        moved: Tensor = scale * (column - y.transpose(1, 2) @ p) + s.transpose(1, 2) @ q
        return moved[..., 0]
