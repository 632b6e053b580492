"""Models: a fitted model as a target, and a conditional model carried into the support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, biject_to

from whichkl.targets import Target
from whichkl.targets.supports import Bijection


@dataclass(frozen=True)
class Carried:
    """A conditional model q(u|x) of free coordinates, carried into the support of y."""

    model: Any
    bijection: Bijection

    def __call__(self, x: Tensor) -> Distribution:
        """Return the law of y at each row of x."""
        law = self.model(x)
        if len(law.event_shape):
            return self.bijection.wrap(law)
        return TransformedDistribution(law, [biject_to(self.bijection.constraints[0])], validate_args=False)


def carried(model: Any, bijection: Bijection) -> Any:
    """Carry a model of free coordinates, conditional or not, into the support."""
    if bijection.is_real:
        return model
    return bijection.wrap(model) if isinstance(model, Distribution) else Carried(model, bijection)


def model_target(model: Distribution, like: Target) -> Target:
    """Return a model as a target with all accesses, so q can be sampled and evaluated like any p."""
    return Target(
        sampler=lambda n: model.sample((n,)),
        log_prob=model.log_prob,
        normalized=True,
        dim=like.dim,
        support=like.bijection.constraints,
        names=like.names,
        dtype=like.dtype,
        device=like.device,
    )
