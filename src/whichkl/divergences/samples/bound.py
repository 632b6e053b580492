"""Bound: a lower bound on KL from two samples alone, by a critic that is evaluated on rows it hasn't seen."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.arrays import tensor_of
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.samples.logistic import MIN_ROWS, cosines, cross_fit
from whichkl.divergences.samples.ratio import MAX_EXPONENT
from whichkl.divergences.samples.ratio_checks import mean_with_error
from whichkl.divergences.samples.sample_distances import standardised
from whichkl.importance import khat_limit, pareto_smooth

_MAX_ROWS = 3_000


def variational_bound(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, bound: Literal["dv", "nwj"] = "dv", seed: int = 0, fine: bool = False
) -> Estimate:
    """Lower bound on KL(p‖q), in nats: a critic T fitted on half of the rows, the bound read on the other half.

    ``"dv"`` is E_p T − log E_q eᵀ (Donsker & Varadhan, 1983), ``"nwj"`` 1 + E_p T − E_q eᵀ (Nguyen, Wainwright & Jordan, 2010),
    both tight at T = log p/q, which the classifier of `classifier_divergence` learns. Only sampling error lifts them above the
    KL. No m draws of q certify more than log m, the `cap` (m held out): a larger number is returned as the cap, and within 1
    nat of it, or where eᵀ has a heavy tail, the bound isn't `reliable`.

    Args:
        x: draws of p, (n, d) or (n,), at least 20.
        y: draws of q, (m, d) or (m,), at least 20.
        bound: ``"dv"`` or ``"nwj"``.
        seed: of the halves; the global generator isn't touched.
        fine: whether the critic has cosines of the rows as features, besides quadratics.

    Raises:
        InputError: the samples are bad (as for `classifier_divergence`), or the bound is another word.

    Source: McAllester & Stratos (2020) for the cap; standard error by the delta method.

    >>> x, y = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    >>> bound = variational_bound(x + 1, y)
    >>> abs(bound.value - 0.5) < 3 * bound.stderr, round(bound.cap, 2)
    (True, 6.91)
    """
    if bound not in ("dv", "nwj"):
        raise InputError(cannot(f"use `bound={bound!r}`", "there is no such bound", 'Use "dv" or "nwj"'))
    z, n, rows = standardised(x, y, MIN_ROWS)
    full = z.shape[1] * (z.shape[1] + 3) // 2 <= min(rows // 20, 500)
    generator = torch.Generator().manual_seed(seed)
    ratio, _ = cross_fit(z, n, 2, full, generator, rounds=1, more=cosines(z, generator) if fine else None)
    critic, of_y = (one[~one.isnan()] for one in (ratio[:n], ratio[n:]))
    (top, top_error), (mass, mass_error) = mean_with_error(critic), mean_with_error(torch.exp(of_y - of_y.max()))
    log_mass, error = math.log(mass) + float(of_y.max()), mass_error / mass
    scale = 1.0 if bound == "dv" else math.exp(min(log_mass, MAX_EXPONENT))
    raw, error = top - log_mass if bound == "dv" else 1 + top - scale, math.hypot(top_error, scale * error)
    cap, khat = math.log(len(of_y)), pareto_smooth(of_y)[1]
    notes = ["a lower bound on KL(p‖q), tight only where the critic is log p/q"]
    if raw > cap - 1:
        notes.append(f"within 1 nat of log {len(of_y)} = {cap:.2f}, the most that these draws can show; the KL may be larger")
    if khat >= khat_limit(len(of_y)):
        notes.append(f"eᵀ has a heavy tail (k̂ = {khat:.2f}): its mean over q may not have settled, nor the bound hold")
    method = f"{'Donsker–Varadhan' if bound == 'dv' else 'NWJ'} lower bound, critic fitted on the other half"
    rows, good = len(critic) + len(of_y), len(notes) == 1
    return Estimate("forward_kl", min(raw, cap), error, method=method, n=rows, khat=khat, cap=cap, reliable=good, notes=(*notes,))


def exceeded(x: Any, y: Any, upper: float, seed: int = 0) -> list[str]:
    """Report where a lower bound, on up to 3,000 rows of each, lies above the upper end of an interval for KL(p‖q)."""
    if min(len(x), len(y)) < 10 * MIN_ROWS:
        return []
    generator = torch.Generator().manual_seed(seed)
    few = [tensor_of(part)[torch.randperm(len(part), generator=generator, device="cpu")[:_MAX_ROWS]] for part in (x, y)]
    least = variational_bound(few[0], few[1], seed=seed, fine=True)
    reached = least.value - 2 * least.stderr
    if reached <= upper or (least.khat is not None and least.khat >= khat_limit(len(few[1]) // 2)):
        return []
    return [f"a classifier shows at least {reached:.3g} on rows it hasn't seen, more than the {upper:.3g} at most seen here"]
