"""Batched Newton: ascents from many points at once in few dimensions; Hessians are differences of scores of the same call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.solvers.nodes.batched_lbfgs import (
    Foresight,
    Peaks,
    Trial,
    count_refusal,
    has_risen,
    rows_to_try,
    share_of_step,
    stop_arrived,
)

_MIN_CURVATURE = 1e-12
"""Smallest curvature relative to the largest one, in each coordinate's own unit; smaller ones are noise."""
_MAX_LENGTH = 8.0
"""Largest length of a step, in Newton steps. Steps grow while they gain more than on a parabola, as on an exponential."""
_FIRST_REACH = 10.0
"""Largest length of the first step; it doubles after each step of that length that rose, and grows more on a parabola."""
_MAX_DEVIATION = 1e-3
"""Largest relative difference from the rise on a parabola at which a function counts as one."""


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
    value doesn't rise, and lengthened if it rises by more than a parabola would.

    Arguments and result are those of `whichkl.solvers.nodes.batched_lbfgs.ascend`.

    Source: Dauphin et al. (2014) for |Λ|; Nocedal & Wright (2006), chapter 3.

    >>> peaks = ascend_by_newton(lambda x, rows: (-x.square().sum(-1) / 2, -x), torch.ones(3, 2, dtype=torch.float64))
    >>> float(peaks.x.abs().max()) < 1e-9
    True
    """
    every = torch.arange(len(x), device=x.device)
    here = _look(trial, every, x, _Hessians.unknown(x))
    step = here.curvature.times(here.score)
    rise = (here.score * step).sum(-1)
    length, tries = torch.ones_like(rise), torch.zeros_like(rise)
    reach = torch.full_like(rise, _FIRST_REACH)
    active = here.value.isfinite() & (rise / 2 > tolerance)
    for rows in rows_to_try(active, max_calls, patience):
        far = torch.linalg.vector_norm(step[rows], dim=-1)
        t = torch.minimum(length[rows], reach[rows] / far)
        there = _look(trial, rows, here.x[rows] + t[:, None] * step[rows], here.curvature.of(rows))
        gain, slope = there.value - here.value[rows], t * rise[rows]
        risen = has_risen(there.value, there.score, here.value[rows], here.score[rows], slope)
        good, refused = risen.nonzero()[:, 0], (~risen).nonzero()[:, 0]
        if len(refused):
            bad = rows[refused]
            reach[bad] = (t * far)[refused] * share_of_step(gain[refused], slope[refused])
            length[bad] = 1.0
            count_refusal(bad, tries, active)
        if len(good):
            won = rows[good]
            here.put(won, there, good)
            step[won] = here.curvature.of(won).times(here.score[won])
            rise[won] = (here.score[won] * step[won]).sum(-1)
            # A step that was just shortened isn't lengthened at the first success: it would fail again.
            smooth = tries[won] == 0
            more = smooth & (gain[good] > 0.55 * slope[good])
            length[won] = torch.where(more, 2 * t[good].clamp(min=1.0), 1.0).clamp(max=_MAX_LENGTH)
            held = smooth & ((t * far)[good] >= 0.9 * reach[won])
            foretold = slope[good] * (1 - t[good] / 2)
            exact = (gain[good] - foretold).abs() <= _MAX_DEVIATION * foretold
            reach[won] *= torch.where(held, 2 + 98 * exact.to(reach.dtype), 1.0)
            tries[won] = 0.0
            peaks = Peaks(here.x, here.value, here.score, rise / 2, here.curvature)
            stop_arrived(peaks, won, active, tolerance, foreseen)
    return Peaks(here.x, here.value, here.score, rise / 2, here.curvature)


@dataclass
class _Hessians:
    """−∇² of each row as V Λ Vᵀ in coordinates divided by `unit`, which makes its diagonal ±1."""

    unit: Float[Tensor, "b d"]
    eigenvalue: Float[Tensor, "b d"]
    vector: Float[Tensor, "b d d"]

    @classmethod
    def unknown(cls, x: Float[Tensor, "b d"]) -> _Hessians:
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return cls(torch.ones_like(x), torch.ones_like(x), eye.expand(len(x), -1, -1).clone())

    @classmethod
    def of_matrix(cls, matrix: Float[Tensor, "b d d"], before: Float[Tensor, "b d"]) -> _Hessians:
        """Decompose matrices; a coordinate without curvature keeps its former unit."""
        matrix = (matrix + matrix.mT).nan_to_num(0.0, 0.0, 0.0) / 2
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).abs()
        unit = torch.where(diagonal > 1e-24, diagonal.clamp(min=1e-24).rsqrt(), before)
        eigenvalue, vector = torch.linalg.eigh(unit[:, :, None] * matrix * unit[:, None, :])
        return cls(unit, eigenvalue, vector)

    def of(self, rows: Tensor) -> _Hessians:
        return _Hessians(self.unit[rows], self.eigenvalue[rows], self.vector[rows])

    def put(self, rows: Tensor, other: _Hessians) -> None:
        self.unit[rows], self.eigenvalue[rows], self.vector[rows] = other.unit, other.eigenvalue, other.vector

    def times(self, g: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return V |Λ|⁻¹ Vᵀ g, back in the coordinates of x."""
        size = self.eigenvalue.abs()
        size = size.clamp(min=0).maximum(_MIN_CURVATURE * size.amax(-1, keepdim=True)).clamp(min=1e-30)
        along = torch.einsum("bij,bi->bj", self.vector, self.unit * g) / size
        return self.unit * torch.einsum("bij,bj->bi", self.vector, along)

    def scale(self, row: int) -> Float[Tensor, " d"]:
        """Return √diag of the inverse."""
        inverse = self.vector[row].square() @ (1 / self.eigenvalue[row].abs().clamp(min=1e-30))
        return self.unit[row] * inverse.sqrt()


@dataclass
class _Place:
    """Points with value, score and curvature."""

    x: Float[Tensor, "b d"]
    value: Float[Tensor, " b"]
    score: Float[Tensor, "b d"]
    curvature: _Hessians

    def put(self, rows: Tensor, other: _Place, which: Tensor) -> None:
        self.x[rows], self.value[rows], self.score[rows] = other.x[which], other.value[which], other.score[which]
        self.curvature.put(rows, other.curvature.of(which))


def _look(trial: Trial, rows: Tensor, x: Float[Tensor, "b d"], near: _Hessians) -> _Place:
    """Evaluate points, and one more near each of them per coordinate, all in one call."""
    b, d = x.shape
    step = torch.maximum((1e-4 * near.unit).clamp(max=1e-2), 1e-8 * x.abs().clamp(min=1e-3))
    points = torch.cat([x[:, None], x[:, None] + torch.diag_embed(step)], 1)
    value, score = trial(points.reshape(-1, d), rows.repeat_interleave(d + 1))
    value, score = value.view(b, d + 1), score.view(b, d + 1, d)
    matrix = (score[:, :1] - score[:, 1:]) / step[:, :, None]
    return _Place(x.clone(), value[:, 0].clone(), score[:, 0].clone(), _Hessians.of_matrix(matrix, near.unit))
