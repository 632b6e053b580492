"""Basins: which ends of ascents belong to one mode of p, and the mass about each mode."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl.particles.hamiltonian import Density

_MAX_DIP = 1.0
"""Largest fall of log p, in nats, below the lower of two ends on the line between them if both are one mode."""
_POINTS_PER_LINE = 15
_NEIGHBORS = 4
_DRAWS_PER_MODE = 64
_STEP = 1e-4
"""Step of central differences of the gradient."""
_MAX_DECREMENT = 0.01
"""Largest gain of Newton's step, in nats, at an end that is a mode."""


def spread_out(y: Float[Tensor, "n d"], count: int) -> tuple[Int[Tensor, " k"], Int[Tensor, " n"]]:
    """Choose the first point and others far from each other, `count` in all, and number for every point the nearest of them.

    Source: Gonzalez (1985), farthest-first traversal.
    """
    nearest = torch.zeros(len(y), dtype=torch.long, device="cpu")
    if len(y) == 0:
        return nearest, nearest
    chosen = [0]
    distance = (y - y[0]).square().sum(-1)
    while len(chosen) < min(count, len(y)) and float(distance.max()) > 0:
        chosen.append(int(distance.argmax()))
        new = (y - y[chosen[-1]]).square().sum(-1)
        nearest = torch.where(new < distance, len(chosen) - 1, nearest)
        distance = torch.minimum(distance, new)
    return torch.tensor(chosen, dtype=torch.int64, device="cpu"), nearest


def joined(density: Density, a: Float[Tensor, "m d"], b: Float[Tensor, "m d"], lower: Float[Tensor, " m"]) -> Bool[Tensor, " m"]:
    """Return whether log p stays above `lower`, the smaller value at both ends, − 1 nat on the straight lines from a to b."""
    if len(a) == 0:  # no call of the density for nothing
        return torch.zeros(0, dtype=torch.bool, device="cpu")
    t = (torch.arange(_POINTS_PER_LINE, dtype=torch.float64, device="cpu") + 1)[:, None, None] / (_POINTS_PER_LINE + 1)
    value = density((a + t * (b - a)).reshape(-1, a.shape[1]))[0].view(_POINTS_PER_LINE, -1)
    is_joined: Bool[Tensor, " m"] = value.amin(0) >= lower - _MAX_DIP
    return is_joined


def labels(density: Density, y: Float[Tensor, "k d"], value: Float[Tensor, " k"]) -> Int[Tensor, " k"]:
    """Number the modes at the ends of ascents, highest first; ends that coincide, or that a line without a dip joins, are one.

    Every end is compared with the nearest few of the higher ones.
    """
    order = torch.argsort(value, descending=True, stable=True)
    y, value = y[order], value[order]
    count = len(y)
    distance = torch.cdist(y, y)
    same = (distance < 1e-3) & ((value[:, None] - value).abs() < 1e-3)
    # a line between all pairs of ends would cost too many calls, and a few neighbours link the ends of a mode as well
    earlier = torch.arange(count, device="cpu")[None, :] < torch.arange(count, device="cpu")[:, None]
    copy = (same & earlier).any(1)
    unique, repeated = (~copy).nonzero()[:, 0], copy.nonzero()[:, 0]
    near = torch.where(earlier, distance, math.inf)[unique][:, unique]
    apart, place = near.topk(min(_NEIGHBORS, len(unique)), largest=False)
    is_pair = apart.isfinite()
    low, high = unique[:, None].expand_as(place)[is_pair], unique[place[is_pair]]
    is_one = joined(density, y[low], y[high], value[low])
    first = (same & earlier).int().argmax(1)
    edges = torch.cat([torch.stack([low, high])[:, is_one], torch.stack([repeated, first[repeated]])], 1)
    root = list(range(count))

    def top(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for a, b in edges.T.tolist():
        ends = top(a), top(b)
        root[max(ends)] = min(ends)
    _, numbers = torch.tensor([top(i) for i in range(count)], dtype=torch.int64, device="cpu").unique(return_inverse=True)
    placed: Tensor = torch.empty_like(order).index_copy(0, order, numbers)
    return placed


def log_masses(
    density: Density,
    modes: Float[Tensor, "k d"],
    reached: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Estimate log ∫ p̃ about each mode, over the ellipsoid of 99.9 % of a Gaussian with its curvature, and the relative error.

    With S draws of that Gaussian, N(mₖ, Hₖ⁻¹), it is log 1/S Σ p̃(x) / N(x; mₖ, Hₖ⁻¹) over those inside the ellipsoid, nearer
    to no other mode in its own metric, and where `reached` is false. The mass is unbiased. It is −∞ if −∇² log p isn't positive
    definite, or the end isn't a mode.
    """
    count, dim = modes.shape
    eye = torch.eye(dim, dtype=torch.float64, device="cpu")
    steps = _STEP * eye
    ends = torch.cat([modes[:, None] + steps, modes[:, None] - steps])
    slope = density(ends.reshape(-1, dim))[1].view(2, count, dim, dim)
    hessian, gradient = (slope[1] - slope[0]) / (2 * _STEP), slope.mean((0, 2))
    hessian = (hessian + hessian.transpose(1, 2)) / 2
    eigenvalue, vector = torch.linalg.eigh(hessian)
    along, positive = torch.einsum("kij,ki->kj", vector, gradient), eigenvalue.clamp(min=1e-300)
    decrement = (along.square() / positive).sum(-1) / 2
    curved = (eigenvalue[:, 0] > 1e-8 * eigenvalue[:, -1].clamp(min=1e-300)) & (decrement < _MAX_DECREMENT)
    precision = torch.where(curved[:, None, None], hessian, eye)
    scale = vector / positive.sqrt()[:, None]
    z = torch.randn(count, _DRAWS_PER_MODE, dim, generator=generator, dtype=torch.float64, device="cpu")
    y = modes[:, None] + torch.einsum("kij,ksj->ksi", torch.where(curved[:, None, None], scale, 0.0), z)
    own = z.square().sum(-1)
    away = y[:, :, None] - modes
    others = torch.einsum("ksmi,mij,ksmj->ksm", away, precision, away)
    others = torch.where(torch.eye(count, dtype=torch.bool, device="cpu")[:, None] | ~curved, math.inf, others)
    # The chance of a larger distance, not its quantile: SciPy's takes a tenth of a second to load in a first fit.
    is_within = torch.special.gammaincc(torch.full_like(own, dim / 2), own / 2) > 0.001
    inside = is_within & (own <= others.amin(-1))
    flat = y.reshape(-1, dim)
    value = density(flat)[0]
    counted = inside & ~reached(flat).view(count, -1)
    log_normal = -own / 2 + positive.log().sum(-1)[:, None] / 2 - dim * math.log(2 * math.pi) / 2
    log_weight = torch.where(counted, value.view(count, -1) - log_normal, -math.inf)
    mass = torch.where(curved, log_weight.logsumexp(1) - math.log(_DRAWS_PER_MODE), -math.inf)
    weight = (log_weight - torch.where(mass > -math.inf, mass, 0.0)[:, None]).exp()
    return mass, torch.where(mass > -math.inf, weight.std(1) / math.sqrt(_DRAWS_PER_MODE), 0.0)
