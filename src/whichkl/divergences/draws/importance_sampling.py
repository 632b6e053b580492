"""Importance sampling: divergences from the draws of one side alone, reweighted to the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.chains import standard_error
from whichkl.divergences.draws.monte_carlo import Place, few_effective, log_ratio_at, mean_log_ratio, placed, points
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
    drawn = _reweighted(p, q, n, seed)
    mean = float(drawn.weight @ drawn.seen)
    value = mean - drawn.log_z
    stderr = float((n * drawn.weight * (drawn.seen - mean) - (n * drawn.weight - 1)).std()) / math.sqrt(n)
    cap = math.log(n)
    notes = ["biased low, and blind to what q doesn't reach", *drawn.doubts]
    if value > cap - 2:
        notes.append(f"the value is near {cap:.2f} = log n, the most that {n:,} draws can show")
    return drawn.estimate("forward_kl", value, stderr, notes, cap)


def reverse_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(q‖p) = −mean ℓᵢ + log mean exp ℓᵢ, absolute for an unnormalised p; biased low, since the logarithm of a mean is.

    By Jensen's inequality E[log Ẑ] ≤ log Z. Where the weights vary much, it's too small by about half their relative variance
    over n, and by far more where their tail is unseen: `reliable` as in `forward_kl`.

    Raises:
        TargetError: as in `forward_kl`.

    >>> from torch.distributions import Normal
    >>> p = Target(log_prob=lambda x: -((x[:, 0] - 1) ** 2) / 2, dim=1)
    >>> e = reverse_kl(p, Target.of(Normal(1.0, 1.25)))  # the truth is 0.0581
    >>> abs(e.value - 0.0581) < 4 * e.stderr
    True
    """
    drawn = _reweighted(p, q, n, seed)
    outside = mean_log_ratio("reverse_kl", -drawn.ratio, None, drawn.method, place=drawn.place)
    if outside.value == math.inf:
        return replace(outside, method=drawn.method)
    stderr = float((n * drawn.weight - drawn.ratio).std()) / math.sqrt(n)
    notes = ["biased low, since log of a mean is, and blind to what q doesn't reach", *drawn.doubts]
    return drawn.estimate("reverse_kl", drawn.log_z - float(drawn.ratio.mean()), stderr, notes)


def jeffreys(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(p‖q) + KL(q‖p) = Σ (w̄ᵢ − 1/n) ℓᵢ; log Z cancels, and the bias is that of Σ w̄ᵢ ℓᵢ, low.

    Raises:
        TargetError: as in `forward_kl`.
    """
    drawn = _reweighted(p, q, n, seed)
    outside = mean_log_ratio("jeffreys", -drawn.ratio, None, drawn.method, place=drawn.place)
    if outside.value == math.inf:
        return replace(outside, method=drawn.method)
    mean = float(drawn.weight @ drawn.ratio)
    stderr = float((n * drawn.weight * (drawn.ratio - mean) - drawn.ratio).std()) / math.sqrt(n)
    notes = ["biased low, and blind to what q doesn't reach", *drawn.doubts]
    return drawn.estimate("jeffreys", mean - float(drawn.ratio.mean()), stderr, notes)


def from_other_side(a: Target, b: Target, n: int = 20_000, seed: int = 0, names: tuple[str, str] = ("q", "p")) -> Estimate:
    """KL(a‖b) from draws of b: E_b[w log w − w + 1], w = a/b, both normalised; unbiased where b has mass wherever a has.

    The terms are never negative, and vary less than w log w, since E_b[w] = 1. Their variance may be infinite: it's `reliable`
    only where k̂ of w is below ½, and where w's mean is 1 within 4 of its errors; where it isn't, a has mass that the draws
    of b don't show. What is too far for both checks stays unseen.

    Args:
        a: the law that the KL is taken under; its log density is all that is used.
        b: the other, with draws.
        n: fresh draws, where b has a sampler.
        seed: of the draws.
        names: what a and b are called in the answer.

    Raises:
        TargetError: a density isn't normalised, or b has no draws of equal weight.

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


@dataclass(frozen=True)
class _Reweighted:
    """Log p̃/q at fresh draws of q, the normalised weights, log Ẑ, and what speaks against them."""

    ratio: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    log_z: float
    khat: float
    doubts: tuple[str, ...]
    method: str
    place: Place

    @property
    def seen(self) -> Float[Tensor, " n"]:
        """The ratio where the weight isn't zero, else 0."""
        return torch.where(self.weight > 0, self.ratio, 0.0)

    def estimate(self, name: str, value: float, stderr: float, notes: list[str], cap: float | None = None) -> Estimate:
        """Fill in what all answers share; more than one note is a doubt."""
        n, ess = len(self.ratio), effective_sample_size(self.ratio)
        good, words = len(notes) == 1, tuple(notes)
        return Estimate(
            name, value, stderr, method=self.method, n=n, ess=ess, khat=self.khat, cap=cap, reliable=good, notes=words
        )


def _reweighted(p: Target, q: Target, n: int, seed: int) -> _Reweighted:
    x = q.draws(n, seed)
    ratio = -log_ratio_at(q, p, x)
    if not bool((ratio > -math.inf).any()):
        because = f"all of {n:,} draws of q fell where p is zero"
        raise TargetError(cannot("reweight draws of q to p", because, "Use a q that covers p"))
    khat, doubts = pareto_smooth(ratio)[1], tuple[str, ...]()
    if khat >= khat_limit(n):
        doubts = (f"the weights have a heavy tail (k̂ = {khat:.2f}): the value and its error may be far too small",)
    method = f"self-normalised importance sampling, {n:,} fresh draws of q"
    log_z = float(torch.logsumexp(ratio, 0)) - math.log(n)
    return _Reweighted(ratio, torch.softmax(ratio, 0), log_z, khat, doubts, method, placed(x, p))
