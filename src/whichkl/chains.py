"""Chains: the effective number of draws of Markov chains, and standard errors that account for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, as_int, cannot
from whichkl.arrays import tensor_of

_MIN_ROWS_PER_CHAIN = 4
_STRETCHES = 10
"""Number of stretches of a chain; neighbours on either side of an end correlate, so that fewer rows in each would be too few."""
MAX_SCALE_REDUCTION = 1.05
"""Largest R̂ of chains that agree; Vehtari et al. (2021) ask for 1.01, which slow chains of some hundred draws exceed."""
_MIN_CHAINS_TO_NAME_ONE = 3
_MAX_RATIO_BY_CHANCE = 3.5
"""Variance of eight means, as a multiple of its average, that one in a thousand exceeds: χ² with 7 degrees of freedom."""
FEWEST = 100
"""Effective draws below which an error bar isn't trusted (Vehtari et al., 2021, ask for 400 over four chains)."""


def chain_ids(chains: Any, n: int, device: torch.device | str = "cpu") -> Int[Tensor, " n"]:
    """Return the chain of each row as a number, 0, 1, …, from a count of equally long stacked chains, or from one id per row.

    Raises:
        InputError: the count doesn't divide the rows, the ids aren't n whole numbers, or a chain has fewer than four rows.

    >>> chain_ids(2, 8)
    tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    chains = as_int(chains)
    if isinstance(chains, int) and not isinstance(chains, bool):
        if chains < 1 or n % chains:
            because = f"{n} rows aren't {chains} equally long chains" if chains > 0 else "there must be at least one"
            raise InputError(cannot(f"use `chains={chains}`", because, "Give a count that divides them, or one id per row"))
        ids = torch.arange(chains, device=device).repeat_interleave(n // chains)
    else:
        instead = "Give their count, or one whole number per row"
        try:
            given = tensor_of(chains).to(device)
        except (TypeError, ValueError) as error:
            because = f"they are a `{type(chains).__name__}`, not numbers"
            raise InputError(cannot("use these `chains`", because, instead)) from error
        whole = tuple(given.shape) == (n,) and not given.is_complex() and bool((given == given.to(torch.int64)).all())
        if not whole or given.dtype == torch.bool:
            raise InputError(cannot("use these `chains`", f"they aren't {n} whole numbers, one per row", instead))
        ids = torch.unique(given.to(torch.int64), return_inverse=True)[1]
    shortest = int(torch.bincount(ids).min())
    if shortest < _MIN_ROWS_PER_CHAIN:
        because = f"the shortest chain has {shortest} rows, and correlation can't be seen in fewer than {_MIN_ROWS_PER_CHAIN}"
        raise InputError(cannot("use these `chains`", because, "Give longer chains"))
    return ids


def effective_draws(values: Float[Tensor, " n"], chains: Int[Tensor, " n"]) -> float:
    """Return the number of independent draws whose mean is as certain as the mean of these values: n / τ, τ = 1 + 2 Σ ρ_t.

    Chains are split in half, so that drift shows as disagreement. ρ_t is 1 − (W − mean autocovariance)/V, where W is the
    variance within the halves and V the variance of all values; Geyer's initial monotone sequence ends the sum. Chains are
    weighted by their number of rows. The result exceeds n for values that alternate, and is n for constant values.

    Args:
        values: one number per row.
        chains: from `chain_ids`; the rows of each chain are in the order of time.

    Source: Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), eq. 10–13; Geyer (1992).

    >>> noise = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> 3000 < effective_draws(noise, chain_ids(4, 4000)) < 5000
    True
    """
    values = values.detach().to("cpu", torch.float64)
    halves = []
    for one in range(int(chains.max()) + 1):
        own = values[(chains == one).cpu()]
        middle = len(own) // 2
        halves += [own[:middle], own[len(own) - middle :]]
    total = sum(map(len, halves))
    if float(values.max() - values.min()) < 1e-9 * max(1.0, float(values.abs().max())):  # constant, up to rounding
        return float(len(values))
    sizes = torch.tensor([len(half) for half in halves], dtype=torch.float64, device="cpu")
    pooled = torch.zeros(int(sizes.max()), dtype=torch.float64, device="cpu")
    for half in halves:
        pooled[: len(half)] += len(half) / total * _autocovariance(half)
    mean_size = total / len(halves)
    within = float(pooled[0]) * mean_size / (mean_size - 1)
    means = torch.stack([half.mean() for half in halves])
    middle_of_all = (sizes * means).sum() / total
    between = float((sizes * (means - middle_of_all).square()).sum() / (mean_size * (len(halves) - 1)))
    whole = float(pooled[0]) + between
    rho = 1 - (within - pooled) / whole
    rho[0] = 1.0
    tau = _geyer(rho.numpy())
    return total / max(tau, 1 / math.log10(total))  # at most n log₁₀ n, as in Stan


def scale_reduction(values: Float[Tensor, " n"], chains: Int[Tensor, " n"]) -> float:
    """Return R̂ = √(V/W): V is the variance of all values, W the variance within the halves of chains; 1 for chains that agree.

    Source: Gelman & Rubin (1992), with split chains; Vehtari et al. (2021), eq. 1–4.

    >>> noise = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> chains = chain_ids(4, 4000)
    >>> round(scale_reduction(noise, chains), 1), round(scale_reduction(noise + 3 * (chains == 2), chains), 1)
    (1.0, 1.7)
    """
    own = [values[chains == one].double() for one in chains.unique().tolist()]
    halves = [half for one in own for half in (one[: len(one) // 2], one[len(one) - len(one) // 2 :])]
    sizes = torch.tensor([len(half) for half in halves], dtype=torch.float64, device="cpu")
    means, within = (torch.stack([f(half) for half in halves]).cpu() for f in (torch.mean, lambda half: half.var()))
    inner = float((sizes * within).sum() / sizes.sum())
    size = float(sizes.mean())
    return math.sqrt(max(0.0, 1 - 1 / size + float(means.var()) / inner)) if inner > 0 else 1.0


def disagreement(x: Float[Tensor, "n d"], chains: Int[Tensor, " n"], names: Sequence[str]) -> str:
    """Return in words which chain disagrees with the others, by the column with the largest R̂; empty if none does.

    None does below 1.05, nor below what slow chains of one law have: R̂² is 1 + 1/m on average, with m effective draws per half.
    """
    found = [scale_reduction(column, chains) for column in x.T]
    worst = max(range(len(found)), key=lambda i: found[i])
    count = int(chains.max()) + 1
    if not found[worst] > MAX_SCALE_REDUCTION:
        return ""
    own = [x[chains == one, worst] for one in range(count)]
    draws = sum(effective_draws(values, torch.zeros_like(values, dtype=torch.int64)) for values in own) / (2 * count)
    if found[worst] ** 2 < 1 + _MAX_RATIO_BY_CHANCE / draws:
        return ""
    said = f"the chains disagree: R̂ of `{names[worst]}` is {found[worst]:.2f}"
    if count < _MIN_CHAINS_TO_NAME_ONE:
        return f"{said}, above {MAX_SCALE_REDUCTION}"
    without = [scale_reduction(x[chains != one, worst], chains[chains != one]) for one in range(count)]
    one = min(range(count), key=lambda i: without[i])
    if without[one] > 1 + (found[worst] - 1) / 2:
        return f"{said}, and no single chain is the cause"
    return f"{said}, and {without[one]:.2f} without chain {one} (counted from 0)"


def standard_error(terms: Float[Tensor, " n"], chains: Int[Tensor, " n"] | None) -> tuple[float, float | None]:
    """Return the standard error of the mean of terms, and their effective number, at most n; None for independent terms.

    >>> standard_error(torch.tensor([0.0, 1.0, 2.0]), None)
    (0.577..., None)
    """
    n = len(terms)
    if n == 1:
        return math.inf, None if chains is None else 1.0
    effective = None if chains is None else min(float(n), effective_draws(terms, chains))
    return float(terms.std()) / math.sqrt(effective or n), effective


def stretches(chains: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return for each row 10 × its chain + the tenth of that chain, in time, in which it lies; rows of a stretch stay together.

    Neighbours in time correlate: a model that is fitted on some of them knows the others.

    >>> stretches(chain_ids(2, 8))
    tensor([ 0,  2,  5,  7, 10, 12, 15, 17])
    """
    number = chains * _STRETCHES
    for one in range(int(chains.max()) + 1):
        rows = (chains == one).nonzero()[:, 0]
        number[rows] += torch.arange(len(rows), device=rows.device) * _STRETCHES // len(rows)
    return number


def folds_in_time(stretch: Int[Tensor, " n"], count: int) -> list[Int[Tensor, " m"]]:
    """Return the numbers of the rows of up to `count` folds, at most ten: the same stretch of time of every chain.

    Args:
        stretch: from `stretches`.
        count: of folds; those without rows are left out.
    """
    fold = stretch % _STRETCHES * count // _STRETCHES
    return [rows for i in range(count) if len(rows := (fold == i).nonzero()[:, 0])]


def chains_of(stretch: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the chain of each row, from its stretch."""
    return stretch // _STRETCHES


def thinning(x: Float[Tensor, "n d"], chains: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], int]:
    """Return the numbers of nearly independent rows, every τ-th of each chain, and τ, the largest n/ESS of all columns.

    Consecutive kept rows still correlate by about e⁻² = 0.14.
    """
    fewest = min(effective_draws(column, chains) for column in x.T)
    step = max(1, math.ceil(len(x) / fewest - 1e-9))
    parts: list[Tensor] = [(chains == one).nonzero()[::step, 0] for one in range(int(chains.max()) + 1)]
    return torch.cat(parts), step


def _autocovariance(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Σ_i (x_i − x̄)(x_{i+t} − x̄)/n for every lag t, by FFT."""
    n = len(x)
    spectrum = torch.fft.rfft(x - x.mean(), 2 * n)
    whole: Tensor = torch.fft.irfft(spectrum.abs().square(), 2 * n)
    return whole[:n] / n


def _geyer(rho: Float[np.ndarray, " n"]) -> float:
    """Return τ from autocorrelations by Geyer's initial monotone sequence. Source: Geyer (1992)."""
    pairs = rho[: len(rho) // 2 * 2].reshape(-1, 2).sum(1)[: max(1, (len(rho) - 1) // 2)]
    if len(pairs) == 1:
        return float(2 * pairs[0] - 1)
    stop = next((k for k in range(1, len(pairs)) if pairs[k] <= 0), len(pairs) - 1)
    return float(2 * np.minimum.accumulate(pairs[:stop]).sum() - 1 + max(rho[2 * stop], 0.0))
