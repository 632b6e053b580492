"""Synthetic targets with a known truth: two normals on the line, shapes in the plane, forty Gaussians, and rows of wells."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from whichkl._checks import InputError, as_int, cannot
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target
from whichkl.targets.calling import Function

Known = Literal["both", "log_prob", "samples"]
_FLOOR = -1e4
TWO_MOONS_LOG_Z = 1.8775016
"""Log of the integral of `two_moons`, by the trapezoid rule on [−6, 6]² with step 0.006, in which it converges geometrically."""


@plain_modes()
def bimodal(half_distance: float = 3.0, left_weight: float = 0.5) -> MixtureSameFamily:
    """Return w N(−M, 1) + (1 − w) N(M, 1), the picture in Bishop (2006), section 10.1.

    Args:
        half_distance: M > 0, half the distance between the two means.
        left_weight: w in (0, 1).

    Raises:
        InputError: a number is out of its range.

    >>> bimodal(3.0).variance
    tensor(10., dtype=torch.float64)
    """
    if not (0 < half_distance < 1e6 and 0 < left_weight < 1):
        because = f"half_distance={half_distance} and left_weight={left_weight}"
        raise InputError(cannot("make this mixture", because, "Use half_distance > 0 and a weight in (0, 1)"))
    weights = torch.tensor([left_weight, 1 - left_weight], dtype=torch.float64, device="cpu")
    means = torch.tensor([-half_distance, half_distance], dtype=torch.float64, device="cpu")
    return MixtureSameFamily(Categorical(probs=weights), Normal(means, torch.ones(2, dtype=torch.float64, device="cpu")))


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
    dim = as_int(dim)
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


@plain_modes()
def gmm40(access: Known = "both") -> Target:
    """Return GMM-40: p(x) = 1/40 Σₖ N(x; mₖ, s² I) in the plane, with mₖ uniform on [−40, 40]² and s = log(1 + e) ≈ 1.3133.

    Normalised (log Z = 0), and −∞ where log p is below −10⁴, as in the original. E_p log p = −6.861 ± 0.002; the best single
    Gaussian has a forward KL of 2.183 nats.

    Args:
        access: ``"both"`` (sampler and log density), ``"log_prob"`` alone, or ``"samples"``: the sampler alone.

    Raises:
        InputError: another word for `access`.

    Source: Midgley, Stimper, Simm, Schölkopf & Hernández-Lobato (2023), the "GMM" problem, with its seed 0.

    >>> gmm40("log_prob")
    Target(dim=2, access: log_prob, normalized, differentiable)
    """
    means = gmm40_means()
    scale = math.log1p(math.e)

    def log_prob(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        squared = (x[:, None] - means.to(x)).square().sum(-1)
        value = torch.logsumexp(-squared / (2 * scale**2), 1) - math.log(40 * 2 * math.pi * scale**2)
        return torch.where(value < _FLOOR, -math.inf, value)

    def draw(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
        chosen = torch.randint(40, (n,), generator=generator, device="cpu")
        return means[chosen] + scale * torch.randn(n, 2, generator=generator, dtype=torch.float64, device="cpu")

    return _target(log_prob, draw, 2, access, normalized=True)


def gmm40_means() -> Float[Tensor, "40 2"]:
    """Return the means mₖ of `gmm40`.

    >>> gmm40_means()[0]
    tensor([-0.2995, 21.4577], dtype=torch.float64)
    """
    return ((torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu") - 0.5) * 80).to(
        torch.float64
    )


@plain_modes()
def many_well(dim: int = 32, access: Known = "both") -> Target:
    """Return ManyWell: log p̃(x) = Σ over pairs (x₁, x₂) of −x₁⁴ + 6x₁² + ½x₁ − ½x₂², with 2^(d/2) modes.

    84.43 % of the mass of each x₁ is in the right well. Log Z = 10.293480 nats a pair: 164.69568 for d = 32.

    Args:
        dim: d, even.
        access: ``"both"`` (sampler and log density), ``"log_prob"`` alone, or ``"samples"``: the sampler alone.

    Raises:
        InputError: an odd dimension, or another word for `access`.

    Source: Noé, Olsson, Köhler & Wu (2019) for a pair; Midgley et al. (2023) for their product.

    >>> many_well(32)
    Target(dim=32, access: sampler, log_prob, differentiable)
    """
    dim = as_int(dim)
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2 or dim % 2:
        raise InputError(cannot(f"make wells with `dim={dim!r}`", "they come in pairs of coordinates", "Use an even number"))
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64, device="cpu")
    # the first coordinate of a pair is drawn by the inverse of its distribution function, which has no formula
    below = torch.cumulative_trapezoid(torch.exp(_well(grid) - 11), grid)
    below = torch.cat([below.new_zeros(1), below]) / below[-1]

    def log_prob(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return _well(x[:, ::2]).sum(-1) - x[:, 1::2].square().sum(-1) / 2

    def draw(n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        uniform = torch.rand(n, dim // 2, generator=generator, dtype=torch.float64, device="cpu")
        cell = torch.searchsorted(below, uniform).clamp(1, len(grid) - 1)
        inside = (uniform - below[cell - 1]) / (below[cell] - below[cell - 1]).clamp(min=1e-300)
        x = torch.randn(n, dim, generator=generator, dtype=torch.float64, device="cpu")
        x[:, ::2] = grid[cell - 1] + inside * (grid[cell] - grid[cell - 1])
        return x

    return _target(log_prob, draw, dim, access, normalized=False)


def _well(x: Tensor) -> Tensor:
    """Log density of the first coordinate of a pair, up to a constant: wells near −1.71 and 1.75."""
    squared = x.square()
    return -squared.square() + 6 * squared + x / 2


def _target(log_prob: Function, draw: Function, dim: int, access: str, *, normalized: bool) -> Target:
    if access not in ("both", "log_prob", "samples"):
        because = "it isn't one of 'both', 'log_prob' and 'samples'"
        raise InputError(cannot(f"use `access={access!r}`", because, "Choose one of them"))
    if access == "samples":
        return Target(sampler=draw, dim=dim)
    return Target(log_prob=log_prob, sampler=None if access == "log_prob" else draw, dim=dim, normalized=normalized)
