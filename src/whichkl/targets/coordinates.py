"""Coordinates: the functions of a target, read in free coordinates u ∈ ℝᵏ with x = T(u)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.distributions import inside
from whichkl.process.torch_modes import autograd_on, normal
from whichkl.targets.log_density import Function
from whichkl.targets.supports import Bijection


def free_log_prob(bijection: Bijection, log_prob: Callable[[Tensor], Tensor], *, differentiable: bool) -> Function:
    """Return u ↦ log p(T(u)) + log|∂T/∂u|, −∞ where T(u) leaves the support in floating point."""

    def carried(u: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        def value(free: Tensor) -> Tensor:
            x = bijection.forward(free)
            whole = log_prob(x) + bijection.log_jacobian(free, x)
            return whole if differentiable else whole.detach()

        return inside(bijection.contains(bijection.forward(u)), u, value)

    return carried


def free_sampler(bijection: Bijection, draws: Callable[[int, int], Tensor]) -> Function:
    """Return the sampler of u = T⁻¹(x)."""

    def carried(n: int, generator: torch.Generator) -> Float[Tensor, "n k"]:
        return bijection.inverse(draws(n, generator.initial_seed()))

    return carried


def free_score(bijection: Bijection, score: Callable[[Tensor], Tensor]) -> Function:
    """Return the gradient in u of log p(T(u)) + log|∂T/∂u|, from that of log p in x."""

    def carried(u: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        with autograd_on():
            free = normal(u.detach()).requires_grad_(True)
            x = bijection.forward(free)
            pulled = (x * score(x)).sum() + bijection.log_jacobian(free, x).sum()
            (gradient,) = torch.autograd.grad(pulled, free)
        return gradient

    return carried
