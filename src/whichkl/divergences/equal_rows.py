"""Equal rows: values with mass, rows in both samples, and rows that repeat, where methods take rows as draws of a density."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from whichkl._checks import quoted
from whichkl.access import Access
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.question import Question
from whichkl.samples.point_masses import in_words


def infinite_by_masses(ask: Question) -> Estimate | None:
    """Return ∞ where rows have values with mass, the other side has a density, and that makes the divergence infinite.

    No density has mass at a point: E_p[log p/q] is infinite if p has it, whatever else q is.
    """
    if ask.kind is None or not ask.continuous:
        return None
    for side, other in ((ask.p, ask.q), (ask.q, ask.p)):
        if not side.masses or Access.LOG_PROB not in other.access:
            continue
        share = max(share for values in side.masses.values() for share in values.values())
        here, there = (torch.tensor([one], dtype=torch.float64, device="cpu") for one in (math.log(share), -math.inf))
        if bool((ask.kind.misses(*((here, there) if side is ask.p else (there, here))) > 0).any()):
            note = f"{in_words(side.masses, side.target.names)}, and {other.name} has a density, which no value has mass under"
            rows = 0 if side.target.samples is None else len(side.target.samples)
            return Estimate(ask.name, math.inf, finite="infinite", method="counting of equal values", n=rows, notes=(note,))
    return None


def doubts_of_masses(ask: Question) -> list[str]:
    """Report values with mass, and labels, in rows that a method has taken as draws of a density."""
    if ask.kind is None:  # distances between samples are those of any laws
        return []
    sides = [side for side in (ask.p, ask.q) if side.masses]
    texts = [f"{in_words(side.masses, side.target.names)}: this method takes rows as draws of a density" for side in sides[:1]]
    if ask.p.mass_on == ask.q.mass_on == "mixed" and ask.p.is_bare and ask.q.is_bare and ask.p.labels:
        texts.append(f"this method takes the codes of {quoted(tuple(ask.p.labels))} as numbers")
    return texts


def row_tuples(x: Tensor) -> list[tuple[float, ...]]:
    """Return rows that can be compared and hashed."""
    return [*map(tuple, x.to(torch.float64).tolist())]


def shared_rows(ask: Question, result: Estimate) -> list[str]:
    """Report rows in both samples, or repeated in only one: methods take samples as independent draws of densities."""
    x, y = (one.samples for one in ask.targets)
    if x is None or y is None or any(one.sampler is not None for one in ask.targets) or result.exact:
        return []
    firsts = [one[:, 0].cpu().numpy() for one in (x, y)]
    alone = min(len(np.unique(first)) / len(first) for first in firsts) > 0.5
    if alone and np.isin(firsts[0], firsts[1]).mean() < 0.01:  # whole rows repeat no more often than their first cells
        return []
    rows = [set(row_tuples(one)) for one in (x, y)]
    fresh, shared = [len(rows[0]) / len(x), len(rows[1]) / len(y)], len(rows[0] & rows[1])
    if min(fresh) > 0.99 and shared > max(1, 0.01 * min(map(len, rows))):
        return [f"{shared:,} rows are in both samples: they aren't independent, and the value is too small"]
    if min(fresh) < 0.5 and max(fresh) > 0.99:
        one, other = ("p", "q") if fresh[0] < fresh[1] else ("q", "p")
        return [f"the rows of {one} repeat as those of atoms do, and those of {other} don't: then the KL is infinite"]
    return []
