"""Monte Carlo: means of log ratios over fresh draws, each with its standard error."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.kinds import ChiSquared, Kind, Renyi
from whichkl.importance import pareto_smooth
from whichkl.targets import Target

_MATTERS = 0.005
"""Nats of standard error from which a heavy tail makes an estimate unreliable."""


def forward_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(p‖q) = E_p[log p − log q] by fresh draws of p, or its samples; unbiased, up to log Z where p is unnormalised.

    Samples that q was fitted on flatter it: hold some out.

    Raises:
        TargetError: p has neither a sampler nor samples, or p or q can't be evaluated.
    """
    x, of = _points(p, n, seed, "p")
    ratio = p.log_prob(x) - q.log_prob(x)
    up_to: Literal["log_z"] | None = None if p.normalized else "log_z"
    if p.sampler is None and p.weights is not None:
        return replace(cross_entropy(ratio, of, p.weights), up_to=up_to)
    return mean_log_ratio("forward_kl", ratio, up_to, of)


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
    if p.weights is not None or q.weights is not None:
        because = "the samples are weighted"
        raise TargetError(cannot("compute the Z-free Jeffreys divergence", because, "Resample them by their weights first"))
    (x, of_p), (y, of_q) = _points(p, n, seed, "p"), _points(q, n, seed + 1, "q")
    from_p = mean_log_ratio("jeffreys", p.log_prob(x) - q.log_prob(x), None, "draws of p")
    from_q = mean_log_ratio("jeffreys", q.log_prob(y) - p.log_prob(y), None, "draws of q")
    value = from_p.value + from_q.value
    return Estimate(
        quantity="jeffreys",
        value=value,
        stderr=math.hypot(from_p.stderr, from_q.stderr),
        finite="infinite" if value == math.inf else "not certified",
        method=f"Monte Carlo, {of_p} and {of_q}; normalisers cancel",
        n=len(x) + len(y),
        khat=max(from_p.khat or -math.inf, from_q.khat or -math.inf),
        reliable=from_p.reliable and from_q.reliable,
        notes=from_p.notes + from_q.notes,
    )


def by_both(p: Target, q: Target, kind: Kind, n: int = 20_000, seed: int = 0) -> Estimate:
    """Any f-divergence g(∫ h(p, q)) as ½ E_p[h/m] + ½ E_q[h/m], m = (p + q)/2, from draws and normalised densities of both.

    Unbiased before g. No density divides what it doesn't cover, so that h/m is bounded for total variation, Hellinger,
    Jensen–Shannon and skew KLs; for the others the tail shape of the terms says whether their error can be trusted.

    Raises:
        TargetError: a density isn't normalised, samples are weighted, or there are no draws of one side.
    """
    if not (p.normalized and q.normalized) or p.weights is not None or q.weights is not None:
        because = "it requires normalised densities, and equally weighted draws, of both"
        raise TargetError(cannot(f"estimate `{kind.name}` by Monte Carlo", because, "Pass `normalized=True` if they are"))
    sides, method = [], []
    for side, name, shift in ((p, "p", 0), (q, "q", 1)):
        x, of = _points(side, n, seed + shift, name)
        log_p, log_q = (one.log_prob(x).detach().to(torch.float64) for one in (p, q))
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        inside = kind.integrand(log_p, log_q)
        terms = torch.where(inside == 0, 0.0, inside * torch.exp(-middle))
        if bool((terms == math.inf).any()):
            share = float((terms == math.inf).double().mean())
            note = f"{share:.1%} of the draws of {name} fell where the other density is zero"
            return Estimate(kind.name, math.inf, finite="infinite", method=f"Monte Carlo, {of}", n=len(x), notes=(note,))
        sides.append(terms)
        method.append(of)
    integral = sum(float(terms.mean()) for terms in sides) / 2
    stderr = 0.5 * math.sqrt(sum(float(terms.var()) / len(terms) for terms in sides))
    value = kind.value(integral)
    if isinstance(kind, Renyi):
        stderr = stderr / abs(integral * (kind.order - 1)) if integral > 0 else math.inf
    bounded = not isinstance(kind, (Renyi, ChiSquared))
    khat = None if bounded else max(pareto_smooth(terms.abs().clamp(min=1e-300).log())[1] for terms in sides)
    heavy = khat is not None and khat >= 0.5 and stderr > _MATTERS
    notes = (f"the terms have a heavy tail (k̂ = {khat:.2f}): the value and its error may be far too small",) if heavy else ()
    return Estimate(
        kind.name,
        value,
        stderr,
        finite="certified" if bounded else "not certified",
        method=f"Monte Carlo, {method[0]} and {method[1]}",
        n=sum(map(len, sides)),
        khat=khat,
        reliable=not heavy and math.isfinite(value),
        notes=notes,
    )


def _points(p: Target, n: int, seed: int, name: str) -> tuple[Float[Tensor, "n d"], str]:
    """Fresh draws where there is a sampler, else the samples; and what they are."""
    if p.sampler is None and p.samples is not None:
        return p.samples, f"{len(p.samples):,} samples of {name}"
    return p.draws(n, seed), f"{n:,} fresh draws of {name}"


def mean_log_ratio(
    quantity: str, log_ratio: Float[Tensor, " n"], up_to: Literal["log_z", "entropy_p"] | None, of: str
) -> Estimate:
    """Mean and standard error of a log ratio, with the tail shape that says whether its variance is finite."""
    log_ratio = log_ratio.detach().to(torch.float64)
    n = len(log_ratio)
    of = f"{n:,} fresh {of}" if of.startswith("draws") else of
    method = f"Monte Carlo, {of}" if of.endswith((" of p", " of q")) else of
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
