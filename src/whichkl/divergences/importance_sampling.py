"""Importance sampling: forward KL from draws of q alone, reweighted to p, with its cap."""

from __future__ import annotations

import math

import torch

from whichkl._checks import TargetError, cannot
from whichkl.divergences.estimate import Estimate
from whichkl.importance import effective_sample_size, khat_limit, pareto_smooth
from whichkl.targets import Target


def forward_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(p‖q) = Σ w̄ᵢ ℓᵢ − log mean exp ℓᵢ with ℓ = log p̃ − log q at n draws of q and w̄ ∝ eˡ; the normaliser cancels.

    It never exceeds its `cap`, log n, however large the KL is: it needs about e^KL draws. It's `reliable` only where the
    Pareto shape of the weights allows and the value keeps 2 nats from the cap; modes that q never reaches stay unseen.

    Raises:
        TargetError: q has no sampler, p no log density, or every draw falls where p is zero.

    Source: Chatterjee & Diaconis (2018); standard error by the delta method.

    >>> from torch.distributions import Normal
    >>> p = Target(log_prob=lambda x: -((x[:, 0] - 1) ** 2) / 2, dim=1)
    >>> e = forward_kl(p, Target.of(Normal(0.0, 1.5)))
    >>> abs(e.value - 0.350 ) < 4 * e.stderr + 0.001
    True
    """
    x = q.draws(n, seed)
    ratio = (p.log_prob(x).to(torch.float64) - q.log_prob(x).to(torch.float64)).detach()
    if not bool((ratio > -math.inf).any()):
        because = f"all of {n:,} draws of q fell where p is zero"
        raise TargetError(cannot("reweight draws of q to p", because, "Use a q that covers p"))
    weight = torch.softmax(ratio, 0)
    seen = torch.where(weight > 0, ratio, 0.0)
    mean = float(weight @ seen)
    value = mean - (float(torch.logsumexp(ratio, 0)) - math.log(n))
    stderr = float((n * weight * (seen - mean) - (n * weight - 1)).std()) / math.sqrt(n)
    ess, khat, cap = effective_sample_size(ratio), pareto_smooth(ratio)[1], math.log(n)
    notes = ["biased low, and blind to what q doesn't reach"]
    if khat >= khat_limit(n):
        notes.append(f"the weights have a heavy tail (k̂ = {khat:.2f}): the value and its error may be far too small")
    if value > cap - 2:
        notes.append(f"the value is near {cap:.2f} = log n, the most that {n:,} draws can show")
    good, method = len(notes) == 1, f"self-normalised importance sampling, {n:,} fresh draws of q"
    return Estimate(
        "forward_kl", value, stderr, method=method, n=n, ess=ess, khat=khat, cap=cap, reliable=good, notes=tuple(notes)
    )
