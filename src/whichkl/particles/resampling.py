"""Resampling: how far an inverse temperature may rise in one step, and which particles continue."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def conditional_ess(log_weights: Float[Tensor, ...]) -> float:
    """Return the share of equally weighted particles that are effective under new weights, (mean w)² / mean w², in (0, 1].

    Source: Zhou, Johansen & Aston (2016).

    >>> conditional_ess(torch.zeros(4))
    1.0
    """
    logw = log_weights.detach().flatten().cpu().numpy()
    return _share(logw - logw.max()) if (logw > -math.inf).any() else 0.0


def _share(log_weights: np.ndarray) -> float:
    """The same for weights whose largest is 1; on a few hundred numbers NumPy takes a fifth of torch's time."""
    w = np.exp(log_weights)
    return float(w.sum() ** 2 / (w @ w) / len(w))


def next_step(log_ratio: Float[Tensor, ...], left: float, keep: float) -> float:
    """Return the largest rise of the inverse temperature, up to `left`, at which the conditional ESS stays above `keep`.

    Args:
        log_ratio: log p − log base of every particle, all finite or −∞.
        left: 1 − β.
        keep: the least conditional ESS, as a share of the particles whose ratio is above −∞.

    Source: bisection as in Jasra et al. (2011).
    """
    finite = log_ratio[log_ratio > -math.inf].detach().cpu().numpy()
    if len(finite) == 0:
        return left
    finite = finite - finite.max()
    if _share(left * finite) >= keep:
        return left
    low, high = 0.0, left
    for _ in range(200):
        middle = math.sqrt(low * high) if low > 0 else high / 16
        low, high = (middle, high) if _share(middle * finite) >= keep else (low, middle)
        if low > 0 and high / low < 1.01:
            break
    return low or high


def systematic(log_weights: Float[Tensor, "g n"], generator: torch.Generator) -> Int[Tensor, "g n"]:
    """Return which particles of each island continue: copies by one uniform number per island, spaced by 1/n.

    An island whose weights are all 0 stays unchanged; its weight is 0.

    Source: Kitagawa (1996).
    """
    islands, n = log_weights.shape
    dead = ~(log_weights > -math.inf).any(1, keepdim=True)
    cumulative = torch.softmax(torch.where(dead, 0.0, log_weights), 1).cumsum(1)
    uniform = torch.rand(islands, 1, generator=generator, dtype=torch.float64, device="cpu")
    at = (torch.arange(n, dtype=torch.float64, device="cpu") + uniform) / n
    chosen = torch.searchsorted(cumulative / cumulative[:, -1:], at).clamp(max=n - 1)
    return torch.where(dead, torch.arange(n, device="cpu"), chosen)
