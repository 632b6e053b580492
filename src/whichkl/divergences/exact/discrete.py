"""Discrete distributions: sums over atoms, row by row, in blocks, with exact 0 · log 0 and explained infinities."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Binomial, NegativeBinomial, Poisson

from whichkl._checks import InputError, cannot
from whichkl.divergences import regions
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.exact.atoms import MAX_ATOMS, is_settled, named
from whichkl.divergences.kinds import ForwardKLDivergence, IntegralDivergence, RenyiDivergence, ReverseKLDivergence
from whichkl.process.threads import use_one_thread

Form = Literal["probabilities", "logits"]

_NUMBERS_PER_BLOCK = 1 << 17
"""Numbers of a block of rows that stays in the cache, in float64."""
_NUMBERS_PER_KL_BLOCK = 1 << 18
_BLOCKS_PER_JOB = 16
_MAX_SUM_ERROR = 0.99e-4
# Below `floor`, the ratio q/p loses digits; below `least` nats, rounding can reach 1e-6 of the divergence.
_LIMITS = {torch.float32: (1e-30, 0.03), torch.float64: (1e-290, 0.0)}


def rows(
    p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], kind: IntegralDivergence, form: Form = "probabilities"
) -> Float[Tensor, " n"]:
    """A divergence of each row of p from the same row of q, in nats: g(Σ h(log pᵢ, log qᵢ)) over the atoms.

    Rows are taken in blocks that stay in the cache: no temporary of full size. All is float64, but for the two KLs of narrower
    probabilities, which `kl_rows` finds to 1e-6 of their value. A row of probabilities is divided by its sum.

    Args:
        p: probabilities or logits, atoms on the last axis.
        q: the same shape.
        kind: which divergence.
        form: "probabilities" or "logits"; logits may hold −∞, an atom without mass.

    Raises:
        InputError: shapes differ; a probability is negative, NaN or infinite; a row doesn't sum to one.
    """
    if p.shape != q.shape or p.ndim == 0 or p.numel() == 0:
        because = f"p has shape {tuple(p.shape)} and q {tuple(q.shape)}"
        raise InputError(cannot("compare these atoms", because, "Give both over the same atoms, on the last axis"))
    if not p.is_floating_point() or not q.is_floating_point():
        raise InputError(cannot("compare these atoms", f"they are {p.dtype} and {q.dtype}", f"Give {form} as floats"))
    atoms = p.shape[-1]
    flat_p, flat_q = p.detach().reshape(-1, atoms), q.detach().reshape(-1, atoms)
    n, step = len(flat_p), max(1, _NUMBERS_PER_BLOCK // atoms)

    def general(numbers: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
        log_p, log_q = (_log(one[numbers], form, who, numbers) for one, who in ((flat_p, "p"), (flat_q, "q")))
        return log_sum(kind, log_p, log_q)

    is_fast = form == "probabilities" and p.device.type == q.device.type == "cpu"
    if is_fast and isinstance(kind, ForwardKLDivergence):
        values = kl_rows(flat_p, flat_q, general)
    elif is_fast and isinstance(kind, ReverseKLDivergence):
        values = kl_rows(flat_q, flat_p, general)
    else:
        # Logits, GPU tensors and other divergences take the general way, a block that stays in the cache at a time.
        values = torch.cat([general(torch.arange(start, min(n, start + step), device="cpu")) for start in range(0, n, step)])
    return values.clamp(min=0.0).reshape(p.shape[:-1])


def kl_rows(
    p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], general: Callable[[Int[Tensor, " r"]], Float[Tensor, " r"]]
) -> Float[Tensor, " n"]:
    """KL(p/P‖q/Q) of each row in nats, P and Q the sums of the row; right to about 1e-6 of it, for float64 to 1e-12.

    It costs little more than to read the rows: one logarithm per atom, and all passes but the first run in the cache. With ρ =
    Q/P it is Σ p (r − 1 − log r) / P − (ρ − 1 − log ρ), r = q/p: no term is negative, so that sums lose nothing. Narrow floats
    are taken in float32, and in float64 again where the value is below 0.03, or q below 1e-30 under an atom of p: by Pinsker's
    inequality (1964) rounding, ε Σ (|q − p| + p |log r|), is at most 2e-7 √KL nats, so 1e-6 of what is kept.

    `general` gives the same divergence of the rows of these numbers by other means; it raises where a row is no distribution.

    >>> half = torch.full((1, 2), 0.5)
    >>> kl_rows(half, torch.tensor([[0.25, 0.75]]), lambda rows: rows.double())
    tensor([0.1438], dtype=torch.float64)
    """
    wide = torch.float64 in (p.dtype, q.dtype)
    values = _pass(p, q, None, torch.float64 if wide else torch.float32)
    # NaN means: not certain in these floats. The second pass has only these rows.
    if not wide and len(again := values.isnan().nonzero()[:, 0]):
        values[again] = _pass(p, q, again, torch.float64)
    if len(left := values.isnan().nonzero()[:, 0]):
        values[left] = torch.cat([general(few) for few in left.split(max(1, _NUMBERS_PER_KL_BLOCK // p.shape[1]))])
    return values.clamp(min=0.0)


def _pass(
    p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], numbers: Int[Tensor, " r"] | None, dtype: torch.dtype
) -> Float[Tensor, " r"]:
    """The divergences of these rows (all of them if None), NaN where such floats are too narrow or a row is no distribution."""
    n, atoms = len(p) if numbers is None else len(numbers), p.shape[1]
    step, width = max(1, _NUMBERS_PER_KL_BLOCK // atoms), min(atoms, _NUMBERS_PER_KL_BLOCK)
    parts = torch.zeros(-(-atoms // width), 3, n, dtype=dtype, device="cpu")

    def sum_up(first: int) -> None:
        spare = torch.empty(2, step * width, dtype=dtype, device="cpu")
        for start in range(first, min(n, first + _BLOCKS_PER_JOB * step), step):
            rows = slice(start, start + step)
            of_p, of_q = (one[rows] if numbers is None else one[numbers[rows]] for one in (p, q))
            for part, left in zip(parts, range(0, atoms, width), strict=True):
                _sum(of_p[:, left : left + width].to(dtype), of_q[:, left : left + width].to(dtype), spare, part[:, rows])

    jobs = range(0, n, _BLOCKS_PER_JOB * step)
    threads = torch.get_num_threads()
    if threads == 1 or len(jobs) == 1:
        for job in jobs:
            sum_up(job)
    else:  # each job in a thread of its own: threads that share every small step wait more than they work
        with ThreadPoolExecutor(threads, initializer=use_one_thread) as pool:
            list(pool.map(sum_up, jobs))
    excess, total_p, total_q = parts.sum(0, dtype=torch.float64)
    # ρ − 1 from the small difference Q − P, which keeps the digits that Q/P − 1 would lose.
    off = (total_q - total_p) / total_p
    value = excess / total_p - (off - off.log1p())
    vouched = ((total_p - 1).abs() <= _MAX_SUM_ERROR) & ((total_q - 1).abs() <= _MAX_SUM_ERROR) & (value >= _LIMITS[dtype][1])
    return torch.where(vouched, value, torch.nan)


def _sum(p: Float[Tensor, "b v"], q: Float[Tensor, "b v"], spare: Float[Tensor, "2 s"], sums: Float[Tensor, "3 b"]) -> None:
    """Write Σ p (r − 1 − log r), Σ p and Σ q; the first is NaN where a number is negative, or q too small under an atom of p."""
    floor, tiny = _LIMITS[p.dtype][0], torch.finfo(p.dtype).tiny
    torch.sum(p, -1, out=sums[1])
    torch.sum(q, -1, out=sums[2])
    low_p, low_q = float(p.amin()), float(q.amin())
    ratio, log = (one[: p.numel()].view(p.shape) for one in spare)
    extra: Tensor | float = math.nan if min(low_p, low_q) < 0 else 0.0
    if low_q < floor:
        # Whether some q is below the floor under an atom of p, without a temporary of its own: every pass over memory counts
        # here.
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


def log_sum(kind: IntegralDivergence, log_p: Float[Tensor, "... v"], log_q: Float[Tensor, "... v"]) -> Float[Tensor, ...]:
    """The divergence of rows of atoms: for Rényi's by the logarithm of the sum, which neither overflows nor vanishes."""
    if isinstance(kind, RenyiDivergence):
        return kind.log_tail(log_p, log_q).logsumexp(-1) / (kind.order - 1)
    total = kind.integrand(log_p, log_q).sum(-1)
    values = [kind.of_integral(one) for one in total.reshape(-1).tolist()]
    return torch.tensor(values, dtype=torch.float64, device="cpu").reshape(total.shape)


def enumeration(
    log_p: Float[Tensor, " v"], log_q: Float[Tensor, " v"], kind: IntegralDivergence, atoms: Float[Tensor, "v d"]
) -> Estimate | None:
    """A divergence by the sum over atoms; ∞ names the atoms that make it so, and their mass; None if the sum doesn't settle."""
    missed = kind.misses(log_p, log_q)
    where = (missed > 0).nonzero().flatten().tolist()
    if where:
        shown = ", ".join(named(atoms[i]) for i in where[:5]) + (", …" if len(where) > 5 else "")
        note = f"{float(missed.sum()):.4g} of the mass of {regions.outside(missed, log_p, log_q)}, on the atoms {shown}"
        return Estimate.settled(kind.name, math.inf, "enumeration", note)
    value, size = float(log_sum(kind, log_p, log_q)), kind.log_tail(log_p, log_q)
    if len(size) >= MAX_ATOMS and not is_settled(size):
        # Terms that rise to the end of 131,072 atoms never sum up; terms that fall too slowly are left to other methods.
        if not bool((size[-len(size) // 8 :].diff() >= 0).all()):
            return None
        note = f"the terms of {kind.formula} don't fall beyond {len(size):,} atoms"
        return Estimate.settled(kind.name, math.inf, "enumeration", note)
    return Estimate.settled(kind.name, value if value > 0 or math.isnan(value) else 0.0, "enumeration", f"{len(atoms):,} atoms")


def rounding_of_counts(p: Any, atoms: Float[Tensor, "v d"]) -> float:
    """The rounding error of a log probability in which log-gamma functions of counts cancel, such as a binomial one."""
    if not isinstance(p, (Binomial, NegativeBinomial, Poisson)):
        return 0.0
    n = getattr(p, "total_count", None)
    largest = float(atoms.max()) + (0.0 if n is None else float(n))
    return 2.0**-52 * math.lgamma(largest + 1)


def _log(block: Tensor, form: Form, who: str, numbers: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
    block = block.to(torch.float64)
    if form == "logits":
        if bool((block.isnan() | (block == math.inf)).any()) or bool((block == -math.inf).all(-1).any()):
            because = f"logits of {who} are NaN or +inf, or a row is all -inf, in rows {int(numbers[0])} to {int(numbers[-1])}"
            raise InputError(cannot("compare these atoms", because, "Correct them; -inf is an atom without mass"))
        return block.log_softmax(-1)
    low, total = float(block.min()), block.sum(-1)
    if not low >= 0 or not bool(total.isfinite().all()):
        wrong = (~(block >= 0) | (block == math.inf)).nonzero()[0].tolist()
        because = f"{who} is {float(block[tuple(wrong)]):.4g} at row {int(numbers[wrong[0]])}, atom {wrong[1]}"
        instead = "Probabilities lie between 0 and 1; for logits pass form='logits'"
        raise InputError(cannot("take these as probabilities", because, instead))
    off = (total - 1).abs()
    # Rows of float32 sum to 1 far within this; a row that is off by more isn't normalised.
    if float(off.max()) > 1e-4:
        row = int(off.argmax())
        because = f"row {int(numbers[row])} of {who} sums to {float(total[row]):.6g}, not 1"
        raise InputError(cannot("take these as probabilities", because, "Normalise them first"))
    return (block / total[:, None]).log()
