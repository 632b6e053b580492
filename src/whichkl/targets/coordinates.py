"""Coordinates: a target and its functions in free coordinates u ∈ ℝᵏ, where x = T(u) is in the support."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.distributions import inside
from whichkl.process.torch_modes import autograd_on, normal
from whichkl.targets.calling import Function
from whichkl.targets.evaluations import Evaluations
from whichkl.targets.free_laws import FreeLaw
from whichkl.targets.light_parts import LightPart
from whichkl.targets.supports import Bijection

if TYPE_CHECKING:
    from whichkl.targets.target import Target


def free_target(p: Target) -> Target:
    """Return a target in free coordinates u, with density p(T(u)) |∂T/∂u|; its evaluations are counted with those of `p`."""
    bijection = p.bijection
    if bijection.is_discrete:
        because = "it is discrete, and this family has a density on ℝᵈ"
        instead = "Use Product('bernoulli'), Product('categorical'), Autoregressive() or Categorical() of whichkl.families"
        raise TargetError(cannot("carry this target to ℝᵈ", because, instead))
    if p.stream is not None:  # solvers carry the rows themselves, part by part
        free = copy.copy(p)
        free.carrier, free.dim, free.bijection = bijection, bijection.free_dim, Bijection(None, bijection.free_dim)
        return free
    if bijection.is_real:
        return p
    inner = copy.copy(p)
    log_prob, sampler = _free_functions(p)
    free = type(p)(
        samples=None if p.samples is None else bijection.inverse(p.samples),
        log_prob=log_prob,
        sampler=sampler,
        score=_free_score(bijection, inner.gradient) if p.score else None,
        dim=bijection.free_dim,
        names=p.names if bijection.free_dim == p.dim else None,
        normalized=p.normalized,
        weights=p.weights,
        chains=p.chains,
        dtype=p.dtype,
        device=p.device,
    )
    if free.density is not None and p.density is not None:
        free.density.place, free.density.liveness.source = bijection.forward, p.density.liveness
        free.density.probe = free.density.probe.to(p.density.probe.dtype)
    free.repeats = p.repeats
    free.log_ratio = None if p.log_ratio is None else partial(_of_free, p.log_ratio, bijection)
    free.known_modes = None if p.known_modes is None else bijection.inverse(p.known_modes)
    free.law = p.law if p.free_law is not None else None
    carried = [LightPart(weight, bijection.inverse(x)) for weight, x in p.light_parts]
    free.light_parts = [LightPart(weight, u[u.isfinite().all(1)]) for weight, u in carried]
    free.context, free.context_names, free.scalar = p.context, p.context_names, p.scalar
    free.evaluations, inner.evaluations = p.evaluations, Evaluations()  # the free target counts the calls already
    return free


def _of_free(function: Callable[[Tensor], Tensor], bijection: Bijection, u: Float[Tensor, "n k"]) -> Tensor:
    """Return a function of x = T(u)."""
    return function(bijection.forward(u))


def _free_functions(p: Target) -> tuple[Function | None, Function | None]:
    """Return the log density and the sampler of u: a known law's own, else p's, carried through x = T(u)."""
    bijection, known = p.bijection, p.free_law
    if known is not None:
        return partial(_whole_log_prob, known), lambda n: known.sample(torch.Size((n,))).reshape(n, -1)

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        return bijection.inverse(p.draws(n, generator.initial_seed()))

    carried = None
    if p.density is not None:
        carried = _free_log_prob(bijection, p.density.unchecked, differentiable=p.density.differentiable)
    return carried, sampler if p.sampler else None


def in_free_coordinates(p: Target, q: Target) -> tuple[Target, Target]:
    """Return a pair of laws of one support in free coordinates, where both are known there; else the pair itself.

    Divergences are the same there, and a law such as Beta(0.1, 0.1) has no mass beyond the last number before 1.
    """
    if p.free_law is None or q.free_law is None:
        return p, q
    (one, *_), (other, *_) = p.bijection.constraints, q.bijection.constraints
    is_same = p.bijection.bounds == q.bijection.bounds and one.event_dim == other.event_dim and p.dim == q.dim
    return (free_target(p), free_target(q)) if is_same else (p, q)


def _whole_log_prob(law: FreeLaw, u: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Evaluate the log density of a law of a scalar or of a row."""
    value = law.log_prob(u)
    return value if value.ndim == 1 else value[:, 0]


def _free_log_prob(bijection: Bijection, log_prob: Callable[[Tensor], Tensor], *, differentiable: bool) -> Function:
    """Return u ↦ log p(T(u)) + log|∂T/∂u|; −∞ where T(u) is an end of the support, or beyond, by rounding."""

    def carried(u: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        def value(free: Tensor) -> Tensor:
            x = bijection.forward(free)
            whole = log_prob(x) + bijection.log_jacobian(free, x)
            return whole if differentiable else whole.detach()

        return inside(bijection.is_interior(bijection.forward(u)), u, value)

    return carried


def _free_score(bijection: Bijection, score: Callable[[Tensor], Tensor]) -> Function:
    """Return the gradient in u of log p(T(u)) + log|∂T/∂u|, from the gradient of log p in x."""

    def carried(u: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        with autograd_on():
            free = normal(u.detach()).requires_grad_(True)
            x = bijection.forward(free)
            pulled = (x * score(x)).sum() + bijection.log_jacobian(free, x).sum()
            (gradient,) = torch.autograd.grad(pulled, free)
        return gradient

    return carried
