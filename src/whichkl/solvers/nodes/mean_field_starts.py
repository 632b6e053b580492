"""Scales: where to start a factorised fit: means and standard deviations, from modes, in memory linear in d."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.solvers.nodes.batched_lbfgs import ascend
from whichkl.solvers.nodes.starts import find_starts, look
from whichkl.targets import Target

_WIDE = 200
"""Up to so many dimensions Laplace approximations of d × d numbers are cheap."""
_SEARCHES = 4
_CALLS = 500
_PROBES = 32

Starts = tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]


def find_scales(target: Target, seed: int) -> Starts:
    """Return means and standard deviations of factorised Gaussians to start from.

    Up to 200 dimensions those nearest (by reverse KL) to the Gaussians of `find_starts`, 1/√diag(Σ⁻¹). Above, modes by
    L-BFGS from draws where there are any, else from normal draws of scales 0.03, 0.3, 1 and 3; at each mode 1/√diag of
    the negative Hessian, estimated by v ⊙ Hv with random signs v (Bekas, Kokiopoulou & Saad, 2007).

    Raises:
        TargetError: the log density is −inf wherever the search began.
    """
    if target.dim <= _WIDE:
        loc, tril = find_starts(target, seed)
        eye = torch.eye(target.dim, dtype=tril.dtype, device="cpu").expand_as(tril)
        inverse = torch.linalg.solve_triangular(tril, eye, upper=False)
        return loc, torch.linalg.vector_norm(inverse, dim=-2).reciprocal()
    points = _points(target, seed)
    target.value_and_score(points[:2].to(target.device))

    def trial(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        value, score = target.trial(x.to(target.device))
        return value.cpu(), score.cpu()

    peaks = ascend(trial, points, tolerance=1e-6 * target.dim, max_calls=_CALLS)
    settled = peaks.x.isfinite().all(-1) & peaks.value.isfinite() & (peaks.decrement < 1e-3 * target.dim)
    locs: list[Tensor] = []
    scales: list[Tensor] = []
    for i in peaks.value.argsort(descending=True).tolist():
        near = [float(((peaks.x[i] - loc) / scale).square().mean().sqrt()) for loc, scale in zip(locs, scales, strict=True)]
        if bool(settled[i]) and min(near, default=math.inf) > 0.1:
            locs.append(peaks.x[i])
            scales.append(_spread(target, peaks.x[i], seed))
    if not locs:  # a density without modes
        locs, scales = [points.mean(0)], [torch.ones(target.dim, dtype=torch.float64, device="cpu")]
    return torch.stack(locs), torch.stack(scales)


def _points(target: Target, seed: int) -> Float[Tensor, "c d"]:
    """Where to begin the search for modes."""
    generator = torch.Generator().manual_seed(seed)
    if target.samples is not None:
        points = target.samples[torch.randperm(len(target.samples), generator=generator, device="cpu")[:_SEARCHES]].to(
            torch.float64
        )
    elif target.sampler is not None:
        points = target.draws(_SEARCHES, seed).to(torch.float64)
    else:
        scales = torch.tensor([0.03, 0.3, 1.0, 3.0], dtype=torch.float64, device="cpu")
        points = scales[:, None] * torch.randn(_SEARCHES, target.dim, generator=generator, dtype=torch.float64, device="cpu")
    points = points.cpu()
    finite = look(target, points).isfinite()
    if not bool(finite.any()):
        because = f"`log_prob` is -inf at all {len(points)} start points, spread over scales 0.03 to 3 about 0"
        instead = "Pass `support=`, or shift and scale x so that p has mass there"
        raise TargetError(cannot("start on this target", because, instead))
    return points[finite]


def _spread(target: Target, mode: Float[Tensor, " d"], seed: int) -> Float[Tensor, " d"]:
    """1/√diag(−∇² log p) at a mode; where an estimate isn't positive, the median of the others."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_PROBES, len(mode)), generator=generator, device="cpu").to(torch.float64).mul(2).sub(1)
    size = 1e-5 * (1 + float(mode.abs().median()))
    _, ahead = target.trial((mode + size * signs).to(target.device))
    _, behind = target.trial((mode - size * signs).to(target.device))
    bend = (signs * (behind - ahead).cpu() / (2 * size)).mean(0)
    known = bend[bend > 0]
    middle = float(known.median()) if len(known) else 1.0
    return torch.where(bend > 0.01 * middle, bend, middle).rsqrt()
