"""Discrete distributions: sums over atoms, row by row, in blocks, with exact 0 · log 0 and explained infinities."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Categorical, Distribution, OneHotCategorical
from torch.nn.functional import logsigmoid

from whichkl._checks import InputError, cannot
from whichkl.divergences import regions
from whichkl.divergences.estimate import Estimate, Finite
from whichkl.divergences.exact.kl_rows import kl_rows
from whichkl.divergences.kinds import ForwardKLDivergence, IntegralDivergence, Renyi, ReverseKLDivergence

Form = Literal["probabilities", "logits"]

_KLS = (ForwardKLDivergence, ReverseKLDivergence)
_NUMBERS_PER_BLOCK = 1 << 17
_NEGLIGIBLE_NATS = 40.0
"""Nats below the largest at which the probabilities of countable atoms are left off."""
_MAX_ATOMS = 1 << 17


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

    if form == "probabilities" and p.device.type == q.device.type == "cpu" and isinstance(kind, _KLS):
        forward = isinstance(kind, ForwardKLDivergence)
        values = kl_rows(flat_p, flat_q, general) if forward else kl_rows(flat_q, flat_p, general)
    else:
        values = torch.cat([general(torch.arange(start, min(n, start + step), device="cpu")) for start in range(0, n, step)])
    return values.clamp(min=0.0).reshape(p.shape[:-1])


def enumerate_atoms(
    p: Distribution, q: Distribution, kind: IntegralDivergence
) -> tuple[Float[Tensor, " v"], Float[Tensor, " v"], list[str]] | None:
    """Log probabilities of two discrete distributions over their joint atoms, and the atoms' names; None if they can't be listed.

    Countable supports (Poisson, Geometric, …) are listed until e⁻⁴⁰ of the largest is left of either, and until the terms of the
    divergence have fallen as far, or are seen not to fall.
    """
    lists = [_atoms(one) for one in (p, q)]
    if any(one is None for one in lists):
        return None
    atoms = torch.cat([one for one in lists if one is not None]).unique(dim=0)
    if not (p.has_enumerate_support and q.has_enumerate_support):
        while not _settled(kind.log_tail(_log_mass(p, atoms), _log_mass(q, atoms))) and len(atoms) < _MAX_ATOMS:
            atoms = torch.arange(2 * len(atoms), dtype=torch.float64, device="cpu")[:, None]
    return _log_mass(p, atoms), _log_mass(q, atoms), [_name(atom) for atom in atoms]


def _settled(size: Float[Tensor, " v"]) -> bool:
    """Whether the last terms are negligible and fall."""
    top, last = float(size.max()), size[-len(size) // 8 :]
    return top == math.inf or float(last.max()) < top - _NEGLIGIBLE_NATS or top == -math.inf


def log_sum(kind: IntegralDivergence, log_p: Float[Tensor, "... v"], log_q: Float[Tensor, "... v"]) -> Float[Tensor, ...]:
    """The divergence of rows of atoms: for Rényi's by the logarithm of the sum, which neither overflows nor vanishes."""
    if isinstance(kind, Renyi):
        return kind.log_tail(log_p, log_q).logsumexp(-1) / (kind.order - 1)
    total = kind.integrand(log_p, log_q).sum(-1)
    return torch.tensor([kind.of_integral(v) for v in total.reshape(-1).tolist()], dtype=torch.float64, device="cpu").reshape(
        total.shape
    )


def enumeration(
    log_p: Float[Tensor, " v"], log_q: Float[Tensor, " v"], kind: IntegralDivergence, names: list[str]
) -> Estimate | None:
    """A divergence by the sum over atoms; ∞ names the atoms that make it so, and their mass; None if the sum doesn't settle."""
    missed = kind.misses(log_p, log_q)
    if bool((missed > 0).any()):
        where = (missed > 0).nonzero().flatten().tolist()
        shown = ", ".join(names[i] for i in where[:5]) + (", …" if len(where) > 5 else "")
        note = f"{float(missed.sum()):.4g} of the mass of {regions.outside(missed, log_p, log_q)}, on the atoms {shown}"
        return Estimate(kind.name, math.inf, finite="infinite", method="enumeration", exact=True, notes=(note,))
    value, size = float(log_sum(kind, log_p, log_q)), kind.log_tail(log_p, log_q)
    if len(size) >= _MAX_ATOMS and not _settled(size):
        rising = bool((size[-len(size) // 8 :].diff() >= 0).all())
        if not rising:
            return None
        note = f"the terms of {kind.formula} don't fall beyond {len(size):,} atoms"
        return Estimate(kind.name, math.inf, finite="infinite", method="enumeration", exact=True, notes=(note,))
    finite: Finite = "certified" if math.isfinite(value) else "infinite"
    value = value if value > 0 or math.isnan(value) else 0.0
    notes = (f"{len(names):,} atoms",)
    return Estimate(kind.name, value, finite=finite, method="enumeration", exact=True, notes=notes)


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
        raise InputError(
            cannot("take these as probabilities", because, "Probabilities lie between 0 and 1; for logits pass form='logits'")
        )
    off = (total - 1).abs()
    if float(off.max()) > 1e-4:
        row = int(off.argmax())
        because = f"row {int(numbers[row])} of {who} sums to {float(total[row]):.6g}, not 1"
        raise InputError(cannot("take these as probabilities", because, "Normalise them first"))
    return (block / total[:, None]).log()


def _atoms(p: Distribution) -> Float[Tensor, "v d"] | None:
    if p.has_enumerate_support:
        try:
            return p.enumerate_support().reshape(-1, max(1, p.event_shape.numel())).to(torch.float64)
        except NotImplementedError:
            return None
    support = p.support
    if support is None or not support.is_discrete or p.event_shape != ():
        return None
    count = 64
    while count <= 1 << 22:
        atoms = torch.arange(count, dtype=torch.float64, device="cpu")[:, None]
        size = _log_mass(p, atoms)
        if float(size[-1]) < float(size.max()) - _NEGLIGIBLE_NATS and float(size.logsumexp(0)) > -1e-6:
            return torch.arange(2 * count, dtype=torch.float64, device="cpu")[:, None]
        count *= 2
    return None


def _log_mass(p: Distribution, atoms: Float[Tensor, "v d"]) -> Float[Tensor, " v"]:
    support = p.support
    points = atoms[:, 0] if p.event_shape == () else atoms
    inside = torch.ones(len(atoms), dtype=torch.bool, device="cpu") if support is None else support.check(points)
    value = torch.full((len(atoms),), -math.inf, dtype=torch.float64, device="cpu")
    inside = inside if inside.ndim == 1 else inside.all(-1)
    if bool(inside.any()):
        value[inside] = _log_prob(p, points[inside]).to(torch.float64)
    return value


def _log_prob(p: Distribution, atoms: Tensor) -> Tensor:
    """Log probabilities without torch's clamp of the parameter to some 1e-16, which makes infinite KLs finite."""
    if isinstance(p, OneHotCategorical):
        return _log_prob(p._categorical, atoms.argmax(-1))
    given = vars(p)
    if isinstance(p, Categorical):
        each: Tensor = given["probs"].log() if "probs" in given else given["logits"].log_softmax(-1)
        return each[atoms.long()]
    if isinstance(p, (Bernoulli, Binomial)):
        if "probs" in given:
            yes, no = given["probs"].log(), (-given["probs"]).log1p()
        else:
            yes, no = logsigmoid(p.logits), logsigmoid(-p.logits)
        n = p.total_count if isinstance(p, Binomial) else torch.ones((), dtype=torch.float64, device="cpu")
        ways = torch.lgamma(n + 1) - torch.lgamma(atoms + 1) - torch.lgamma(n - atoms + 1)
        return ways + torch.where(atoms > 0, atoms * yes, 0.0) + torch.where(n > atoms, (n - atoms) * no, 0.0)
    return p.log_prob(atoms.to(p.mean.dtype))


def _name(atom: Tensor) -> str:
    return f"{float(atom):g}" if atom.numel() == 1 else str([int(v) for v in atom])
