"""Lower bounds on KL from two samples alone: by a critic on rows that it hasn't seen, and by few columns of all."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.samples.logistic import MAX_EXPONENT, MIN_ROWS, cosines, cross_fit, mean_with_error
from whichkl.divergences.samples.neighbors import Rows, finite, terms_of
from whichkl.divergences.samples.sample_distances import standardised
from whichkl.importance import khat_limit, pareto_smooth

_NEIGHBORS = 5
_ROWS_OF_SEARCH = 1_000
_MAX_ROWS_OF_COLUMNS = 20_000
_MAX_PAIRS = 66
_ERROR_FACTOR = 1.3
"""Terms of neighbours share rows: their mean is this much less certain than that of independent ones."""


def variational_bound(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, bound: Literal["dv", "nwj"] = "dv", seed: int = 0, fine: bool = False
) -> Estimate:
    """Lower bound on KL(p‖q), in nats: a critic T fitted on half of the rows, the bound read on the other half.

    ``"dv"`` is E_p T − log E_q eᵀ (Donsker & Varadhan, 1983), ``"nwj"`` 1 + E_p T − E_q eᵀ (Nguyen, Wainwright & Jordan, 2010),
    both tight at T = log p/q, which the classifier of `classifier_divergence` learns. Only sampling error lifts them above the
    KL. No m draws of q certify more than log m, the `cap` (m held out): a larger number is returned as the cap, and within 1
    nat of it, or where eᵀ has a heavy tail, the bound isn't `reliable`.

    A `fine` critic has cosines of the rows as features, besides quadratics. The global generator isn't touched.

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
    # One round of two folds: half of the rows fit the critic, and ℓ stays NaN there, so that the bound reads only the other half.
    ratio, _ = cross_fit(z, n, 2, full, generator, rounds=1, more=cosines(z, generator) if fine else None)
    critic, of_y = (one[~one.isnan()] for one in (ratio[:n], ratio[n:]))
    # The largest exponent is taken out first: eᵀ alone could overflow.
    (top, top_error), (mass, mass_error) = mean_with_error(critic), mean_with_error(torch.exp(of_y - of_y.max()))
    log_mass, error = math.log(mass) + float(of_y.max()), mass_error / mass
    scale = 1.0 if bound == "dv" else math.exp(min(log_mass, MAX_EXPONENT))
    raw, error = top - log_mass if bound == "dv" else 1 + top - scale, math.hypot(top_error, scale * error)
    cap, khat = math.log(len(of_y)), pareto_smooth(of_y)[1]
    notes = ["a lower bound on the KL of `x` from `y`, tight only where the critic is the log of their densities' ratio"]
    if raw > cap - 1:
        notes.append(f"within 1 nat of log {len(of_y)} = {cap:.2f}, the most that these draws can show; the KL may be larger")
    if khat >= khat_limit(len(of_y)):
        notes.append(f"eᵀ has a heavy tail (k̂ = {khat:.2f}): its mean over `y` may not have settled, nor the bound hold")
    method = f"{'Donsker–Varadhan' if bound == 'dv' else 'NWJ'} lower bound, critic fitted on the other half"
    rows, good = len(critic) + len(of_y), len(notes) == 1
    return Estimate("forward_kl", min(raw, cap), error, method=method, n=rows, khat=khat, cap=cap, reliable=good, notes=(*notes,))


def hidden(x: Rows, y: Rows, upper: float, seed: int = 0) -> list[str]:
    """Report a column, or a pair of columns, with a larger KL than the upper end of an interval for all.

    By the data-processing inequality no margin has more. The margin with the largest bound on 1,000 rows is checked on up to
    20,000 rows.

    Source: Cover & Thomas (2006), section 2.8.

    >>> rng = np.random.default_rng(0)
    >>> y = rng.normal(size=(2000, 3))
    >>> x = np.column_stack([np.sign(y[:1000, 0]) + 0.1 * y[1000:, 0], y[:1000, 1:]])
    >>> hidden(x, y, 0.5)[0].startswith("column 1 alone")
    True
    """
    dim, generator = x.shape[1], np.random.default_rng(seed)
    if dim == 1 or min(len(x), len(y)) < 50:
        return []
    pairs = [*itertools.combinations(range(dim), 2)] if dim > 2 and dim * (dim - 1) // 2 <= _MAX_PAIRS else []

    def some_rows(most: int) -> list[Rows]:
        return [part[generator.choice(len(part), min(len(part), most), False)] for part in (x, y)]

    a, b = some_rows(_ROWS_OF_SEARCH)
    singles: list[tuple[int, ...]] = [(j,) for j in range(dim)]
    # Few rows choose, many judge: the winner of many comparisons is biased upwards on the rows that chose it.
    best = max([*singles, *pairs], key=lambda some: _lower(a, b, some))
    if _lower(a, b, best, 0.0) < upper:
        return []
    a, b = some_rows(_MAX_ROWS_OF_COLUMNS)
    least = _lower(a, b, best, 3.0)
    if least <= upper:
        return []
    columns = f"column {best[0] + 1} alone has" if len(best) == 1 else f"columns {best[0] + 1} and {best[1] + 1} alone have"
    return [f"{columns} at least {least:.3g}, more than the {upper:.3g} at most that all columns together show"]


def _lower(x: Rows, y: Rows, columns: tuple[int, ...], errors: float = 2.0) -> float:
    """KL of these columns minus `errors` standard errors; −∞ where their values repeat."""
    scale = y[:, columns].std(0)
    if not (scale > 0).all():
        return -math.inf
    a, b = x[:, columns] / scale, y[:, columns] / scale
    # Distances of 0 between repeated values would give a KL of any size.
    if any(len(np.unique(part[:, 0])) < 0.99 * len(part) for part in (a, b)):
        return -math.inf
    terms = terms_of(a, b, min(_NEIGHBORS, len(a) - 1, len(b)), "bias_reduced")
    return float(terms.mean()) + finite(a, b) - errors * _ERROR_FACTOR * float(terms.std()) / math.sqrt(len(terms))
