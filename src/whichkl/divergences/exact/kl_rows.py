"""KL of many rows of probabilities at little more than the cost of reading them: one logarithm per atom, in the cache.

The lowest cost is one pass over both arrays. Here a block of rows is read once, then five cheap passes over it run in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.process.threads import use_one_thread

_NUMBERS_PER_BLOCK = 1 << 18
_BLOCKS_PER_JOB = 16
_MAX_SUM_ERROR = 0.99e-4
# Below `floor`, the ratio q/p loses digits; below `least` nats, rounding can reach 1e-6 of the divergence.
_LIMITS = {torch.float32: (1e-30, 0.03), torch.float64: (1e-290, 0.0)}


def kl_rows(
    p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], general: Callable[[Int[Tensor, " r"]], Float[Tensor, " r"]]
) -> Float[Tensor, " n"]:
    """KL(p/P‖q/Q) of each row in nats, P and Q the sums of the row; right to about 1e-6 of it, for float64 to 1e-12.

    With ρ = Q/P it is Σ p (r − 1 − log r) / P − (ρ − 1 − log ρ), r = q/p: no term is negative, so that sums lose nothing.
    Narrow floats are taken in float32, and in float64 again where the value is below 0.03, or q below 1e-30 under an atom of
    p: by Pinsker's inequality (1964) rounding, ε Σ (|q − p| + p |log r|), is at most 2e-7 √KL nats, so 1e-6 of what is kept.

    Args:
        p: probabilities on the CPU, atoms on the last axis.
        q: the same shape.
        general: the same divergence of the rows of these numbers by other means; raises where a row is no distribution.

    Raises:
        InputError: from `general`.

    >>> half = torch.full((1, 2), 0.5)
    >>> kl_rows(half, torch.tensor([[0.25, 0.75]]), lambda rows: rows.double())
    tensor([0.1438], dtype=torch.float64)
    """
    wide = torch.float64 in (p.dtype, q.dtype)
    values = _pass(p, q, None, torch.float64 if wide else torch.float32)
    if not wide and len(again := values.isnan().nonzero()[:, 0]):
        values[again] = _pass(p, q, again, torch.float64)
    if len(left := values.isnan().nonzero()[:, 0]):
        values[left] = torch.cat([general(few) for few in left.split(max(1, _NUMBERS_PER_BLOCK // p.shape[1]))])
    return values.clamp(min=0.0)


def _pass(
    p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], numbers: Int[Tensor, " r"] | None, dtype: torch.dtype
) -> Float[Tensor, " r"]:
    """The divergences of these rows (all of them if None), NaN where such floats are too narrow or a row is no distribution."""
    n, atoms = len(p) if numbers is None else len(numbers), p.shape[1]
    step, width = max(1, _NUMBERS_PER_BLOCK // atoms), min(atoms, _NUMBERS_PER_BLOCK)
    parts = torch.zeros(-(-atoms // width), 3, n, dtype=dtype, device="cpu")

    def sum_up(first: int) -> None:
        spare = torch.empty(2, step * width, dtype=dtype, device="cpu")
        for start in range(first, min(n, first + _BLOCKS_PER_JOB * step), step):
            rows = slice(start, start + step)
            of_p, of_q = (one[rows] if numbers is None else one[numbers[rows]] for one in (p, q))
            for part, left in zip(parts, range(0, atoms, width), strict=True):
                _sum(of_p[:, left : left + width].to(dtype), of_q[:, left : left + width].to(dtype), spare, part[:, rows])

    _in_threads(sum_up, range(0, n, _BLOCKS_PER_JOB * step))
    excess, total_p, total_q = parts.sum(0, dtype=torch.float64)
    off = (total_q - total_p) / total_p
    value = excess / total_p - (off - off.log1p())
    vouched = ((total_p - 1).abs() <= _MAX_SUM_ERROR) & ((total_q - 1).abs() <= _MAX_SUM_ERROR) & (value >= _LIMITS[dtype][1])
    return torch.where(vouched, value, torch.nan)


def _in_threads(work: Callable[[int], None], jobs: range) -> None:
    """Do the jobs in as many threads as torch uses, each alone: threads that share every small step wait more than they work."""
    threads = torch.get_num_threads()
    if threads == 1 or len(jobs) == 1:
        for job in jobs:
            work(job)
        return
    with ThreadPoolExecutor(threads, initializer=use_one_thread) as pool:
        list(pool.map(work, jobs))


def _sum(p: Float[Tensor, "b v"], q: Float[Tensor, "b v"], spare: Float[Tensor, "2 s"], sums: Float[Tensor, "3 b"]) -> None:
    """Write Σ p (r − 1 − log r), Σ p and Σ q; the first is NaN where a number is negative, or q too small under an atom of p."""
    floor, tiny = _LIMITS[p.dtype][0], torch.finfo(p.dtype).tiny
    torch.sum(p, -1, out=sums[1])
    torch.sum(q, -1, out=sums[2])
    low_p, low_q = float(p.amin()), float(q.amin())
    ratio, log = (one[: p.numel()].view(p.shape) for one in spare)
    extra: Tensor | float = math.nan if min(low_p, low_q) < 0 else 0.0
    if low_q < floor:
        small = torch.mul(q, 1 / floor, out=ratio).clamp_(max=1).sub_(1).mul_(p).amin(-1) < 0
        if bool(small.any()):
            missed = ((q == 0) & (p > 0)).any(-1)
            extra = extra + torch.where(missed, math.inf, torch.where(small, math.nan, torch.zeros_like(sums[0])))
        q = q.clamp(min=tiny)
    if low_p < tiny:
        p = p.clamp(min=tiny)  # an atom without mass in p counts q, as it should
    torch.log(torch.div(q, p, out=ratio), out=log)
    torch.sum(ratio.sub_(1).sub_(log).mul_(p), -1, out=sums[0])
    if isinstance(extra, Tensor) or extra != 0:
        sums[0] += extra
