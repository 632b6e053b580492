"""Monte Carlo: means of log ratios over draws, fresh or fixed, independent or of chains, each with its standard error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.chains import FEWEST, standard_error
from whichkl.divergences import regions
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.kinds import IntegralDivergence, WeightedKLs
from whichkl.importance import doubt_of_log_ratio, doubt_of_weights, pareto_smooth, stays_by_weight, tail_shape
from whichkl.targets import Target

UpTo = Literal["log_z", "entropy_p"] | None
Place = Callable[[Bool[Tensor, " n"]], str]
"""Describes where the marked rows lie."""
_MAX_STDERR_WITH_HEAVY_TAIL = 0.005
"""Nats: with a larger standard error, a heavy tail makes an estimate unreliable."""
HEAVY = 0.5
"""k̂ from which on the variance may be infinite."""
_MIN_DRAWS_FOR_KHAT = 30
"""Fewest draws for a useful k̂: with fewer normal draws, one fit in twenty has a k̂ above 1."""
_MIN_DRAWS_OF_OTHER_SIDE = 20_000
_LARGEST_RATIO_FACTOR = 2.0
"""A ratio counts up to this many times the largest ratio of the other half."""
_VARIANCE_OF_NONE_SEEN = (3 / 1.96) ** 2
"""No draw in m means "at most 3/m, with 95 %" (the rule of three): as a standard error, (3/1.96)/m."""


def forward_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(p‖q) = E_p[log p − log q] by fresh draws of p, or its samples; unbiased, up to log Z where p is unnormalised.

    Samples that q was fitted on flatter it: hold some out. Where both are normalised and q has a sampler, a control variate
    reduces the noise, if that pays (`control_variate`).
    """
    return _kl("forward_kl", p, q, None if p.normalized else "log_z", n, seed)


def reverse_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(q‖p) = E_q[log q − log p] by fresh draws of q, or its samples; unbiased, up to log Z where p is unnormalised.

    It is the forward KL of q from p, and has its control variate.
    """
    return _kl("reverse_kl", q, p, None if p.normalized else "log_z", n, seed)


def _kl(name: str, a: Target, b: Target, up_to: UpTo, n: int, seed: int) -> Estimate:
    """KL(a‖b) by draws of a."""
    x, of, chains = points(a, n, seed, "p" if name == "forward_kl" else "q")
    ratio = log_ratio_at(a, b, x)
    if a.sampler is None and a.weights is not None:
        return replace(cross_entropy(ratio, of, a.weights), quantity=name, up_to=up_to)
    return mean_log_ratio(name, ratio, up_to, of, _elsewhere(a, b, seed), chains, placed(x, b))


def cross_entropy(
    loss: Float[Tensor, " n"],
    method: str,
    weights: Float[Tensor, " n"] | None = None,
    chains: Int[Tensor, " n"] | None = None,
    groups: Int[Tensor, " n"] | None = None,
) -> Estimate:
    """E_p[−log q] = KL(p‖q) + H(p) from −log q at draws of p that q wasn't fitted on, with their weights or chains if any.

    With `groups`, numbers that equal draws share, the error is that of their sums (Liang & Zeger, 1986), and `n` counts groups.
    With weights, k̂ is the smaller one of two: that of weight times loss, about the mean, which is often too large if both grow
    together; and the sum of the weights' k̂ and the loss's, at rows of equal weight, since exponents of tails add. Weights of a
    heavy tail make the mean unreliable.
    """
    is_finite = bool(loss.isfinite().all())
    if weights is None or not is_finite:
        if groups is not None and is_finite:
            return _over_groups(loss.to(torch.float64), method, None, groups)
        return mean_log_ratio("forward_kl", loss, "entropy_p", method, chains=chains)
    w, loss = (weights / weights.sum()).to(torch.float64), loss.to(torch.float64)
    if groups is not None:
        found = _over_groups(loss, method, w, groups)
    else:
        mean = w @ loss
        share = w * (loss - mean)  # of each row in the error, so that its tail is the one that counts
        stays = stays_by_weight(w, torch.Generator().manual_seed(2**40)).to(loss.device)
        found = mean_log_ratio("forward_kl", mean + len(loss) * share, "entropy_p", method, parts=(loss[stays], w.log()))
        stderr = float(share.square().sum().sqrt())
        found = replace(found, value=float(mean), stderr=stderr, method=method, ess=float(1 / w.square().sum()))
    doubt = doubt_of_weights(w)
    return found if doubt is None else replace(found, reliable=False, notes=(*found.notes, doubt))


def _over_groups(
    loss: Float[Tensor, " n"], method: str, weights: Float[Tensor, " n"] | None, groups: Int[Tensor, " n"]
) -> Estimate:
    """The (weighted) mean, with the error of sums over groups, and the tail of the groups' means."""
    w = torch.ones_like(loss) if weights is None else weights.to(loss)
    w = w / w.sum()
    mean = w @ loss
    number = groups.unique(return_inverse=True)[1]
    count = int(number.max()) + 1
    share, part = (
        torch.zeros(count, dtype=loss.dtype, device=loss.device).index_add(0, number, one) for one in (w, w * (loss - mean))
    )
    found = mean_log_ratio("forward_kl", mean + part / share.clamp(min=1e-300), "entropy_p", method)
    stderr = float(part.square().sum().sqrt()) * math.sqrt(count / (count - 1)) if count > 1 else math.inf
    return replace(found, value=float(mean), stderr=stderr)


def weighted_kls(p: Target, q: Target, kind: WeightedKLs, n: int = 20_000, seed: int = 0) -> Estimate:
    """A KL(p‖q) + b KL(q‖p) = a E_p[log p − log q] − b E_q[log p − log q], unbiased, with (a, b) = `kind.kl_weights`.

    Where a = b, as in `jeffreys` and `jeffreys_sum`, log Z cancels: the value is absolute for an unnormalised p. It needs draws
    of both, and densities that are normalised where a ≠ b.
    """
    a, b = kind.kl_weights
    if p.weights is not None or q.weights is not None:
        because = "the samples are weighted"
        raise TargetError(cannot(f"compute `{kind.name}` by Monte Carlo", because, "Resample them by their weights first"))
    (x, of_p, chains_p), (y, of_q, chains_q) = points(p, n, seed, "p"), points(q, n, seed + 1, "q")
    from_p = mean_log_ratio(kind.name, log_ratio_at(p, q, x), None, of_p, chains=chains_p, place=placed(x, q))
    from_q = mean_log_ratio(kind.name, log_ratio_at(q, p, y), None, of_q, chains=chains_q, place=placed(y, p))
    value = a * from_p.value + b * from_q.value
    return Estimate(
        quantity=kind.name,
        value=value,
        stderr=math.hypot(a * from_p.stderr, b * from_q.stderr),
        finite="infinite" if value == math.inf else "not certified",
        method=f"Monte Carlo, {of_p} and {of_q}" + ("; normalisers cancel" if a == b else ""),
        n=len(x) + len(y),
        ess=None if from_p.ess is from_q.ess is None else (from_p.ess or len(x)) + (from_q.ess or len(y)),
        khat=max(from_p.khat or -math.inf, from_q.khat or -math.inf),
        reliable=from_p.reliable and from_q.reliable,
        notes=from_p.notes + from_q.notes,
    )


def by_both(p: Target, q: Target, kind: IntegralDivergence, n: int = 20_000, seed: int = 0) -> Estimate:
    """Any f-divergence g(∫ h(p, q)) as ½ E_p[h/m] + ½ E_q[h/m], m = (p + q)/2, from draws and normalised densities of both.

    Unbiased before g. No density divides what it doesn't cover, so that h/m is bounded for total variation, Hellinger,
    Jensen–Shannon and skew KLs; for the others the tail shape of the terms shows whether their error can be trusted.
    """
    if not (p.normalized and q.normalized) or p.weights is not None or q.weights is not None:
        because = "it requires normalised densities, and equally weighted draws, of both"
        raise TargetError(cannot(f"estimate `{kind.name}` by Monte Carlo", because, "Pass `normalized=True` if they are"))
    sides, errors, method = [], [], []
    for shift, (side, name) in enumerate(((p, "p"), (q, "q"))):
        x, of, chains = points(side, n, seed + shift, name)
        log_p, log_q = (one.log_prob(x).detach().to(torch.float64) for one in (p, q))
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        inside = kind.integrand(log_p, log_q)
        terms = torch.where(inside == 0, 0.0, inside * torch.exp(-middle))
        if bool((terms == math.inf).any()):
            note = missed(terms == math.inf, placed(x, q if name == "p" else p))
            return Estimate(kind.name, math.inf, finite="infinite", method=f"Monte Carlo, {of}", n=len(x), notes=(note,))
        sides.append(terms)
        errors.append(standard_error(terms, chains))
        method.append(of)
    integral = sum(float(terms.mean()) for terms in sides) / 2
    value = kind.of_integral(integral)
    stderr = kind.error_of_integral(0.5 * math.hypot(*(error for error, _ in errors)), integral)
    khat = None if kind.bounded else max(pareto_smooth(terms.abs().clamp(min=1e-300).log())[1] for terms in sides)
    heavy = khat is not None and khat >= 0.5 and stderr > _MAX_STDERR_WITH_HEAVY_TAIL
    notes = (f"the terms have a heavy tail (k̂ = {khat:.2f}): the value and its error may be far too small",) if heavy else ()
    effective = [ess for _, ess in errors]
    few = few_effective(*effective)
    return Estimate(
        kind.name,
        value,
        stderr,
        finite="certified" if kind.bounded else "not certified",
        method=f"Monte Carlo, {method[0]} and {method[1]}",
        n=sum(map(len, sides)),
        ess=None if effective == [None, None] else sum(e or len(side) for e, side in zip(effective, sides, strict=True)),
        khat=khat,
        reliable=not heavy and not few and math.isfinite(value),
        notes=(*notes, *few),
    )


def points(p: Target, n: int, seed: int, name: str) -> tuple[Float[Tensor, "n d"], str, Int[Tensor, " n"] | None]:
    """Return fresh draws where there is a sampler, else the samples; their description; and their chains, if any."""
    if p.sampler is None and p.samples is not None:
        chains = "" if p.chains is None else f" in {int(p.chains.max()) + 1} chains"
        return p.samples, f"{len(p.samples):,} samples of {name}{chains}", p.chains
    return p.draws(n, seed), f"{n:,} fresh draws of {name}", None


def log_ratio_at(a: Target, b: Target, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Log a/b at draws of a, +∞ where b is zero."""
    own = a.log_prob(x).detach().to(torch.float64)
    if bool((own == -math.inf).any()):
        because = f"{int((own == -math.inf).sum())} of its {len(x)} draws fell where its own log density is −∞"
        raise TargetError(cannot("use this target", because, "Check that draws and `log_prob` describe one distribution"))
    return own - b.log_prob(x).detach().to(torch.float64)


def placed(x: Float[Tensor, "n d"], other: Target) -> Place:
    """Return a function that describes where the rows of x lie at which the other density is zero."""

    def place(outside: Bool[Tensor, " n"]) -> str:
        ends = [[end for end in pair if math.isfinite(end)] for pair in other.bijection.bounds]
        return regions.ranges(x, outside.to(x.dtype), other.names, ends)

    return place


def missed(outside: Bool[Tensor, " n"], place: Place | None, what: str = "draws") -> str:
    """Describe how many draws make a divergence infinite, and where they lie."""
    count, where = int(outside.sum()), "" if place is None else f": {place(outside)}"
    share = f"{count:,} of {len(outside):,} {what} ({count / len(outside):.2g} of the mass)"
    return f"{share} fell where the other density is zero{where}"


def few_effective(*effective: float | None) -> tuple[str, ...]:
    """Report chains that are too short for an error bar."""
    least = min((ess for ess in effective if ess is not None), default=math.inf)
    if least >= FEWEST:
        return ()
    return (f"the chains are worth {least:.0f} independent draws, and error bars need {FEWEST}: run them longer",)


def _elsewhere(a: Target, b: Target, seed: int) -> Callable[[int], Tensor] | None:
    """Log a/b at fresh draws of b, for the control variate; None where a density isn't normalised, or b can't be drawn."""
    if not (a.normalized and b.normalized and b.sampler is not None):
        return None

    def log_ratio(m: int) -> Tensor:
        y = b.draws(m, seed + 7)
        return (a.log_prob(y) - b.log_prob(y)).detach().to(torch.float64)

    return log_ratio


def mean_log_ratio(
    quantity: str,
    log_ratio: Float[Tensor, " n"],
    up_to: UpTo,
    of: str,
    elsewhere: Callable[[int], Float[Tensor, " m"]] | None = None,
    chains: Int[Tensor, " n"] | None = None,
    place: Place | None = None,
    parts: tuple[Tensor, Tensor] | None = None,
) -> Estimate:
    """Return the mean and standard error of a log ratio, with the tail shape that shows whether its variance is finite.

    With the ratio at draws of the other side, `elsewhere`, a control variate is tried; with `chains` the error is that of the
    effective draws; `place` describes where the draws lie that make it infinite. With `parts`, numbers and log weights
    of which the terms are products, the sum of their k̂ counts if it is smaller.
    """
    log_ratio = log_ratio.detach().to(torch.float64)
    n = len(log_ratio)
    of = f"{n:,} fresh {of}" if of.startswith("draws") else of
    method = f"Monte Carlo, {of}" if of.endswith((" of p", " of q", " chains")) else of
    outside = log_ratio == math.inf
    if bool(outside.any()):
        return Estimate(quantity, math.inf, 0.0, up_to, "infinite", method, n=n, notes=(missed(outside, place),))
    spread = float(log_ratio.std()) if n > 1 else math.inf
    reduced = None
    if elsewhere is not None and spread > 1e-9:
        with contextlib.suppress(TargetError):  # a density that can't be evaluated at the other side's draws
            reduced = control_variate(log_ratio, elsewhere, chains)
    terms, further = (log_ratio, 0.0) if reduced is None else reduced
    stderr, ess = standard_error(terms, chains)
    stderr, few = math.hypot(stderr, further), few_effective(ess)
    method += "" if ess is None else f", worth {ess:,.0f} independent ones"
    method += "; log-ratio mean with control variate" if reduced is not None else ""
    khat: float | None = None
    if spread < 1e-9:
        khat = -math.inf
    elif n >= _MIN_DRAWS_FOR_KHAT:
        khat = _two_sided_khat(log_ratio)
        if khat >= HEAVY and parts is not None and len(parts[0]) >= _MIN_DRAWS_FOR_KHAT:
            khat = min(khat, _two_sided_khat(parts[0]) + max(0.0, pareto_smooth(parts[1])[1]))
    notes = few
    if (khat is None or khat >= HEAVY) and stderr > _MAX_STDERR_WITH_HEAVY_TAIL:
        if khat is None:
            tail = f"{n} draw{'s are' if n > 1 else ' is'} too few to tell how heavy the tail of the log ratio is"
        else:
            tail = doubt_of_log_ratio(khat)
        notes = (tail, *few)
    value = float(terms.mean())
    return Estimate(quantity, value, stderr, up_to, method=method, n=n, ess=ess, khat=khat, reliable=not notes, notes=notes)


def _two_sided_khat(values: Float[Tensor, " n"]) -> float:
    """Return k̂ of the heavier tail."""
    return max(tail_shape(values), tail_shape(-values))


def control_variate(
    log_ratio: Float[Tensor, " n"],
    elsewhere: Callable[[int], Float[Tensor, " m"]],
    chains: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, " n"], float] | None:
    """Terms with the mean of log a/b under a, and less variance; with an error (nats) that their spread doesn't show.

    ℓ + c (r·[r ≤ t] − B(r ≤ t)) with ℓ = log a/b and r = b/a. The bracket has mean zero under a whatever the supports and
    tails, since E_a[r·[r ≤ t]] = B(r ≤ t), the probability under b, which draws of b measure; its error is the second thing
    returned. In plain k3, t = ∞ and the probability is taken as 1, which is wrong where b has mass that a lacks. c, the
    regression of ℓ on r, and t, twice the largest r, come from the other half of the draws, so that the mean stays unbiased.

    `log_ratio` is ℓ at n draws of a, `elsewhere` gives ℓ at a number of fresh draws of b. With `chains`, halves are halves in
    time. None where r has a heavy tail (PSIS k̂ of at least ½, so that its variance may be infinite), or where the error would
    fall by less than a fifth.

    Source: the untruncated form with c = 1 is "k3", Schulman (2020); control variates, Owen (2013), ch. 8.9.

    >>> x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> y = 0.1 + torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    >>> terms, further = control_variate(0.005 - 0.1 * x, lambda m: 0.005 - 0.1 * y)  # KL(N(0,1)‖N(0.1,1)) = 0.005
    >>> round(float(terms.mean()), 3), float(terms.std()) < 0.02
    (0.005, True)
    """
    n = len(log_ratio)
    if n < 100 or not bool(log_ratio.isfinite().all()) or pareto_smooth(-log_ratio)[1] >= 0.5:
        return None
    ratio = torch.exp(-log_ratio)
    if not float(torch.corrcoef(torch.stack([log_ratio, ratio]))[0, 1]) ** 2 > 0.36:
        return None
    there = torch.exp(-elsewhere(max(2 * n, _MIN_DRAWS_OF_OTHER_SIDE)))
    terms, further = torch.empty_like(log_ratio), 0.0
    first = _half(n, chains).to(log_ratio.device)
    for half in (first, ~first):
        both = torch.cov(torch.stack([log_ratio[~half], ratio[~half]]))
        slope, limit = float(-both[0, 1] / both[1, 1]), _LARGEST_RATIO_FACTOR * float(ratio[~half].max())
        beyond = int((~(there <= limit)).sum())
        within = torch.where(ratio[half] <= limit, ratio[half], 0.0)
        terms[half] = log_ratio[half] + slope * (within - (1 - beyond / len(there)))
        further += abs(slope) * math.sqrt(beyond + _VARIANCE_OF_NONE_SEEN) / len(there) / 2
    error, plain = standard_error(terms, chains)[0], standard_error(log_ratio, chains)[0]
    return (terms, further) if math.hypot(error, further) < 0.8 * plain else None


def _half(n: int, chains: Int[Tensor, " n"] | None) -> Bool[Tensor, " n"]:
    """Every other draw; the first half of each chain."""
    if chains is None:
        return torch.arange(n, device="cpu") % 2 == 0
    first = torch.zeros(n, dtype=torch.bool, device="cpu")
    for one in range(int(chains.max()) + 1):
        rows = (chains == one).nonzero()[:, 0]
        first[rows[: len(rows) // 2]] = True
    return first
