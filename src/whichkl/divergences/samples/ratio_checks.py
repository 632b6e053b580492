"""Checks of a learned log ratio ℓ = log p/q: what the rows show beyond it, by waves, by neighbours and by finer features."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from whichkl.divergences.samples.neighbors import Neighbors

LARGE_SHARE = 0.1
"""Share of the divergence from which a bias or a gain matters."""
_WAVES = 100
_NEIGHBORS = (5, 20, 60)
_MAX_ROWS_OF_NEIGHBORS = 10_000


def gap_of_waves(z: Tensor, n: int, ratio: Tensor, size: float, generator: torch.Generator) -> float | None:
    """Standardised gap of the wave g that best distinguishes x from y beyond ℓ, or None where no gap is large.

    E_p[g σ(−ℓ)] = E_q[g σ(ℓ)] where ℓ is right. `size` is the Jensen–Shannon divergence by ℓ.
    """
    aim, axes = (
        torch.randn(z.shape[1], _WAVES, generator=generator, dtype=z.dtype, device="cpu"),
        torch.arange(_WAVES // 2, device="cpu"),
    )
    aim[:, axes] = torch.eye(z.shape[1], dtype=z.dtype, device="cpu")[:, axes % z.shape[1]]
    phase, length = torch.rand(2, _WAVES, generator=generator, dtype=z.dtype, device="cpu")
    wave = torch.cos(z @ (aim / aim.norm(dim=0) * (0.5 + 2.5 * length)).to(z.device) + 2 * math.pi * phase.to(z.device))
    s = torch.sigmoid(ratio)[:, None]
    over_p, over_q, spread = wave[:n] * (1 - s[:n]), wave[n:] * s[n:], (s * (1 - s)).clamp(min=1e-300) * wave.square()
    gap = (over_p.mean(0) - over_q.mean(0)).abs()
    score = gap / (over_p.var(0) / n + over_q.var(0) / len(over_q)).sqrt()
    gain = gap.square() / (4 * (spread[:n].mean(0) + spread[n:].mean(0)))
    seen = (score > 4.5) & (gain > LARGE_SHARE * size)
    return float(score[seen].max()) if bool(seen.any()) else None


def correlation_of_neighbors(z: Tensor, n: int, ratio: Tensor, size: float, generator: torch.Generator) -> float | None:
    """Standardised Σ rᵢ rⱼ over neighbours, r = label − σ(ℓ), or None; where ℓ is right, r are independent with mean 0.

    Source: Moran (1950), with the variance that the probabilities give.
    """
    share = torch.logit(torch.tensor(n / len(z), dtype=z.dtype, device="cpu"))
    some = torch.randperm(len(z), generator=generator, device="cpu")[:_MAX_ROWS_OF_NEIGHBORS]
    rows, s = z[some].cpu().numpy(), torch.sigmoid(ratio[some] + share).cpu()
    index = Neighbors(rows)
    r, spread = (some < n).to(z.dtype) - s, (s * (1 - s)).clamp(min=1e-300)
    seen: list[float] = []
    for k in (min(most, len(rows) // 10) for most in _NEIGHBORS):
        near = torch.from_numpy(index.nearest(rows, k + 1))
        link = (near != torch.arange(len(rows), device="cpu")[:, None]).to(z.dtype)
        around = (link * r[near]).sum(1) / k
        total = float((r * around).sum())
        # a pair counts twice where each is the other's neighbour, which is so for most: 2 bounds the variance
        deviation = math.sqrt(2 * float((spread * (link * spread[near]).sum(1)).sum())) / k
        # noise in what's around makes the gain come out several times too small
        gain = total**2 / (2 * len(rows) * float((spread * around.square()).sum()))
        if total > 3.2 * deviation and gain > LARGE_SHARE / 8 * size:
            seen.append(total / deviation)
    return max(seen, default=None)


def gain_of_finer_features(z: Tensor, n: int, ratio: Tensor, other: Tensor, size: float) -> float | None:
    """Standardised gain in held-out log loss of another ℓ, or None where it is unclear or small."""
    label = (torch.arange(len(z), device=z.device) < n).to(z.dtype)
    share = math.log(n / (len(z) - n))
    gain = torch.stack([binary_cross_entropy_with_logits(one + share, label, reduction="none") for one in (ratio, other)])
    value, error = mean_with_error(gain[0] - gain[1])
    return value / error if value > 2.5 * error and value > LARGE_SHARE / 2 * size else None


def mean_with_error(terms: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(terms))
