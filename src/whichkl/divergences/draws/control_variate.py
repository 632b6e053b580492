"""Control variate: a log ratio's mean with less noise, by draws of the other side."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl.chains import standard_error
from whichkl.importance import pareto_smooth

_MIN_DRAWS_OF_OTHER_SIDE = 20_000
_LARGEST_RATIO_FACTOR = 2.0
"""A ratio counts up to this many times the largest ratio of the other half."""
_VARIANCE_OF_NONE_SEEN = (3 / 1.96) ** 2
"""No draw in m means "at most 3/m, with 95 %" (the rule of three): as a standard error, (3/1.96)/m."""


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
