"""On points: the value of forward KL where p's density gave the rows, from points of p and fresh draws of the model."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.diagnostics.result import Diagnostics
from whichkl.divergences import Estimate
from whichkl.families.family import log_likelihood
from whichkl.importance import MIN_SHARE_OF_DRAWS, khat_limit
from whichkl.particles.pool import Pool
from whichkl.solvers import Solution
from whichkl.targets import Target

_MAX_ERRORS_FROM_ZERO = 6
"""Largest |log Z| of a density that is given as normalised, in standard errors."""
_ROUNDING = 1e-3


def on_points(target: Target, solution: Solution, d: Diagnostics) -> tuple[Estimate, Diagnostics]:
    """Estimate KL(p‖q) = E_p[log p̃ − log q] − log Z from the solver's points of p and the draws of q that gave the weights.

    Points and draws are weighted together, as bridge sampling does (`particles.pool`), and the error has that of log Z in it.
    Points of particles were held out; samples were fitted, but their share of the weight is small.

    Raises:
        TargetError: the weights of the draws aren't known.
    """
    if Access.ENUMERABLE in target.access:
        return _enumerated(target, solution), d
    points, log_weights = solution.points, d.log_weights
    if points is None or log_weights is None or d.ess is None or d.khat is None:
        because = "the log density couldn't be evaluated at draws of the model"
        raise TargetError(cannot("measure forward KL", because, "Mend it, and fit again"))
    at_points = points.log_p - log_likelihood(solution.best.model, points.x).detach()
    pool, count = Pool.of(points, at_points, log_weights), len(log_weights)
    log_z = Estimate("log_z", pool.log_z, pool.log_z_stderr(), method="bridge sampling", n=len(pool.ratio))
    value, stderr = pool.forward_kl(normalized=target.normalized)
    notes: tuple[str, ...] = ()
    is_followed = d.khat <= khat_limit(count) or d.ess >= MIN_SHARE_OF_DRAWS * count
    if not is_followed:
        shown = "∞" if d.khat == math.inf else f"{d.khat:.2f}"
        notes = (f"k̂ of p/q is {shown}: draws of the model don't reach all of p, and the value rests on its points",)
    found = Estimate(
        "forward_kl",
        value,
        stderr,
        finite="infinite" if value == math.inf else "not certified",
        method=f"{len(points.x):,} points of p and {count:,} draws of the model, weighted together",
        n=len(pool.ratio),
        ess=d.ess,
        khat=d.khat,
        reliable=is_followed,
        notes=notes,
    )
    said = () if target.normalized else (f"log Z = {log_z.number} nats, whose error is part of that of the value",)
    return found, replace(d, log_z=log_z, notes=(*d.notes, *said))


def is_unnormalized(target: Target, value: Estimate, d: Diagnostics) -> bool:
    """Return whether a density that was given as normalised isn't, by a log Z that can be relied on."""
    log_z = d.log_z
    if not target.normalized or log_z is None or not value.reliable:
        return False
    return abs(log_z.value) > _MAX_ERRORS_FROM_ZERO * log_z.stderr + _ROUNDING


def _enumerated(target: Target, solution: Solution) -> Estimate:
    """Return Σ p (log p − log q) over all states."""
    x, log_p = target.atoms
    log_p = log_p - torch.logsumexp(log_p, 0)
    terms = log_p.exp() * (log_p - log_likelihood(solution.best.model, x).detach().to(log_p))
    value = float(torch.where(log_p > -math.inf, terms, 0.0).sum())
    return Estimate.settled("forward_kl", max(0.0, value), "enumeration")
