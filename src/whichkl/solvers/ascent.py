"""Ascent: L-BFGS from many points at once, each with its own step, one batched call of the target an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_MEMORY = 10
_ARMIJO = 1e-4
_TRIES = 30
_BLUR = 1e-14


@dataclass(frozen=True)
class Peaks:
    """Where the ascents ended."""

    x: Float[Tensor, "b d"]
    value: Float[Tensor, " b"]
    score: Float[Tensor, "b d"]
    decrement: Float[Tensor, " b"]
    """By how much another quasi-Newton step would raise the value: ½ gᵀ H g, in nats."""
    memory: _Memory

    def scale(self, row: int) -> Float[Tensor, " d"]:
        """Standard deviations that the last pairs of a row suggest, √diag(H)."""
        dim = self.x.shape[1]
        columns = self.memory.times(torch.full((dim,), row), torch.eye(dim, dtype=self.x.dtype, device=self.x.device))
        return columns.diagonal().clamp(min=0).sqrt()


def ascend(
    trial: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Float[Tensor, "b d"],
    tolerance: float = 1e-7,
    max_calls: int = 250,
) -> Peaks:
    """Climb a function, such as a log density, from every row of x by L-BFGS with backtracking.

    The rows don't wait for each other: a row whose step was refused tries a shorter one while the others go on, so that
    the number of calls is that of the slowest row, and the number of points falls as rows arrive.

    Args:
        trial: points (n, d) and the numbers of their rows (n,) → value and gradient, −∞ where it isn't a number.
        x: where to begin; a row whose value isn't finite stays.
        tolerance: a row has arrived when ½ gᵀ H g, the rise that a quasi-Newton step promises, is below so much.
        max_calls: at most so many calls of `trial`.

    Source: Liu & Nocedal (1989); where rounding hides a rise, a smaller gradient counts (Hager & Zhang, 2005).

    >>> peaks = ascend(lambda x, rows: (-x.square().sum(-1) / 2, -x), torch.ones(3, 2, dtype=torch.float64))
    >>> float(peaks.x.abs().max()) < 1e-9
    True
    """
    every = torch.arange(len(x), device=x.device)
    value, score = trial(x, every)
    x, value, score = x.clone(), value.clone(), score.clone()
    memory = _Memory.empty(x)
    step = score / torch.linalg.vector_norm(score, dim=-1, keepdim=True).clamp(min=1.0)
    length, tries = torch.ones_like(value), torch.zeros_like(value)
    rise = (score * step).sum(-1)
    active = value.isfinite() & (rise / 2 > tolerance)
    for _ in range(max_calls):
        if not bool(active.any()):
            break
        rows = active.nonzero()[:, 0]
        new = x[rows] + length[rows, None] * step[rows]
        new_value, new_score = trial(new, rows)
        good = new_value >= value[rows] + _ARMIJO * length[rows] * rise[rows]
        blurred = (new_value - value[rows]).abs() <= _BLUR * value[rows].abs()
        good |= blurred & (new_score.square().sum(-1) < 0.8 * score[rows].square().sum(-1))
        good &= new_value.isfinite()
        bad, won = rows[~good], rows[good]
        # The parabola through both values and the slope, kept within a tenth and a half.
        curve = 2 * (value[bad] + length[bad] * rise[bad] - new_value[~good])
        shorter = (length[bad] * rise[bad] / curve).nan_to_num(0.1, 0.1, 0.1).clamp(0.1, 0.5)
        length[bad] = length[bad] * shorter
        tries[bad] += 1
        active[bad[tries[bad] >= _TRIES]] = False
        if len(won):
            memory.add(won, new[good] - x[won], score[won] - new_score[good])
            x[won], value[won], score[won] = new[good], new_value[good], new_score[good]
            step[won] = memory.times(won, score[won])
            rise[won] = (score[won] * step[won]).sum(-1)
            length[won], tries[won] = 1.0, 0.0
            active[won] = (rise[won] / 2 > tolerance) & (x[won].abs().amax(-1) < 1e12)
    step = memory.times(every, score)
    return Peaks(x, value, score, (score * step).sum(-1) / 2, memory)


@dataclass
class _Memory:
    """The last steps s and falls of the gradient y of each row, newest last."""

    s: Float[Tensor, "m b d"]
    y: Float[Tensor, "m b d"]
    held: Bool[Tensor, "m b"]
    reach: Float[Tensor, " b"]
    """How far a step along the gradient may go where there is no curvature to read it from."""

    @classmethod
    def empty(cls, x: Float[Tensor, "b d"]) -> _Memory:
        shape = (_MEMORY, *x.shape)
        return cls(x.new_zeros(shape), x.new_zeros(shape), torch.zeros(shape[:2], dtype=torch.bool), x.new_ones(len(x)))

    def add(self, rows: Tensor, s: Float[Tensor, "a d"], y: Float[Tensor, "a d"]) -> None:
        """Keep pairs of positive curvature; where there is none, forget, and let the next step be twice as long."""
        curved = (s * y).sum(-1) > 1e-12 * torch.linalg.vector_norm(s, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        flat = rows[~curved]
        self.held[:, flat] = False
        self.reach[flat] = 2 * torch.linalg.vector_norm(s[~curved], dim=-1)
        rows, s, y = rows[curved], s[curved], y[curved]
        for store, new in ((self.s, s), (self.y, y)):
            store[:-1, rows] = store[1:, rows]
            store[-1, rows] = new
        self.held[:-1, rows] = self.held[1:, rows]
        self.held[-1, rows] = True

    def times(self, rows: Tensor, g: Float[Tensor, "a d"]) -> Float[Tensor, "a d"]:
        """Return H g by the two-loop recursion; along g, `reach` far, for a row without pairs."""
        s, y, held = self.s[:, rows], self.y[:, rows], self.held[:, rows]
        inner = (s * y).sum(-1)
        rho = torch.where(held, 1 / inner, 0.0)
        weights = []
        q = g.clone()
        for i in range(_MEMORY - 1, -1, -1):
            weight = rho[i] * (s[i] * q).sum(-1)
            weights.append(weight)
            q = q - weight[:, None] * y[i]
        plain = self.reach[rows] / torch.linalg.vector_norm(g, dim=-1).clamp(min=1e-300)
        scale = torch.where(held[-1], inner[-1] / y[-1].square().sum(-1), plain)
        q = scale[:, None] * q
        for i in range(_MEMORY):
            q = q + (weights[_MEMORY - 1 - i] - rho[i] * (y[i] * q).sum(-1))[:, None] * s[i]
        return q
