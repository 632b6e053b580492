"""Sanity checks: contradictions that no method sees in its own answer, checked once for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from whichkl._checks import TargetError
from whichkl.access import Access
from whichkl.divergences.draws import bridge
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.question import Question, target_of


def checked_for_sanity(result: Estimate, ask: Question, fatal: Sequence[str]) -> Estimate:
    """Mark an answer unreliable where its interval is below 0, draws contradict a density, or samples share rows.

    Args:
        result: what a method found.
        ask: the question.
        fatal: known reasons for distrust.
    """
    wrong = list(fatal)
    if ask.continuous:
        names = [", ".join(target_of(side).names) for side in (ask.p, ask.q) if target_of(side).samples is not None]
        if len(names) == 2 and names[0] != names[1]:
            note = f"the columns {names[0]} of p were compared with {names[1]} of q, in this order"
            result = replace(result, notes=(*result.notes, note))
    if not result.exact and result.up_to is None and ask.kind is not None and result.interval[1] < 0:
        wrong.append(
            "its whole interval is below 0, and no divergence is: its inputs contradict each other, or its bias is larger"
        )
    if math.isfinite(result.value) and ask.continuous:
        wrong += _contradictions(ask) + _shared_rows(ask, result)
    if not wrong:
        return result
    finite = result.finite if result.value == math.inf else "not certified"
    return replace(result, reliable=False, exact=False, finite=finite, notes=(*wrong, *result.notes))


def _contradictions(ask: Question) -> list[str]:
    """Reasons why draws and log densities that a user gave don't belong together."""
    p, q = target_of(ask.p), target_of(ask.q)
    given = [side for side in (ask.p, ask.q) if side.distribution is None and Access.LOG_PROB in side.access]
    drawn = any(side.access.can_sample for side in given)
    if not (drawn and ask.evaluated and ask.sampled) or p.weights is not None or q.weights is not None:
        return []
    try:
        found = bridge.contradiction(p, q, ask.n, ask.seed + 17)
    except TargetError:
        return []
    return [] if found is None else [found]


def _shared_rows(ask: Question, result: Estimate) -> list[str]:
    """Report rows in both samples, or repeated in only one: methods take samples as independent draws of densities."""
    p, q = target_of(ask.p), target_of(ask.q)
    if p.samples is None or q.samples is None or p.sampler is not None or q.sampler is not None or result.exact:
        return []
    firsts = [one.samples[:, 0].cpu().numpy() for one in (p, q) if one.samples is not None]
    alone = min(len(np.unique(first)) / len(first) for first in firsts) > 0.5
    if alone and np.isin(firsts[0], firsts[1]).mean() < 0.01:  # whole rows repeat no more often than their first cells
        return []
    rows = [{*map(tuple, one.samples.to(torch.float64).tolist())} for one in (p, q) if one.samples is not None]
    fresh = [len(one) / len(side.samples) for one, side in zip(rows, (p, q), strict=True) if side.samples is not None]
    if min(fresh) > 0.99 and len(rows[0] & rows[1]) > max(1, 0.01 * min(map(len, rows))):
        return [f"{len(rows[0] & rows[1]):,} rows are in both samples: they aren't independent, and the value is too small"]
    if min(fresh) < 0.5 and max(fresh) > 0.99:
        one, other = ("p", "q") if fresh[0] < fresh[1] else ("q", "p")
        return [f"the rows of {one} repeat as those of atoms do, and those of {other} don't: then the KL is infinite"]
    return []
