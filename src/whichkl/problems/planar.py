"""Planar densities that no Gaussian matches, with known log Z: a banana, a funnel, two moons."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target

TWO_MOONS_LOG_Z = 1.8775016
"""Log of the integral of `two_moons`, by the trapezoid rule on [−6, 6]² with step 0.006, in which it converges geometrically."""


@plain_modes()
def banana() -> Target:
    """Return x₁ ~ N(0, 1), x₂ | x₁ ~ N(x₁² − 1, ½): normalised, log Z = 0.

    Source: Haario, Saksman & Tamminen (1999), for the shape.

    >>> banana()
    Target(dim=2, access: log_prob, normalized, differentiable)
    """

    def log_prob(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        return -x[:, 0].square() / 2 - 2 * (x[:, 1] - x[:, 0].square() + 1).square() - math.log(math.pi)

    return Target(log_prob=log_prob, dim=2, normalized=True)


@plain_modes()
def funnel(dim: int = 2) -> Target:
    """Return x₁ ~ N(0, 3), xⱼ | x₁ ~ N(0, exp(x₁/2)) for the others: normalised, log Z = 0.

    Args:
        dim: d, at least 2.

    Raises:
        InputError: it's less.

    Source: Neal (2003).

    >>> funnel(10)
    Target(dim=10, access: log_prob, normalized, differentiable)
    """
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2:
        raise InputError(cannot(f"make a funnel with `dim={dim!r}`", "it has a mouth and a neck", "Use at least 2"))

    def log_prob(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        first, rest = x[:, 0], x[:, 1:]
        tail = -(rest.square() * torch.exp(-first)[:, None] + first[:, None]).sum(-1) / 2
        return -first.square() / 18 + tail - math.log(3) - dim / 2 * math.log(2 * math.pi)

    return Target(log_prob=log_prob, dim=dim, normalized=True)


@plain_modes()
def two_moons() -> Target:
    """Return log p̃ = −½ ((‖x‖ − 2) / 0.4)² + log(exp(−½ ((x₁ − 2) / 0.6)²) + exp(−½ ((x₁ + 2) / 0.6)²)): two arcs of a ring.

    Log Z = 1.8775016.

    Source: Rezende & Mohamed (2015), their potential U₁.

    >>> two_moons()
    Target(dim=2, access: log_prob, differentiable)
    """

    def log_prob(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        ring = -((torch.linalg.vector_norm(x, dim=-1) - 2) / 0.4).square() / 2
        right, left = -((x[:, 0] - 2) / 0.6).square() / 2, -((x[:, 0] + 2) / 0.6).square() / 2
        value: Float[Tensor, " n"] = ring + torch.logaddexp(right, left)
        return value

    return Target(log_prob=log_prob, dim=2)
