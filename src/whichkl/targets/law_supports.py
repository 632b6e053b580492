"""Law supports: where a torch distribution has mass, also where its transforms move the ends that torch names."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, VonMises, constraints, transforms
from torch.distributions.constraints import Constraint
from torch.distributions.transformed_distribution import TransformedDistribution

from whichkl.distributions import known_support
from whichkl.targets.column_constraints import constraint_columns
from whichkl.targets.supports import Supported


def support_of(p: Distribution, dim: int) -> tuple[Constraint, ...]:
    """Return a torch distribution's support as constraints for `Bijection`, one per column if their bounds differ."""
    return p.bijection.constraints if isinstance(p, Supported) else constraint_columns(_support(p), dim)


def _support(p: Distribution) -> Constraint:
    if isinstance(p, MixtureSameFamily):
        return constraints.MixtureSameFamilyConstraint(_support(p.component_distribution))
    if isinstance(p, Independent):
        return constraints.independent(_support(p.base_dist), p.reinterpreted_batch_ndims)
    if isinstance(p, VonMises):  # torch names the whole line, on which the density is periodic
        return constraints.interval(-math.pi, math.pi)
    ends = _reached_ends(p) if type(p) is TransformedDistribution and p.event_shape == () else {}
    if ends:
        kind = {2: constraints.interval, 1: constraints.greater_than if "lower_bound" in ends else constraints.less_than}
        return kind[len(ends)](*ends.values())
    return known_support(p) or constraints.real


def _reached_ends(p: Distribution) -> dict[str, Tensor]:
    """The ends of a scalar law after its transforms, where those are monotone; torch names what the last one could reach."""
    if type(p) is not TransformedDistribution:
        bounds = {name: getattr(known_support(p), name, None) for name in ("lower_bound", "upper_bound")}
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
