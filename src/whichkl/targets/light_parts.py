"""Light parts: the components of a mixture that ordinary draws don't show, since each is so light."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, TransformedDistribution

from whichkl.process.seeds import seeded

_MIN_DRAWS, _MAX_DRAWS, _DRAWS_OF_ALL = 64, 1024, 1 << 16
_MIN_WEIGHT = 0.5
"""Weight from which draws show a component, however narrow it is."""
_MAX_PARTS = 1024


class LightPart(NamedTuple):
    """A component's weight, and draws of it."""

    weight: float
    draws: Float[Tensor, "n d"]


def light_parts(p: Any, dim: int) -> list[LightPart]:
    """Return each light component of a mixture of `dim` variables, also inside `Independent` or transforms; else nothing.

    Where it is inside `Independent`, one coordinate is a draw of the component, and the others are ordinary draws.

    >>> from torch.distributions import Categorical, Normal
    >>> p = MixtureSameFamily(Categorical(torch.tensor([1.0, 1e-6])), Normal(torch.tensor([0.0, 1000.0]), torch.ones(2)))
    >>> [round(float(part.draws.mean()), -1) for part in light_parts(p, 1)]
    [1000.0]
    """
    weights = mixture_weights(p)
    if weights is None or max(1, p.event_shape.numel()) != dim or _mixes_coordinates(p):
        return []
    is_light = (weights > 0) & (weights < _MIN_WEIGHT)
    count = min(_MAX_PARTS, int(is_light.sum()))
    n = torch.Size((min(_MAX_DRAWS, max(_MIN_DRAWS, _DRAWS_OF_ALL // max(1, count))),))
    order = torch.where(is_light, weights, -1.0).flatten().argsort(descending=True)[:count].tolist()
    try:
        with seeded(0), torch.no_grad():
            draws, others = _components(p, n).cpu(), p.sample(n).cpu() if weights.ndim > 1 else None
    except NotImplementedError:  # a law with a log density alone
        return []
    parts = []
    for one in order:
        j, k = divmod(one, weights.shape[-1])
        x = (
            draws[:, k].reshape(*n, -1)
            if others is None
            else others.index_copy(1, torch.tensor([j], dtype=torch.int64, device="cpu"), draws[:, j, k, None])
        )
        parts.append(LightPart(float(weights.flatten()[one]), x.to(torch.float64)))
    return parts


def mixture_weights(p: Any) -> Float[Tensor, "... K"] | None:
    """Weights of a mixture's components, per coordinate inside `Independent`; None for other laws."""
    while isinstance(p, (Independent, TransformedDistribution)):
        p = p.base_dist
    return p.mixture_distribution.probs.detach().cpu() if isinstance(p, MixtureSameFamily) else None


def _mixes_coordinates(p: Any) -> bool:
    """Whether a transform of several coordinates lies over the mixture: components of one of them can't go through it alone."""
    steps = getattr(p, "transforms", ())
    return any(step.domain.event_dim > 0 for step in steps) or (hasattr(p, "base_dist") and _mixes_coordinates(p.base_dist))


def _components(p: Any, n: torch.Size) -> Tensor:
    """Draws (n, …, K, …) of every component."""
    if isinstance(p, MixtureSameFamily):
        return p.component_distribution.sample(n)
    draws = _components(p.base_dist, n)
    for step in getattr(p, "transforms", ()):
        draws = step(draws)
    return draws
