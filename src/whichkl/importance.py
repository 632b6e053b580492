"""Importance weights: effective sample size, Pareto smoothing and the tail shape k̂. `fitting.correction` decides by them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_MIN_TAIL = 60
"""Smallest number of values from which the shape of a tail is estimated."""
_NUMBERS_AT_AN_END, _NEAR_AN_END = 5, 0.9
"""This many numbers within this share of the largest distance from the median show that a tail has an end."""
_MAX_KOLMOGOROV = 1.2
"""Largest Kolmogorov distance times √n of a good fit; a true distribution exceeds it in fewer than 1 % of cases."""
_MAX_SHAPE = 0.5
"""k̂ from which on the variance of weights is infinite."""
_MIN_EVEN_SHARE = 0.9
"""Share of effective rows from which on no tail of weights matters."""
_MAX_SHARE_OF_A_ROW = 0.05
"""Share of the mass that a single row may hold where few distinct weights leave k̂ unknown."""


def effective_sample_size(log_weights: Float[Tensor, " n"]) -> float:
    """Return the effective sample size of self-normalised weights, (Σw)² / Σw², between 1 and n.

    Args:
        log_weights: natural logs of the weights, up to one constant; −inf is a zero weight.

    Source: Kong (1992).

    >>> effective_sample_size(torch.zeros(10))
    10.0
    """
    if not bool((log_weights > -math.inf).any()):
        return 0.0
    return float(torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0)))


def pareto_smooth(log_weights: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], float]:
    """Pareto-smoothed importance sampling: smoothed log weights (their sum is 1) and the tail shape k̂.

    The largest min(n/5, 3√n) weights are replaced by quantiles of a generalised Pareto distribution that is fitted to them.
    Reweighted results can be trusted if k̂ ≤ min(1 − 1/log₁₀ n, 0.7). k̂ is ∞ with fewer than five distinct tail weights below
    the maximum, and −∞ if all weights, or all tail weights, are equal up to rounding, as they can be on few discrete states.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024).
    """
    logw = log_weights.detach().to(torch.float64)
    logw = logw - logw.max()
    n = len(logw)
    if float(logw.min()) > -1e-9:
        return logw - math.log(n), -math.inf
    tail = math.ceil(min(0.2 * n, 3 * math.sqrt(n)))
    order = torch.argsort(logw)
    if tail < 5 or n <= tail:
        return logw - torch.logsumexp(logw, 0), math.inf
    index = order[-tail:]
    cutoff = max(float(logw[order[-tail - 1]]), math.log(torch.finfo(torch.float64).tiny))
    if cutoff > -1e-9:
        return logw - torch.logsumexp(logw, 0), -math.inf
    exceed = logw[index] > cutoff
    index = index[exceed]
    if len(index) <= 4:
        return logw - torch.logsumexp(logw, 0), math.inf
    excess = torch.exp(logw[index]) - math.exp(cutoff)
    shape, scale = _fit_generalized_pareto(excess)
    if math.isfinite(shape):
        quantile = (torch.arange(len(index), dtype=torch.float64, device=logw.device) + 0.5) / len(index)
        if abs(shape) < 1e-12:
            smoothed = -scale * torch.log1p(-quantile)
        else:
            smoothed = scale * torch.expm1(-shape * torch.log1p(-quantile)) / shape
        logw = logw.clone()
        logw[index] = torch.clamp(torch.log(smoothed + math.exp(cutoff)), max=0.0)
    return logw - torch.logsumexp(logw, 0), shape


def tail_shape(values: Float[Tensor, " n"]) -> float:
    """Return Pareto's k̂ of the upper tail of numbers, above their median; if k̂ ≥ ½, their variance may be infinite.

    The tail is the largest min(n/5, 3√n) numbers, or half as many, and so on, until a generalised Pareto distribution fits them:
    numbers can accumulate at one value, such as a local maximum of a function, and the tail begins above it. Numbers that
    accumulate at the largest one, such as log probabilities of a rare category, have an end, and k̂ ≤ 0. They do so if the
    fifth largest is at most a tenth nearer to the median, of which the probability is (1 − 0.9²)⁴ = 0.001 for k = ½.

    Source: Pickands (1975); Kolmogorov's distance for where a tail begins, as in Clauset, Shalizi & Newman (2009).

    >>> even = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    >>> round(tail_shape(-even.log()), 1), round(tail_shape(even.pow(-0.8)), 1)
    (0.0, 0.8)
    """
    ordered = values.detach().to(torch.float64).sort().values
    above = (ordered - ordered[(len(ordered) - 1) // 2]).clamp(min=1e-300)
    tail = math.ceil(min(0.2 * len(above), 3 * math.sqrt(len(above))))
    shape = pareto_smooth(above.log())[1]
    while tail >= _MIN_TAIL and shape >= 0.5:
        excess = above[-tail:] - above[-tail - 1]
        if not float(excess[0]) > 0:
            break
        shape, scale = _fit_generalized_pareto(excess)
        below = -torch.expm1(-torch.log1p(shape * excess / scale) / shape)
        steps = torch.arange(tail + 1, dtype=torch.float64, device=below.device) / tail
        apart = float(torch.maximum(steps[1:] - below, below - steps[:-1]).max())
        if apart * math.sqrt(tail) <= _MAX_KOLMOGOROV:
            break
        tail //= 2
    has_end = len(above) >= _NUMBERS_AT_AN_END and float(above[-_NUMBERS_AT_AN_END]) >= _NEAR_AN_END * float(above[-1])
    return 0.0 if has_end and not shape < 0 else shape  # equal numbers may give NaN


MIN_SHARE_OF_DRAWS = 0.9
"""Share of the draws in the effective sample size from which on a large k̂ is that of a tail that hardly counts."""


def khat_limit(n: int) -> float:
    """Return the largest k̂ at which n weights can be trusted, min(1 − 1/log₁₀ n, 0.7) (Vehtari et al., 2024)."""
    return min(1 - 1 / math.log10(n), 0.7) if n > 10 else 0.0


def doubt_of_weights(weights: Float[Tensor, " n"]) -> str | None:
    """Say why a mean with given weights of rows can't be trusted; None if it can.

    The weights then have a heavy tail: k̂ is ½ or more, so that their variance may be infinite. No tail matters where the ESS is
    0.9 n or more. k̂ of few distinct weights is infinite, which counts where one row holds a twentieth of the mass or more.

    >>> doubt_of_weights(torch.ones(100)) is None
    True
    >>> doubt_of_weights(torch.tensor([1e6] + [1.0] * 299))
    'the weights of the rows have a heavy tail (k̂ = ∞, 1.0 effective rows of 300): value, error and fit may rest on few rows'
    """
    w = (weights / weights.sum()).to(torch.float64)
    ess = float(1 / w.square().sum())
    if ess >= _MIN_EVEN_SHARE * len(w):
        return None
    khat = pareto_smooth(w.log())[1]
    if khat < _MAX_SHAPE or (khat == math.inf and float(w.max()) < _MAX_SHARE_OF_A_ROW):
        return None
    shown = "∞" if khat == math.inf else f"{khat:.2f}"
    found = f"k̂ = {shown}, {ess:.1f} effective rows of {len(w):,}"
    return f"the weights of the rows have a heavy tail ({found}): value, error and fit may rest on few rows"


def _fit_generalized_pareto(excess: Float[Tensor, " m"]) -> tuple[float, float]:
    """Return shape and scale for sorted positive excesses: Zhang & Stephens (2009), with PSIS's weak prior k ~ 0.5."""
    m = len(excess)
    bins = 30 + int(math.sqrt(m))
    grid = 1 - torch.sqrt(bins / (torch.arange(1, bins + 1, dtype=torch.float64, device=excess.device) - 0.5))
    quartile = excess[int(m / 4 + 0.5) - 1]
    theta = grid / (3 * quartile) + 1 / excess[-1]
    shapes = torch.log1p(-theta[:, None] * excess).mean(1)
    profile = m * (torch.log(-theta / shapes) - shapes - 1)
    weight = torch.softmax(profile, 0)
    keep = weight >= 10 * torch.finfo(torch.float64).eps
    mean_theta = float((theta[keep] * weight[keep]).sum() / weight[keep].sum())
    shape = float(torch.log1p(-mean_theta * excess).mean())
    scale = -shape / mean_theta
    return (m * shape + 10 * 0.5) / (m + 10), scale
