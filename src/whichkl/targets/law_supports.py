"""Law supports: where a torch distribution has mass, also where its transforms move the ends that torch names."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, VonMises, constraints, transforms
from torch.distributions.constraints import Constraint
from torch.distributions.transformed_distribution import TransformedDistribution

from whichkl.targets.supports import Supported, scalar_constraint


def support_of(p: Distribution, dim: int) -> tuple[Constraint, ...]:
    """Return a torch distribution's support as constraints for `Bijection`, one per column if their bounds differ."""
    if isinstance(p, Supported):
        return p.bijection.constraints
    is_mixture = isinstance(p, MixtureSameFamily)
    inner: Any = p.component_distribution if isinstance(p, MixtureSameFamily) else p
    inner = inner.base_dist if isinstance(inner, Independent) else inner
    support = inner.support if is_mixture else p.support
    if isinstance(inner, VonMises):  # torch names the whole line, on which the density is periodic
        support = constraints.interval(-math.pi, math.pi)
    support = constraints.real if support is None else scalar_constraint(support)
    bounds = {name: getattr(support, name) for name in ("lower_bound", "upper_bound") if hasattr(support, name)}
    if type(inner) is TransformedDistribution and inner.event_shape == ():
        bounds = _reached_ends(inner) or bounds
    if support.event_dim > 0 or support.is_discrete or not any(isinstance(v, Tensor) for v in bounds.values()):
        return (support,)
    wide = {name: torch.as_tensor(value, dtype=torch.float64, device="cpu") for name, value in bounds.items()}
    wide = {name: value for name, value in wide.items() if not bool(value.isinf().all())}  # GeneralizedPareto names ∞
    if is_mixture:
        wide = {name: value.min() if name == "lower_bound" else value.max() for name, value in wide.items()}
    columns = [value.expand(dim).tolist() for value in torch.broadcast_tensors(*wide.values())]
    kind = {2: constraints.interval, 1: constraints.greater_than if "lower_bound" in wide else constraints.less_than}[len(wide)]
    return tuple(kind(*ends) for ends in zip(*columns, strict=True))


def _reached_ends(p: Distribution) -> dict[str, Tensor]:
    """The ends of a scalar law after its transforms, where those are monotone; torch names what the last one could reach."""
    if type(p) is not TransformedDistribution:
        bounds = {name: getattr(p.support, name, None) for name in ("lower_bound", "upper_bound")}
        return {name: torch.as_tensor(end, dtype=torch.float64, device="cpu") for name, end in bounds.items() if end is not None}
    known, infinite = _reached_ends(p.base_dist), torch.tensor(math.inf, dtype=torch.float64, device="cpu")
    ends = known.get("lower_bound", -infinite), known.get("upper_bound", infinite)
    for step in p.transforms:
        if not step.bijective or step.domain.event_dim > 0:
            return {}
        first, last = _moved(step, ends[0]), _moved(step, ends[1])
        ends = torch.minimum(first, last), torch.maximum(first, last)
    known = dict(zip(("lower_bound", "upper_bound"), ends, strict=True))
    return {name: end for name, end in known.items() if bool(end.isfinite().all())}


def _moved(step: transforms.Transform, end: Tensor) -> Tensor:
    """Return where a transform takes an end; torch's sigmoid stops short of its ends."""
    if isinstance(step, transforms.ComposeTransform):
        return reduce(lambda x, part: _moved(part, x), step.parts, end)
    if isinstance(step, transforms.SigmoidTransform):
        return torch.sigmoid(end)
    moved: Tensor = torch.logit(end) if isinstance(step.inv, transforms.SigmoidTransform) else step(end)
    return moved.to(torch.float64)
