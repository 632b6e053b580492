"""Weights: how good a model is as a proposal for p, where log p can be evaluated, and the value of reverse KL."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, WhichklError, cannot
from whichkl.access import Access
from whichkl.diagnostics.columns import weights_are_correlated
from whichkl.diagnostics.result import MAX_LOSS_GAP, Diagnostics
from whichkl.divergences import Estimate, Finite
from whichkl.divergences.draws import monte_carlo
from whichkl.divergences.exact import quadrature
from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import loc_and_tril
from whichkl.importance import effective_sample_size, pareto_smooth
from whichkl.process.seeds import seeded
from whichkl.solvers import Optimum
from whichkl.targets import Target

_MAX_NUMBERS_PER_CALL = 1 << 23
_MAX_POINTS_PER_CALL = 1_024
"""Largest number of points per call of the target; a likelihood has a number per point and observation."""
_DRAWS_PER_OPTIMUM = 1_000
"""Number of draws that measure the overlap of two optima."""
_MIN_DISTANCE = 2.0
"""Least Bhattacharyya distance, in nats, of optima that hardly overlap (overlap below 14 %)."""


def by_weights(
    target: Target, family: Family, q: Target, x: Float[Tensor, "n d"], diagnostics: Diagnostics, *, separate: bool
) -> Diagnostics:
    """Add the ELBO, the ESS, k̂ and a lower bound of reverse KL, from fresh draws x of the model."""
    room = max(1, _MAX_NUMBERS_PER_CALL // x.shape[1])
    log_p, log_q = (
        torch.cat([law.log_prob(y).detach().to(torch.float64) for y in x.split(min(rows, room))])
        for law, rows in ((target, _MAX_POINTS_PER_CALL), (q, len(x)))
    )
    log_weight = log_p - log_q
    reverse = monte_carlo.mean_log_ratio("elbo", -log_weight, None, "draws of q")
    ess = effective_sample_size(log_weight)
    khat = pareto_smooth(log_weight)[1] if bool((log_weight > -math.inf).any()) else math.inf
    elbo = replace(reverse, value=-reverse.value, ess=ess, khat=khat)
    gap = math.inf if elbo.value == -math.inf else float(torch.logsumexp(log_weight, 0)) - math.log(len(x)) - elbo.value
    first, *others = diagnostics.optima  # the first always counts, also where its loss is infinite and has no difference
    best = first.loss
    apart = _apart([first, *(one for one in others if one.loss - best < MAX_LOSS_GAP)], family) if separate else [first]
    missed = math.log(sum(math.exp(best - one.loss) for one in apart))
    correlated = weights_are_correlated(target, family, x, log_weight)
    found = replace(diagnostics, elbo=elbo, ess=ess, khat=khat, correlated=correlated, log_weights=log_weight.cpu())
    return replace(found, least_kl=max(gap, missed), separate=len(apart))


def _apart(optima: list[Optimum], family: Family) -> list[Optimum]:
    """Return the best optima that hardly overlap.

    Diagonal and low-rank Gaussians are compared column by column, in memory linear in d.
    """
    if len(optima) == 1:
        return optima
    if not isinstance(family, Gaussian):  # the moments of a mixture don't say where its mass is
        return _apart_by_draws(optima)
    kept: list[tuple[Optimum, Tensor, Tensor]] = []
    for one in optima:
        loc, cov = one.model.mean, one.model.variance
        if family.covariance == "full":
            loc, tril = loc_and_tril(one.model)
            cov = tril @ tril.T
        if all(_bhattacharyya(loc, cov, other, theirs) > _MIN_DISTANCE for _, other, theirs in kept):
            kept.append((one, loc, cov))
    return [one for one, _, _ in kept]


def _apart_by_draws(optima: list[Optimum]) -> list[Optimum]:
    """The same for any laws: the overlap ∫√(q q′) = E_q √(q′/q), by draws of the optimum already kept."""
    kept: list[tuple[Optimum, Tensor, Tensor]] = []
    for one in optima:
        with torch.no_grad():
            overlaps = [float(((one.model.log_prob(x) - log_q) / 2).exp().mean()) for _, x, log_q in kept]
            if all(overlap < math.exp(-_MIN_DISTANCE) for overlap in overlaps):
                with seeded(0):  # the same draws whatever the seed of the fit is
                    x = one.model.sample((_DRAWS_PER_OPTIMUM,))
                kept.append((one, x, one.model.log_prob(x)))
    return [one for one, _, _ in kept]


def _bhattacharyya(a: Tensor, a_cov: Tensor, b: Tensor, b_cov: Tensor) -> float:
    middle = (a_cov + b_cov) / 2
    if a_cov.ndim == 1:
        squared = ((a - b).square() / middle).sum()
        return float(squared / 8 + (middle.log() - (a_cov.log() + b_cov.log()) / 2).sum() / 2)
    squared = (a - b) @ torch.linalg.solve(middle, a - b)
    volume = torch.logdet(middle) - (torch.logdet(a_cov) + torch.logdet(b_cov)) / 2
    return float(squared / 8 + volume / 2)


def reverse_value(target: Target, q: Target, diagnostics: Diagnostics) -> Estimate:
    """KL(q‖p): by enumeration of few states, by quadrature on the line, else −ELBO, up to log Z where p is unnormalised."""
    if Access.ENUMERABLE in target.access:  # Σ q (log q − log p) + log Z, with log Z = log Σ p
        x, log_p = target.atoms
        log_q = q.log_prob(x).detach().to(torch.float64)
        terms = torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_p), 0.0)
        value = float(terms.sum() + torch.logsumexp(log_p, 0))
        finite: Finite = "certified" if math.isfinite(value) else "infinite"
        return Estimate("reverse_kl", max(0.0, value), 0.0, finite=finite, method="enumeration", exact=True, n=len(x))
    if on_the_line(target):
        with contextlib.suppress(WhichklError):  # heavy tails: Monte Carlo below reports how far it can be trusted
            return quadrature.kl(q, target, "reverse_kl")
    elbo = diagnostics.elbo
    if elbo is None:
        because = "the log density couldn't be evaluated at draws of the model"
        raise TargetError(cannot("measure reverse KL", because, "Mend it, and fit again"))
    value = 0.0 - elbo.value
    finite = "infinite" if value == math.inf else "not certified"
    return replace(elbo, quantity="reverse_kl", value=value, finite=finite, up_to=None if target.normalized else "log_z")


def on_the_line(target: Target) -> bool:
    """Whether the expectation under p can be taken by quadrature: one variable, a log density and a sampler."""
    return target.dim == 1 and Access.LOG_PROB in target.access and target.sampler is not None
