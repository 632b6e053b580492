"""Importance weights: effective sample size, Pareto smoothing and its k-hat. Shared by all that reweights."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def effective_sample_size(log_weights: Float[Tensor, " n"]) -> float:
    """Effective sample size of self-normalised weights, (Σw)² / Σw², between 1 and n.

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

    The largest min(n/5, 3√n) weights are replaced by quantiles of the generalised Pareto distribution fitted to
    them. k̂ < min(1 − 1/log₁₀ n, 0.7) says that the reweighted answers can be trusted.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry (2024). Returns k̂ = ∞ with fewer than five distinct tail weights
    below the maximum, unless all weights, or all those of the tail, as on a few discrete states, are equal to rounding
    (then −∞: nothing to smooth).
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


def khat_limit(n: int) -> float:
    """The largest k̂ at which n weights can be trusted, min(1 − 1/log₁₀ n, 0.7) (Vehtari et al., 2024)."""
    return min(1 - 1 / math.log10(n), 0.7) if n > 10 else 0.0


def _fit_generalized_pareto(excess: Float[Tensor, " m"]) -> tuple[float, float]:
    """Zhang & Stephens (2009) posterior-mean fit to sorted positive excesses, with PSIS's weak prior k ~ 0.5."""
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
