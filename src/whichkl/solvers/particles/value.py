"""Value: draws of a model and of a wider law, by which it is weighted to p, and its forward KL and log Z by fresh ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.distributions import inside
from whichkl.divergences import Estimate
from whichkl.families.family import log_likelihood
from whichkl.families.student_t import MultivariateStudentT
from whichkl.importance import MIN_SHARE_OF_DRAWS, doubt_of_mean, effective_sample_size, khat_limit, pareto_smooth
from whichkl.particles.pool import Points, Pool
from whichkl.process.seeds import seeded
from whichkl.targets import Target

_MAX_POINTS_PER_CALL = 4_096
_WIDE_SHARE = 0.1
"""Share of the Student-t in the draws."""
_FREEDOM = 5.0
_MAX_SHAPE, _MAX_STDERR_WITH_HEAVY_TAIL = 0.5, 0.005
"""Largest k̂ of the terms of a value, and largest standard error with a larger k̂, at which the value is reliable."""
_JITTER = 1e-9


@dataclass(frozen=True)
class Proposal:
    """0.9 q + 0.1 t: a model, and a Student-t with p's mean and covariance, so that weights have no heavy tail.

    Source: Hesterberg (1995), a defensive mixture.
    """

    model: Any
    wide: MultivariateStudentT

    @classmethod
    def around(cls, model: Any, x: Float[Tensor, "n d"], w: Float[Tensor, " n"]) -> Proposal:
        """Defend a model by a Student-t around weighted points."""
        return cls(model, student_t_around(x, w))

    def draw(self, target: Target, count: int, seed: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Return draws, those of the model first, and log p there, −∞ outside the support and where it isn't a number."""
        with seeded(seed), torch.no_grad():
            own = self.model.sample((self.own(count),)).reshape(self.own(count), -1)
            x = torch.cat([own.to("cpu", torch.float64), self.wide.sample((count - self.own(count),))])
        at = x.to(target.device, target.dtype).split(_MAX_POINTS_PER_CALL)
        log_p = torch.cat([inside(target.bijection.contains(part), part, target.tried).detach() for part in at])
        return x, log_p.to("cpu", torch.float64)

    def own(self, count: int) -> int:
        """Return how many of the draws are the model's."""
        return count - round(_WIDE_SHARE * count)

    def log_prob(self, x: Float[Tensor, "n d"], log_q: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the log density, given that of the model."""
        return torch.logaddexp(log_q + math.log(1 - _WIDE_SHARE), self.wide.log_prob(x) + math.log(_WIDE_SHARE))


def student_t_around(x: Float[Tensor, "n d"], w: Float[Tensor, " n"]) -> MultivariateStudentT:
    """Return a Student-t with the mean and the covariance of points whose weights sum to 1 as its scale."""
    mean = w @ x
    centred = x - mean
    covariance = (w[:, None] * centred).T @ centred
    tril = torch.linalg.cholesky(covariance + _JITTER * torch.diag(covariance.diagonal().clamp(min=1e-300)))
    freedom = torch.tensor(_FREEDOM, dtype=x.dtype, device=x.device)
    return MultivariateStudentT(freedom, mean, tril, validate_args=False)


def tail(ratio: Float[Tensor, " n"]) -> float:
    """Return k̂ of weights, from their logarithms."""
    return pareto_smooth(ratio)[1] if bool((ratio > -math.inf).any()) else math.inf


def are_trusted(ratio: Float[Tensor, " n"], khat: float) -> bool:
    """Return whether weights with these logarithms can stand for p."""
    return khat <= khat_limit(len(ratio)) or effective_sample_size(ratio) >= MIN_SHARE_OF_DRAWS * len(ratio)


def measured(points: Points, proposal: Proposal, target: Target, count: int, seed: int) -> tuple[Estimate, Estimate]:
    """Estimate KL(p‖q) = E_p[log p̃ − log q] − log Z, and log Z.

    Points of p and fresh draws of the proposal are weighted together, as bridge sampling does (`particles.pool`), and the error
    of the value has that of log Z in it.
    """
    x, log_p = proposal.draw(target, count, seed)
    both = torch.cat([points.x, x])
    log_q = log_likelihood(proposal.model, both).detach()
    log_m = proposal.log_prob(both, log_q)
    pool, ratio = Pool.of(points, log_p, log_m), log_p - log_m[len(points.x) :]
    value, stderr, shape = pool.forward_kl(log_q, normalized=target.normalized)
    khat = tail(ratio)
    doubts = () if are_trusted(ratio, khat) else (f"k̂ of the weights is {_shown(khat)}: the draws don't reach all of p",)
    if shape >= _MAX_SHAPE and stderr > _MAX_STDERR_WITH_HEAVY_TAIL:
        doubts = (*doubts, f"p log(p/q) has a heavy tail (k̂ = {_shown(shape)}): {doubt_of_mean(shape)}")
    estimate = Estimate(
        "forward_kl",
        value,
        stderr,
        finite="infinite" if value == math.inf else "not certified",
        method=f"{len(points.x):,} points of p and {count:,} fresh draws of the model, weighted together",
        n=len(both),
        ess=effective_sample_size(ratio),
        khat=max(khat, shape) if doubts else shape,
        reliable=not doubts,
        notes=doubts,
    )
    unmet = () if are_trusted(ratio, khat) else doubts[:1]
    fields: dict[str, Any] = {"method": "bridge sampling", "n": len(both), "reliable": not unmet, "notes": unmet}
    return estimate, Estimate("log_z", pool.log_z, pool.log_z_stderr(), **fields)


def _shown(khat: float) -> str:
    return "∞" if khat == math.inf else f"{khat:.2f}"


def enumerated(target: Target, model: Any) -> Estimate:
    """Return KL(p‖q) = Σ p (log p − log q) over all states."""
    x, log_p = target.atoms
    log_p = log_p - torch.logsumexp(log_p, 0)
    terms = log_p.exp() * (log_p - log_likelihood(model, x).detach().to(log_p))
    return Estimate.settled("forward_kl", max(0.0, float(torch.where(log_p > -math.inf, terms, 0.0).sum())), "enumeration")


def summed(parts: Sequence[Estimate], shift: float = 0.0) -> Estimate:
    """Return the sum of independent estimates of one quantity, and a constant."""
    khats = [one.khat for one in parts if one.khat is not None]
    return replace(
        parts[0],
        value=sum(one.value for one in parts) + shift,
        stderr=math.hypot(*(one.stderr for one in parts)),
        method=f"{parts[0].method}, in each of {len(parts)} blocks",
        n=sum(one.n or 0 for one in parts),
        ess=None,
        khat=max(khats) if khats else None,
        reliable=all(one.reliable for one in parts),
        notes=tuple(dict.fromkeys(note for one in parts for note in one.notes)),
    )
