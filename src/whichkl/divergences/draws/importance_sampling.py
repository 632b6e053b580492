"""Importance sampling: divergences from the draws of one side alone, reweighted to the other."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from whichkl._checks import TargetError, cannot
from whichkl.chains import standard_error
from whichkl.divergences.draws.monte_carlo import few_effective, log_ratio_at, mean_log_ratio, placed, points
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.kinds import WeightedKLs
from whichkl.importance import effective_sample_size, khat_limit, pareto_smooth
from whichkl.targets import Target


def self_normalised(p: Target, q: Target, kind: WeightedKLs, n: int = 20_000, seed: int = 0) -> Estimate:
    """A KL(p‖q) + b KL(q‖p) from n draws of q, reweighted to p by w̄ ∝ eˡ, ℓ = log p̃ − log q; absolute for an unnormalised p.

    KL(p‖q) = Σ w̄ᵢ ℓᵢ − log mean exp ℓᵢ never exceeds its `cap`, log n, however large the KL is: it needs about e^KL draws.
    KL(q‖p) = −mean ℓᵢ + log mean exp ℓᵢ is biased low too, since E[log Ẑ] ≤ log Z by Jensen's inequality. The answer is
    `reliable` only where the Pareto shape of the weights allows and a forward KL keeps 2 nats from the cap. Modes that q never
    reaches stay unseen.

    Source: Chatterjee & Diaconis (2018); standard error by the delta method.

    >>> from torch.distributions import Normal
    >>> from whichkl.divergences.kinds import ForwardKLDivergence
    >>> p = Target(log_prob=lambda x: -((x[:, 0] - 1) ** 2) / 2, dim=1)
    >>> e = self_normalised(p, Target.of(Normal(0.0, 1.5)), ForwardKLDivergence())  # the truth is 0.350
    >>> abs(e.value - 0.350) < 4 * e.stderr + 0.001
    True
    """
    x = q.draws(n, seed)
    ratio = -log_ratio_at(q, p, x)
    if not bool((ratio > -math.inf).any()):
        because = f"all of {n:,} draws of q fell where p is zero"
        raise TargetError(cannot("reweight draws of q to p", because, "Use a q that covers p"))
    method = f"self-normalised importance sampling, {n:,} fresh draws of q"
    a, b = kind.kl_weights
    if b:
        outside = mean_log_ratio(kind.name, -ratio, None, method, place=placed(x, p))
        if outside.value == math.inf:
            return replace(outside, method=method)
    weight, log_z = torch.softmax(ratio, 0), float(torch.logsumexp(ratio, 0)) - math.log(n)
    value, terms = 0.0, torch.zeros_like(ratio)  # the terms are what each draw contributes to the error
    if a:
        seen = torch.where(weight > 0, ratio, 0.0)
        mean = float(weight @ seen)
        value, terms = a * (mean - log_z), a * (n * weight * (seen - mean) - (n * weight - 1))
    if b:
        value, terms = value + b * (log_z - float(ratio.mean())), terms + b * (n * weight - ratio)
    khat = pareto_smooth(ratio)[1]
    doubts, cap = [], None if b else a * math.log(n)
    if khat >= khat_limit(n):
        doubts.append(f"the weights have a heavy tail (k̂ = {khat:.2f}): the value and its error may be far too small")
    if cap is not None and value > cap - 2 * a:
        doubts.append(f"the value is near {cap:.2f} = log n, the most that {n:,} draws can show")
    bias = "biased low," if a else "biased low, since log of a mean is,"
    return Estimate(
        kind.name,
        value,
        float(terms.std()) / math.sqrt(n),
        method=method,
        n=n,
        ess=effective_sample_size(ratio),
        khat=khat,
        cap=cap,
        reliable=not doubts,
        notes=(f"{bias} and blind to what q doesn't reach", *doubts),
    )


def from_other_side(a: Target, b: Target, n: int = 20_000, seed: int = 0, names: tuple[str, str] = ("q", "p")) -> Estimate:
    """KL(a‖b) from draws of b: E_b[w log w − w + 1], w = a/b, both normalised; unbiased where b has mass wherever a has.

    The terms are never negative, and vary less than w log w, since E_b[w] = 1. Their variance may be infinite: it's `reliable`
    only where k̂ of w is below ½, and where w's mean is 1 within 4 of its errors; where it isn't, a has mass that the draws
    of b don't show. What is too far for both checks stays unseen.

    `names` are what a and b are called in the answer.

    >>> from torch.distributions import Normal
    >>> x = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    >>> b = Target(samples=x, log_prob=lambda x: Normal(0.0, 1.0).log_prob(x[:, 0]), normalized=True)
    >>> e = from_other_side(Target.of(Normal(0.5, 1.0)), b)  # the truth is 0.125
    >>> abs(e.value - 0.125) < 4 * e.stderr < 0.05
    True
    """
    if not (a.normalized and b.normalized and b.access.can_sample) or b.weights is not None:
        because = f"it requires normalised densities of both, and draws of {names[1]} of equal weight"
        raise TargetError(cannot(f"reweight draws of {names[1]} to {names[0]}", because, "Pass `normalized=True` if they are"))
    x, of, chains = points(b, n, seed, names[1])
    log_w = -log_ratio_at(b, a, x)
    w = torch.exp(log_w)
    terms = torch.where(w > 0, w * log_w, 0.0) - w + 1
    (stderr, ess), (error, _) = standard_error(terms, chains), standard_error(w, chains)
    khat, off = pareto_smooth(log_w)[1] if bool((w > 0).any()) else math.inf, float(w.mean()) - 1
    doubts = [*few_effective(ess)]
    if khat >= 0.5:
        doubts.append(f"the weights have a heavy tail (k̂ = {khat:.2f}): the value and its error may be far too small")
    if abs(off) > 4 * error + 1e-6:
        seen = f"{names[0]}/{names[1]} averages to {1 + off:.4g} over these draws, not 1"
        doubts.append(f"{seen}: {names[0]} has mass that they don't show, and the KL may be infinite")
    value, notes = float(terms.mean()), (f"blind to what the draws of {names[1]} don't reach", *doubts)
    method = f"importance sampling, {of}"
    return Estimate("forward_kl", value, stderr, method=method, n=len(x), ess=ess, khat=khat, reliable=not doubts, notes=notes)
