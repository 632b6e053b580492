"""Ascent: where log p rises to from many points at once, by quasi-Newton steps that share each call of the target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.particles.hamiltonian import Density

_DONE = 1e-10
"""A Newton decrement, in nats, below which a point has arrived."""
_ARMIJO = 1e-4
_SHORTEST = 1e-8


@dataclass(frozen=True)
class Ends:
    """Where the ascents ended, with log p there, and which of them arrived."""

    y: Float[Tensor, "k d"]
    value: Float[Tensor, " k"]
    arrived: Bool[Tensor, " k"]
    """Whether no quasi-Newton step would gain more than 1e-10 nats."""


def ascend(density: Density, y: Float[Tensor, "k d"], *, most: float = 2.0, max_calls: int = 60) -> Ends:
    """Climb log p from every row by BFGS with halving steps; a call takes all rows that are still on their way.

    Args:
        density: log p and its gradient, in coordinates in which a length of 1 is natural.
        y: where to start; rows with log p = −∞ stay.
        most: the longest first step; it doubles with each success, so that ascents rarely jump over valleys.
        max_calls: calls after which they end.

    Source: Broyden, Fletcher, Goldfarb & Shanno (1970), as in Nocedal & Wright (2006), chapter 6.
    """
    count, dim = y.shape
    value, gradient = density(y)
    inverse = torch.eye(dim, dtype=torch.float64).repeat(count, 1, 1)
    fresh = torch.ones(count, dtype=torch.bool)
    length, reach = torch.ones(count, dtype=torch.float64), torch.full((count,), most, dtype=torch.float64)
    going, arrived = value > -math.inf, torch.zeros(count, dtype=torch.bool)
    for _ in range(max_calls - 1):
        way = torch.einsum("kij,kj->ki", inverse, gradient)
        decrement = (way * gradient).sum(-1) / 2
        arrived = arrived | (going & (decrement < _DONE) & (~fresh | (decrement == 0)))
        going = going & ~arrived & (length > _SHORTEST)
        i = going.nonzero()[:, 0]
        if len(i) == 0:
            break
        norm = torch.linalg.vector_norm(way[i], dim=-1)
        step = (length[i] * (reach[i] / norm).clamp(max=1.0))[:, None] * way[i]
        there = y[i] + step
        new_value, new_gradient = density(there)
        rise = new_value - value[i]
        good = rise >= _ARMIJO * (step * gradient[i]).sum(-1)
        flat = ~good & (rise.abs() <= 1e-12 * (1 + value[i].abs())) & (decrement[i] < 1e-5)
        arrived[i[flat]] = True
        length[i] = torch.where(good, 1.0, length[i] / 3)
        j, s, g = i[good], step[good], (gradient[i] - new_gradient)[good]
        reach[j] = 2 * torch.maximum(reach[j] / 2, torch.linalg.vector_norm(s, dim=-1))
        y, value, gradient = y.index_copy(0, j, there[good]), value.clone(), gradient.clone()
        value[j], gradient[j] = new_value[good], new_gradient[good]
        inverse[j] = _updated(inverse[j], s, g, fresh[j])
        fresh[j] = False
    return Ends(y, value, arrived)


def _updated(
    inverse: Float[Tensor, "j d d"], step: Float[Tensor, "j d"], change: Float[Tensor, "j d"], fresh: Bool[Tensor, " j"]
) -> Float[Tensor, "j d d"]:
    """BFGS update of the inverse Hessian of −log p; left alone where the curvature along the step isn't positive."""
    along = (step * change).sum(-1)
    curved = along > 1e-10 * torch.linalg.vector_norm(step, dim=-1) * torch.linalg.vector_norm(change, dim=-1)
    safe = torch.where(curved, along, 1.0)
    first = (safe / change.square().sum(-1).clamp(min=1e-300))[:, None, None]
    eye = torch.eye(step.shape[1], dtype=step.dtype)
    start = torch.where((fresh & curved)[:, None, None], first * eye, inverse)
    way = torch.einsum("jik,jk->ji", start, change)
    cross = way[:, :, None] * step[:, None, :] / safe[:, None, None]
    outer = step[:, :, None] * step[:, None, :] / safe[:, None, None]
    new = start - cross - cross.transpose(1, 2) + (1 + (way * change).sum(-1) / safe)[:, None, None] * outer
    return torch.where(curved[:, None, None], new, inverse)
