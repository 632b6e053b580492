"""Models: a fitted model as a target, a conditional model carried into the support, the Gaussian around a model's draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, biject_to

from whichkl.distributions import widened
from whichkl.particles import Reference
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
    law = widened(model) if isinstance(model, Distribution) else model  # digits that float32 lacks would cost quadrature dearly
    q = Target(
        sampler=lambda n: model.sample((n,)),
        log_prob=law.log_prob,
        normalized=True,
        dim=like.dim,
        support=like.bijection.constraints,
        names=like.names,
        dtype=like.dtype,
        device=like.device,
    )
    q.law = law if isinstance(law, Distribution) else None
    return q if law is model else q.evaluated_in_double()


def reference_around(x: Float[Tensor, "n d"], wider: float = 1.0) -> Reference:
    """Return the Gaussian with the mean and the covariance of rows, `wider` times as wide."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    # without the last term, rounding can make the covariance of columns that nearly coincide indefinite
    return Reference(x.mean(0), wider * torch.linalg.cholesky(covariance + 1e-12 * torch.diag(covariance.diagonal())))
