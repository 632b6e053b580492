"""Ascents: L-BFGS and Newton's method from many points at once, each with its own step, with one batched call per round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Trial = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Points (n, d) and the numbers of their rows (n,) -> value and gradient, −∞ where the value isn't finite."""
_STEPS_IN_MEMORY = 10
"""Number of steps that L-BFGS remembers by default."""
_MIN_GAIN = 1e-4
"""Armijo's constant: the smallest gain of a step relative to its first-order gain."""
_MAX_TRIES = 30
"""Number of shorter and shorter steps after which a row ends."""
_ROUNDING = 1e-14
"""Relative size of a difference of values that rounding explains."""
_MAX_COORDINATE = 1e12
"""Coordinate beyond which an ascent is given up."""
_MIN_CURVATURE = 1e-12
"""Smallest curvature relative to the largest one, in each coordinate's own unit; smaller ones are noise."""
_MAX_NEWTON_STEPS = 8.0
"""Largest length of a step, in Newton steps. Steps grow while they gain more than on a parabola, as on an exponential."""
_FIRST_REACH = 10.0
"""Largest length of the first Newton step; it doubles after each step of that length that rose, and grows more on a parabola."""
_MAX_DEVIATION = 1e-3
"""Largest relative difference from the rise on a parabola at which a function counts as one."""


@dataclass(frozen=True)
class Peaks:
    """The ends of ascents, or their present points."""

    x: Float[Tensor, "b d"]
    value: Float[Tensor, " b"]
    score: Float[Tensor, "b d"]
    decrement: Float[Tensor, " b"]
    """The rise that another quasi-Newton step promises: ½ gᵀ H g, in nats."""
    curvature: Memory | _Hessians
    """The approximation of H, the inverse Hessian at each row, from the ascent; `scale` gives its √diag."""


Foresight = Callable[[Peaks, Tensor, Tensor], Tensor]
"""Present points, numbers of the rows that have just arrived, and of those that have just moved -> which of the latter can stop,
since their end is known."""


def ascend(
    trial: Trial,
    x: Float[Tensor, "b d"],
    tolerance: float = 1e-7,
    max_calls: int = 250,
    foreseen: Foresight | None = None,
    patience: float = math.inf,
    first: tuple[Tensor, Tensor] | None = None,
    memory: Memory | None = None,
) -> Peaks:
    """Climb a function, such as a log density, from every row of x by L-BFGS with backtracking.

    The rows don't wait for each other: a row whose step was refused tries a shorter one while the others continue. The number
    of calls is therefore that of the slowest row, and the number of points per call falls as rows arrive.

    Args:
        trial: evaluates points.
        x: where to begin; a row whose value isn't finite stays.
        tolerance: a row has arrived when ½ gᵀ H g, the rise that a quasi-Newton step promises, is at most this.
        max_calls: largest number of calls of `trial`.
        foreseen: tells which rows can stop before they arrive.
        patience: when three quarters of the rows have ended, the calls in all are limited to this multiple of the calls so far.
        first: value and gradient at x, if they are known.
        memory: the curvature from an earlier ascent of nearly the same function, row by row.

    Source: Liu & Nocedal (1989); where rounding hides a rise, a smaller gradient counts (Hager & Zhang, 2005).

    >>> peaks = ascend(lambda x, rows: (-x.square().sum(-1) / 2, -x), torch.ones(3, 2, dtype=torch.float64))
    >>> float(peaks.x.abs().max()) < 1e-9
    True
    """
    every = torch.arange(len(x), device=x.device)
    x, value, score = (one.clone() for one in (x, *(first or trial(x, every))))
    memory = Memory.empty(x) if memory is None else memory.take(every)  # a copy
    # Without curvature the unit of x is unknown: the first step goes at most a length of 1.
    plain = score / torch.linalg.vector_norm(score, dim=-1, keepdim=True).clamp(min=1.0)
    step = torch.where(memory.held[:, -1:], memory.times(every, score), plain)
    length, tries = torch.ones_like(value), torch.zeros_like(value)
    rise = (score * step).sum(-1)
    active = value.isfinite() & (rise / 2 > tolerance)
    for rows in rows_to_try(active, max_calls, patience):
        new = x[rows] + length[rows, None] * step[rows]
        new_value, new_score = trial(new, rows)
        slope = length[rows] * rise[rows]
        risen = has_risen(new_value, new_score, value[rows], score[rows], slope)
        good, refused = risen.nonzero()[:, 0], (~risen).nonzero()[:, 0]
        if len(refused):
            bad = rows[refused]
            length[bad] = length[bad] * share_of_step(new_value[refused] - value[bad], slope[refused])
            tries[bad] += 1
            active[bad[tries[bad] >= _MAX_TRIES]] = False
        if len(good):
            won = rows[good]
            memory.add(won, new[good] - x[won], score[won] - new_score[good])
            x[won], value[won], score[won] = new[good], new_value[good], new_score[good]
            step[won] = memory.times(won, score[won])
            rise[won] = (score[won] * step[won]).sum(-1)
            length[won], tries[won] = 1.0, 0.0
            stop_arrived(Peaks(x, value, score, rise / 2, memory), won, active, tolerance, foreseen)
    return Peaks(x, value, score, (score * memory.times(every, score)).sum(-1) / 2, memory)


def rows_to_try(active: Bool[Tensor, " b"], max_calls: int, patience: float) -> Iterator[Tensor]:
    """Yield the numbers of the rows in `active`, which the caller updates, once per call; arguments as in `ascend`."""
    last = float(max_calls)
    for call in range(max_calls):
        left = int(active.sum())
        last = min(last, patience * call) if call and 4 * left <= len(active) and last == max_calls else last
        if left == 0 or call >= last:
            return
        yield active.nonzero()[:, 0]


def stop_arrived(peaks: Peaks, moved: Tensor, active: Bool[Tensor, " b"], tolerance: float, foreseen: Foresight | None) -> None:
    """Stop the rows that arrived, that went too far, or whose end is foreseen, among those that have just moved."""
    continues = (peaks.decrement[moved] > tolerance) & (peaks.x[moved].abs().amax(-1) < _MAX_COORDINATE)
    active[moved] = continues
    if foreseen is not None:
        going = moved[continues]
        active[going] = ~foreseen(peaks, moved[~continues], going)


def has_risen(
    new_value: Float[Tensor, " a"],
    new_score: Float[Tensor, "a d"],
    value: Float[Tensor, " a"],
    score: Float[Tensor, "a d"],
    slope: Float[Tensor, " a"],
) -> Bool[Tensor, " a"]:
    """Return whether to take a step of first-order rise `slope`: by Armijo's rule, or by the gradient if rounding hides it."""
    gain = new_value - value
    blurred = gain.abs() <= _ROUNDING * value.abs()
    # Where rounding hides a rise, a shorter gradient is the only sign of one.
    falls = new_score.square().sum(-1) < 0.8 * score.square().sum(-1)
    good: Bool[Tensor, " a"] = ((gain >= _MIN_GAIN * slope) | (blurred & falls)) & new_value.isfinite()
    return good


def share_of_step(gain: Float[Tensor, " a"], slope: Float[Tensor, " a"]) -> Float[Tensor, " a"]:
    """Return the share of a refused step to try next, 0.1 to 0.5: the top of the parabola through both values and the slope."""
    share: Float[Tensor, " a"] = (slope / (2 * (slope - gain))).nan_to_num(0.1, 0.1, 0.1).clamp(0.1, 0.5)
    return share


@dataclass
class Memory:
    """The last steps s of each row and the falls y of its gradient, newest last; zero where there are none yet."""

    s: Float[Tensor, "b m d"]
    y: Float[Tensor, "b m d"]
    held: Bool[Tensor, "b m"]
    reach: Float[Tensor, " b"]
    """Largest length of a step along the gradient in a row without pairs."""

    @classmethod
    def empty(cls, x: Float[Tensor, "b d"], steps: int | None = None) -> Memory:
        """Return an empty memory of `steps` steps, by default ten, for every row of x."""
        zero = x.new_zeros(len(x), steps or _STEPS_IN_MEMORY, x.shape[1])
        return cls(zero, zero.clone(), torch.zeros_like(zero[..., 0], dtype=torch.bool), x.new_ones(len(x)))

    def blank(self, rows: int) -> Memory:
        """Return an empty memory for other rows of the same size."""
        return Memory.empty(self.s.new_empty(rows, self.s.shape[-1]), self.s.shape[1])

    def take(self, rows: Tensor) -> Memory:
        """Return a copy for some rows."""
        return Memory(self.s[rows], self.y[rows], self.held[rows], self.reach[rows])

    def put(self, rows: Tensor, other: Memory) -> Memory:
        """Return a copy in which some rows are replaced."""
        parts = ((self.s, other.s), (self.y, other.y), (self.held, other.held), (self.reach, other.reach))
        return Memory(*(mine.index_copy(0, rows, theirs) for mine, theirs in parts))

    def scale(self, row: int) -> Float[Tensor, " d"]:
        """Return √diag(H), the standard deviations, from the columns of H."""
        dim = self.s.shape[-1]
        rows = torch.full((dim,), row, dtype=torch.int64, device="cpu")
        identity = torch.eye(dim, dtype=self.s.dtype, device=self.s.device)
        return self.times(rows, identity).diagonal().clamp(min=0).sqrt()

    def add(self, rows: Tensor, s: Float[Tensor, "a d"], y: Float[Tensor, "a d"]) -> None:
        """Keep pairs of positive curvature; a row without it forgets its pairs, and its next step may be twice as long."""
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
        """Return H g, by the compact form of the two-loop recursion; for a row without pairs a step of length `reach` along g.

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


def ascend_by_newton(
    trial: Trial,
    x: Float[Tensor, "b d"],
    tolerance: float = 1e-7,
    max_calls: int = 250,
    foreseen: Foresight | None = None,
    patience: float = math.inf,
) -> Peaks:
    """Climb a function, such as a log density, from every row of x by Newton's method with backtracking.

    For every active row a call evaluates the next point and d others a ten-thousandth of a standard deviation away, whose scores
    give the Hessian. The step is V |Λ|⁻¹ Vᵀ g for the Hessian −V Λ Vᵀ, so that it rises at saddles, too. It is shortened if the
    value doesn't rise, and lengthened if it rises by more than a parabola would. Arguments and result are those of `ascend`.

    Source: Dauphin et al. (2014) for |Λ|; Nocedal & Wright (2006), chapter 3.

    >>> peaks = ascend_by_newton(lambda x, rows: (-x.square().sum(-1) / 2, -x), torch.ones(3, 2, dtype=torch.float64))
    >>> float(peaks.x.abs().max()) < 1e-9
    True
    """
    value, score, bend = _look(trial, torch.arange(len(x), device=x.device), x, torch.ones_like(x))
    x, step = x.clone(), bend.times(score)
    rise = (score * step).sum(-1)
    length, tries, reach = torch.ones_like(rise), torch.zeros_like(rise), torch.full_like(rise, _FIRST_REACH)
    active = value.isfinite() & (rise / 2 > tolerance)
    for rows in rows_to_try(active, max_calls, patience):
        far = torch.linalg.vector_norm(step[rows], dim=-1)
        # Two limits: `length` in Newton steps, `reach` in units of x, which also holds where the Hessian changes fast.
        t = torch.minimum(length[rows], reach[rows] / far)
        new = x[rows] + t[:, None] * step[rows]
        new_value, new_score, new_bend = _look(trial, rows, new, bend.unit[rows])
        gain, slope = new_value - value[rows], t * rise[rows]
        risen = has_risen(new_value, new_score, value[rows], score[rows], slope)
        good, refused = risen.nonzero()[:, 0], (~risen).nonzero()[:, 0]
        if len(refused):
            bad = rows[refused]
            reach[bad] = (t * far)[refused] * share_of_step(gain[refused], slope[refused])
            length[bad] = 1.0
            tries[bad] += 1
            active[bad[tries[bad] >= _MAX_TRIES]] = False
        if len(good):
            won, new_bend = rows[good], new_bend.take(good)
            x[won], value[won], score[won] = new[good], new_value[good], new_score[good]
            bend.put(won, new_bend)
            step[won] = new_bend.times(score[won])
            rise[won] = (score[won] * step[won]).sum(-1)
            # A step that was just shortened isn't lengthened at the first success: it would fail again.
            smooth = tries[won] == 0
            more = smooth & (gain[good] > 0.55 * slope[good])
            length[won] = torch.where(more, 2 * t[good].clamp(min=1.0), 1.0).clamp(max=_MAX_NEWTON_STEPS)
            held = smooth & ((t * far)[good] >= 0.9 * reach[won])
            foretold = slope[good] * (1 - t[good] / 2)
            # On a parabola the next Newton step arrives, however far it is: `reach` then needn't hold it back.
            exact = (gain[good] - foretold).abs() <= _MAX_DEVIATION * foretold
            reach[won] *= torch.where(held, 2 + 98 * exact.to(reach.dtype), 1.0)
            tries[won] = 0.0
            stop_arrived(Peaks(x, value, score, rise / 2, bend), won, active, tolerance, foreseen)
    return Peaks(x, value, score, rise / 2, bend)


@dataclass
class _Hessians:
    """−∇² of each row as V Λ Vᵀ in coordinates divided by `unit`, which makes its diagonal ±1."""

    unit: Float[Tensor, "b d"]
    eigenvalue: Float[Tensor, "b d"]
    vector: Float[Tensor, "b d d"]

    def take(self, rows: Tensor) -> _Hessians:
        return _Hessians(self.unit[rows], self.eigenvalue[rows], self.vector[rows])

    def put(self, rows: Tensor, other: _Hessians) -> None:
        self.unit[rows], self.eigenvalue[rows], self.vector[rows] = other.unit, other.eigenvalue, other.vector

    def times(self, g: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return V |Λ|⁻¹ Vᵀ g, back in the coordinates of x."""
        # |Λ| turns downhill directions at a saddle around, so that the step rises along them too.
        size = self.eigenvalue.abs()
        size = size.maximum(_MIN_CURVATURE * size.amax(-1, keepdim=True)).clamp(min=1e-30)
        along = torch.einsum("bij,bi->bj", self.vector, self.unit * g) / size
        return self.unit * torch.einsum("bij,bj->bi", self.vector, along)

    def scale(self, row: int) -> Float[Tensor, " d"]:
        """Return √diag of the inverse."""
        inverse = self.vector[row].square() @ (1 / self.eigenvalue[row].abs().clamp(min=1e-30))
        return self.unit[row] * inverse.sqrt()


def _look(
    trial: Trial, rows: Tensor, x: Float[Tensor, "b d"], unit: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b d"], _Hessians]:
    """Evaluate points, and one more near each of them per coordinate, all in one call; `unit` is that of the Hessians nearby."""
    b, d = x.shape
    step = torch.maximum((1e-4 * unit).clamp(max=1e-2), 1e-8 * x.abs().clamp(min=1e-3))
    points = torch.cat([x[:, None], x[:, None] + torch.diag_embed(step)], 1)
    value, score = trial(points.reshape(-1, d), rows.repeat_interleave(d + 1))
    value, score = value.view(b, d + 1), score.view(b, d + 1, d)
    # Minus the Hessian: differences of scores, symmetrised, since rounding differs between its two halves.
    matrix = (score[:, :1] - score[:, 1:]) / step[:, :, None]
    matrix = (matrix + matrix.mT).nan_to_num(0.0, 0.0, 0.0) / 2
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).abs()
    unit = torch.where(diagonal > 1e-24, diagonal.clamp(min=1e-24).rsqrt(), unit)  # one without curvature stays
    eigenvalue, vector = torch.linalg.eigh(unit[:, :, None] * matrix * unit[:, None, :])
    return value[:, 0].clone(), score[:, 0].clone(), _Hessians(unit, eigenvalue, vector)
