"""Distributions: torch's own laws in float64, with log densities where torch's raise, saturate or end too early."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    Distribution,
    GeneralizedPareto,
    Independent,
    Kumaraswamy,
    MixtureSameFamily,
    MultivariateNormal,
    TransformedDistribution,
    VonMises,
    constraints,
)
from torch.distributions.transforms import ComposeTransform, Transform

_ROWS_PER_PRODUCT = 1_024
"""Number of rows whose residuals from all components are in memory at once; more are slower, since they leave the cache."""


def widened(p: Distribution) -> Distribution:
    """Return one of torch's laws with float64 parameters: float32 closed forms lose all digits of small divergences."""
    if not _is_torchs(p):
        return p
    wide = copy.copy(p)
    for name, value in vars(p).items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "mps":
            vars(wide)[name] = value.detach().to(torch.float64)
        elif isinstance(value, Distribution):
            vars(wide)[name] = widened(value)
        elif name == "transforms":
            vars(wide)[name] = [_wide_transform(step) for step in value]
    return wide


def _wide_transform(step: Transform) -> Transform:
    """Return a transform with float64 parameters; itself where it has no narrower ones, since some equal no other."""
    values = vars(step)
    if isinstance(step, ComposeTransform):
        parts = [_wide_transform(part) for part in step.parts]
        return step if all(map(operator.is_, parts, step.parts)) else ComposeTransform(parts)
    narrow = [
        name for name, value in values.items() if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float16)
    ]
    if not narrow:
        return step
    wide = copy.copy(step)
    for name in narrow:
        vars(wide)[name] = values[name].detach().to(torch.float64)
    return wide


def _is_torchs(p: Distribution) -> bool:
    """Whether a law is one of torch's that work in float64 (GeneralizedPareto doesn't)."""
    parts = [p, *getattr(p, "transforms", []), *(one for one in vars(p).values() if isinstance(one, Distribution))]
    plain = all(type(one).__module__.startswith(("torch.distributions.", "whichkl.targets.supports")) for one in parts)
    inner = all(_is_torchs(one) for one in parts[1:] if isinstance(one, Distribution))
    return plain and inner and type(p).__name__ != "GeneralizedPareto"


def inside(inside: Tensor, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Evaluate a log density at the rows inside the support; other rows get −inf."""
    if bool(inside.all()):
        return function(x)
    value = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    if bool(inside.any()):
        value[inside] = function(x[inside])
    return value


def is_outside(error: BaseException) -> bool:
    """Whether a law of torch, or one written like these, raised because a value lies outside its support."""
    return isinstance(error, ValueError) and "to be within the support" in str(error)


def names_a_range(error: BaseException) -> bool:
    """Whether a law raised because of a value outside its support, or a parameter outside its range."""
    return is_outside(error) or (isinstance(error, ValueError) and "to satisfy the constraint" in str(error))


def distribution_log_prob(p: Distribution, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return the log density of a torch distribution; −inf outside its support, where torch may raise or return a number."""
    point = x[:, 0] if p.event_shape == () else x
    support = known_support(p)
    if support is None:
        return p.log_prob(point)
    within = support.check(point) & _reached(p, point)
    if isinstance(p, Kumaraswamy):  # torch's is −∞ where xᵃ rounds to 0
        return inside(within, point, lambda y: _log_kumaraswamy(p, y))
    if isinstance(p, VonMises):
        return inside(within, point, lambda y: log_von_mises(p, y))
    if isinstance(p, GeneralizedPareto):  # torch's raises in float64
        return inside(within, point, lambda y: _log_generalized_pareto(p, y))
    if x.dtype == torch.float64 and _single_precision(p):  # torch casts x to the parameters' type, where it overflows
        within = within & (x.abs() < 1e30).all(-1)
    return inside(within, point, lambda y: p.log_prob(y).to(x.dtype))


def log_prob_of_rows(p: Any, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return `p.log_prob(x)`; of a mixture of Gaussians by one product per component, in a quarter of torch's time."""
    parts = p.component_distribution if _mixes_gaussians(p) else None
    if parts is None or x.dtype != parts.loc.dtype or x.ndim != 2 or x.shape[1:] != parts.event_shape:
        value: Tensor = p.log_prob(x)
        return value
    tril, dim = parts.scale_tril, x.shape[1]
    inverse = torch.linalg.solve_triangular(tril, torch.eye(dim, dtype=tril.dtype, device=tril.device), upper=False)
    volume = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * dim * math.log(2 * math.pi)
    constant = (p.mixture_distribution.logits.log_softmax(-1) - volume)[:, None]
    found, loc = [], parts.loc[..., None]
    for rows in x.split(_ROWS_PER_PRODUCT):
        white = inverse @ (rows.T - loc)  # columns by rows: sums over columns are then several times faster
        found.append(torch.logsumexp(constant - white.square().sum(1) / 2, 0))
    return torch.cat(found)


def draws_of(p: Any, shape: torch.Size) -> Tensor:
    """Return `p.sample(shape)`; of a mixture of K Gaussians without torch's n K draws, of which it keeps n."""
    if not _mixes_gaussians(p):
        x: Tensor = p.sample(shape)
        return x
    parts = p.component_distribution
    which = p.mixture_distribution.sample(shape).flatten()
    z = torch.randn(*which.shape, parts.loc.shape[-1], dtype=parts.loc.dtype, device=parts.loc.device)
    x = torch.empty_like(z)
    for k, (loc, tril) in enumerate(zip(parts.loc, parts.scale_tril, strict=True)):
        rows = (which == k).nonzero()[:, 0]
        x[rows] = loc + z[rows] @ tril.T
    return x.reshape(*shape, -1)


def _mixes_gaussians(p: Any) -> bool:
    """Whether a law is torch's own mixture of full Gaussians, neither conditional nor checked at every call."""
    if type(p) is not MixtureSameFamily or p._validate_args or p.batch_shape != ():
        return False
    return type(p.component_distribution) is MultivariateNormal


def _reached(p: Distribution, x: Tensor) -> Tensor:
    """Whether points come from the base's support: torch says that a shifted exponential covers the whole line."""
    if isinstance(p, Independent):
        within = _reached(p.base_dist, x)
        return within.flatten(-p.reinterpreted_batch_ndims).all(-1)
    if not isinstance(p, TransformedDistribution) or type(p) is not TransformedDistribution or _is_real(p.base_dist):
        # torch's own subclasses have the right supports, and their inverses saturate
        return torch.ones(x.shape[: x.ndim - len(p.event_shape)], dtype=torch.bool, device=x.device)
    for transform in reversed(p.transforms):
        x = transform.inv(x)
    support = known_support(p.base_dist)
    return _reached(p.base_dist, x) if support is None else support.check(x) & _reached(p.base_dist, x)


def _is_real(p: Distribution) -> bool:
    """Whether a law covers the whole space, as zuko's flows do, which don't say so."""
    return isinstance(known_support(p) or constraints.real, (type(constraints.real), type(constraints.real_vector)))


def known_support(p: Distribution) -> constraints.Constraint | None:
    """Return the support that a law names; None if it names none."""
    try:
        return p.support
    except NotImplementedError:
        return None


def _log_kumaraswamy(p: Kumaraswamy, x: Tensor) -> Tensor:
    """Log a + log b + (a − 1) log x + (b − 1) log(1 − xᵃ). Source: Kumaraswamy (1980)."""
    a, b = p.concentration1.to(x.dtype), p.concentration0.to(x.dtype)
    log_x = x.log()
    value: Tensor = a.log() + b.log() + (a - 1) * log_x + (b - 1) * (-torch.expm1(a * log_x)).log()
    return value


def log_von_mises(p: VonMises, x: Tensor) -> Tensor:
    """κ cos(x − μ) − log(2π I₀(κ)); torch's I₀ is a polynomial that is right to seven digits. Source: Mardia & Jupp (2000)."""
    loc, k = p.loc.to(x.dtype), p.concentration.to(x.dtype)
    value: Tensor = -2 * k * torch.sin((x - loc) / 2).square() - (2 * math.pi * torch.special.i0e(k)).log()
    return value


def _log_generalized_pareto(p: GeneralizedPareto, x: Tensor) -> Tensor:
    """−log s − (1 + 1/c) log(1 + c z), z = (x − loc) / s; −log s − z where c = 0. Source: Pickands (1975)."""
    loc, scale, c = (one.to(x.dtype) for one in (p.loc, p.scale, p.concentration))
    z, shape = (x - loc) / scale, torch.where(c == 0, 1.0, c)
    return -scale.log() - torch.where(c == 0, z, (1 + 1 / shape) * torch.log1p(shape * z))


def _single_precision(p: Distribution) -> bool:
    return any(getattr(getattr(p, name, None), "dtype", None) in (torch.float32, torch.float16) for name in p.arg_constraints)
