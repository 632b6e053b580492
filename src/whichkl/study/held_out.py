"""Held out: for each seed, what all fits see of the target, and the draws that all of them are scored on."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.samples.repeats import row_keys
from whichkl.targets import Target

if TYPE_CHECKING:
    from whichkl.study.plan import Plan


@dataclass(frozen=True)
class HeldOutDraws:
    """Draws of p that no fit of this seed has seen; `p.samples` is None where p can't be sampled."""

    p: Target
    """The target, with these draws in place of its samples or sampler."""
    whole: Target
    seed: int

    @property
    def x(self) -> Float[Tensor, "m d"] | None:
        """The draws."""
        return self.p.samples

    @cached_property
    def log_p(self) -> Float[Tensor, " m"] | None:
        """Log p there, up to its constant; None where either is missing."""
        if self.x is None or not self.p.access.can_evaluate:
            return None
        return self.p.log_prob(self.x).detach().to(torch.float64)

    @cached_property
    def groups(self) -> Int[Tensor, " m"] | None:
        """Numbers that equal rows share, where rows of the target repeat."""
        if self.x is None or self.whole.repeats is None:
            return None
        return row_keys(self.x, self.p.context)

    @cached_property
    def independent(self) -> Target:
        """The target with chains thinned to nearly independent draws, for tests that need these."""
        return self.p.thinned()[0]


def split(plan: Plan, seed: int) -> tuple[Target, HeldOutDraws]:
    """Return what the fits of a seed see, and what they are scored on.

    A sampler gives fresh draws. A random share of fixed samples is held out, equal rows together; a stretch of each chain.
    """
    p = plan.target
    if p.sampler is not None:
        return p, HeldOutDraws(_known_by(p, p.draws(plan.draws, mixed(seed, "held out"))), p, seed)
    if p.samples is None:
        return p, HeldOutDraws(p, p, seed)
    keep = _kept(p, plan.held_out, seed)
    return _part(p, keep), HeldOutDraws(_part(p, ~keep), p, seed)


def mixed(seed: int, what: str) -> int:
    """Return a seed for one purpose, unrelated to those that solvers derive from theirs."""
    return int.from_bytes(hashlib.sha256(f"{what} {seed}".encode()).digest()[:4]) >> 1


def _kept(p: Target, share: float, seed: int) -> Tensor:
    n = 0 if p.samples is None else len(p.samples)
    keep = torch.ones(n, dtype=torch.bool, device="cpu")
    if p.repeats is not None:
        rank = p.repeats.rank(mixed(seed, "split")).cpu()
        return rank >= max(1, round(share * p.repeats.count))
    if p.chains is None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(mixed(seed, "split")), device="cpu")
        keep[order[: max(1, round(share * n))]] = False
        return keep
    for chain in p.chains.unique():
        rows = (p.chains == chain).nonzero()[:, 0].cpu()
        count = max(1, round(share * len(rows)))
        first = mixed(seed, f"chain {int(chain)}") % (len(rows) - count + 1)
        keep[rows[first : first + count]] = False
    return keep


def _part(p: Target, keep: Tensor) -> Target:
    part = copy.copy(p)
    for name in ("samples", "context", "weights", "chains"):
        value = getattr(p, name)
        setattr(part, name, None if value is None else value[keep.to(value.device)])
    part.repeats = None
    if part.chains is not None:
        part.chains = part.chains.unique(return_inverse=True)[1]
    return part


def _known_by(p: Target, x: Float[Tensor, "m d"]) -> Target:
    part = copy.copy(p)
    part.__dict__.pop("access", None)
    part.samples, part.sampler, part.weights, part.chains, part.repeats = x, None, None, None, None
    return part
