"""Monte Carlo: means of log ratios over fresh draws, each with its standard error."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.estimate import Estimate
from whichkl.importance import pareto_smooth
from whichkl.targets import Target

_MATTERS = 0.005
"""Nats of standard error from which a heavy tail makes an estimate unreliable."""


def forward_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(p‖q) = E_p[log p − log q] by fresh draws of p; unbiased, up to log Z where p is unnormalised.

    Raises:
        TargetError: p has no sampler, or p or q can't be evaluated.
    """
    x = p.draws(n, seed)
    return mean_log_ratio("forward_kl", p.log_prob(x) - q.log_prob(x), None if p.normalized else "log_z", "draws of p")


def reverse_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(q‖p) = E_q[log q − log p] by fresh draws of q; unbiased, up to log Z where p is unnormalised.

    Raises:
        TargetError: q has no sampler, or p or q can't be evaluated.
    """
    x = q.draws(n, seed)
    return mean_log_ratio("reverse_kl", q.log_prob(x) - p.log_prob(x), None if p.normalized else "log_z", "draws of q")


def cross_entropy(loss: Float[Tensor, " n"], method: str, weights: Float[Tensor, " n"] | None = None) -> Estimate:
    """E_p[−log q] = KL(p‖q) + H(p) from −log q at draws of p that q wasn't fitted on, with weights if p's draws have them."""
    if weights is None or not bool(loss.isfinite().all()):
        return mean_log_ratio("forward_kl", loss, "entropy_p", method)
    w = (weights / weights.sum()).to(torch.float64)
    mean = float(w @ loss.to(torch.float64))
    stderr = float((w.square() @ (loss - mean).square()).sqrt())
    return Estimate("forward_kl", mean, stderr, "entropy_p", method=method, n=len(loss), ess=float(1 / w.square().sum()))


def jeffreys(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(p‖q) + KL(q‖p) = E_p[log p̃ − log q] − E_q[log p̃ − log q]: log Z cancels, so that it's absolute and unbiased.

    It bounds either KL from above. Needs a sampler and an unnormalised density of p.

    Raises:
        TargetError: p has no sampler or no log density.
    """
    if not (p.access.can_sample and Access.LOG_PROB in p.access):
        because = f"it requires draws of p and `log_prob`, and the target has {p.access.label}"
        raise TargetError(cannot("compute the Z-free Jeffreys divergence", because, "Pass `sampler=` and `log_prob=`"))
    x, y = p.draws(n, seed), q.draws(n, seed + 1)
    from_p = mean_log_ratio("jeffreys", p.log_prob(x) - q.log_prob(x), None, "draws of p")
    from_q = mean_log_ratio("jeffreys", q.log_prob(y) - p.log_prob(y), None, "draws of q")
    value = from_p.value + from_q.value
    return Estimate(
        quantity="jeffreys",
        value=value,
        stderr=math.hypot(from_p.stderr, from_q.stderr),
        finite="infinite" if value == math.inf else "not certified",
        method=f"Monte Carlo, {n:,} fresh draws of p and of q; the normaliser cancels",
        n=2 * n,
        khat=max(from_p.khat or -math.inf, from_q.khat or -math.inf),
        reliable=from_p.reliable and from_q.reliable,
        notes=from_p.notes + from_q.notes,
    )


def mean_log_ratio(
    quantity: str, log_ratio: Float[Tensor, " n"], up_to: Literal["log_z", "entropy_p"] | None, of: str
) -> Estimate:
    """Mean and standard error of a log ratio, with the tail shape that says whether its variance is finite."""
    log_ratio = log_ratio.detach().to(torch.float64)
    n = len(log_ratio)
    method = f"Monte Carlo, {n:,} fresh {of}" if of.startswith("draws") else of
    outside = int((log_ratio == math.inf).sum())
    if outside:
        note = f"{outside} of {n} draws ({outside / n:.1%}) fell where the other density is zero"
        return Estimate(quantity, math.inf, 0.0, up_to, "infinite", method, n=n, notes=(note,))
    stderr = float(log_ratio.std()) / math.sqrt(n)
    spread = float(log_ratio.std())
    away = (log_ratio - log_ratio.median()).abs()
    khat = -math.inf if spread < 1e-9 else pareto_smooth(torch.log(away.clamp(min=1e-300)))[1]
    heavy = khat >= 1 and stderr > _MATTERS
    notes = (f"the log ratio has a heavy tail (k̂ = {khat:.2f}): its mean or its error may be infinite",) if heavy else ()
    return Estimate(
        quantity, float(log_ratio.mean()), stderr, up_to, "not certified", method, n=n, khat=khat, reliable=not heavy, notes=notes
    )
