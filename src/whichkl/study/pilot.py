"""Pilot: successive halving over arms, so that an arm that leads nowhere costs a few seeds and not all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_FEWEST = 2
_RANKED: dict[str, int] = {
    "forward_kl": 1,
    "reverse_kl": 1,
    "jeffreys": 1,
    "interval_gap": 1,
    "coverage": -1,
    "ess_q": -1,
}
"""Columns by which arms are ranked, and whether less is better (1) or more (−1): one for each thing that users want."""


def rungs(seeds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the seeds of each rung: two, then as many more as there were, and at last all that are left.

    >>> rungs([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    ((0, 1), (2, 3), (4, 5, 6, 7, 8, 9))
    >>> rungs([0, 1, 2])
    ((0, 1, 2),)
    """
    if len(seeds) < 2 * _FEWEST:
        return (tuple(seeds),)
    cuts = [_FEWEST, *(n for n in (2 * _FEWEST,) if len(seeds) >= 2 * n)]
    ends = [*cuts, len(seeds)]
    return tuple(tuple(seeds[a:b]) for a, b in zip([0, *cuts], ends, strict=True))


def survivors(arms: Sequence[str], rows: Sequence[Mapping[str, Any]], arm_of: Sequence[str]) -> list[str]:
    """Return the better half of the arms (rounded up), in their order.

    An arm is ranked by each column in which it can be; what counts is its best rank, ties broken by the sum: an arm that is
    the best for one need survives, whatever it's worth for the others. Failed cells put an arm last.

    Args:
        arms: those still in the race.
        rows: of the cells so far.
        arm_of: the arm of each row.

    Source: Jamieson & Talwalkar (2016), successive halving.
    """
    best: dict[str, float] = dict.fromkeys(arms, math.inf)
    total: dict[str, float] = dict.fromkeys(arms, 0.0)
    for column, sign in _RANKED.items():
        means = {arm: _mean([row for row, name in zip(rows, arm_of, strict=True) if name == arm], column, sign) for arm in arms}
        if len({value for value in means.values() if value < math.inf}) < 2:
            continue
        for arm in arms:
            rank = float(sum(other < means[arm] for other in means.values())) if means[arm] < math.inf else float(len(arms))
            best[arm], total[arm] = min(best[arm], rank), total[arm] + rank
    order = sorted(arms, key=lambda arm: (best[arm], total[arm], arms.index(arm)))
    kept = set(order[: math.ceil(len(arms) / 2)])
    return [arm for arm in arms if arm in kept]


def _mean(rows: Sequence[Mapping[str, Any]], column: str, sign: int) -> float:
    """Mean of a column, less being better; infinite where a cell failed or lacks it."""
    values = [row.get(column) for row in rows]
    known = [sign * value for value in values if value is not None and not math.isnan(value)]
    return fmean(known) if known and len(known) == len(values) else math.inf
