"""Pilot: successive halving over arms, so that an arm that leads nowhere costs a few seeds and not all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from whichkl.study.measures import columns_in

_MIN_SEEDS = 2
"""Least number of seeds after which arms are dropped."""


def rungs(seeds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the seeds of each rung: two, then two more, then all others.

    >>> rungs([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    ((0, 1), (2, 3), (4, 5, 6, 7, 8, 9))
    >>> rungs([0, 1, 2])
    ((0, 1, 2),)
    """
    cuts = [n for n in (_MIN_SEEDS, 2 * _MIN_SEEDS) if len(seeds) >= 2 * n]
    return tuple(tuple(seeds[a:b]) for a, b in zip([0, *cuts], [*cuts, len(seeds)], strict=True))


def survivors(arms: Sequence[str], rows: Sequence[Mapping[str, Any]], arm_of: Sequence[str]) -> list[str]:
    """Return the better half of the arms (rounded up), in their order.

    Arms are ranked by each column that has values. The best rank of an arm counts, and ties are broken by the sum of its ranks:
    an arm that is the best for one need survives, whatever its ranks for the others. An arm with a failed cell comes last.

    Args:
        arms: those still in the race.
        rows: of the cells so far.
        arm_of: the arm of each row.

    Source: Jamieson & Talwalkar (2016), successive halving.
    """
    best: dict[str, float] = dict.fromkeys(arms, math.inf)
    total: dict[str, float] = dict.fromkeys(arms, 0.0)
    for column in columns_in("ranking"):
        sign = 1 if column.better == "lower" else -1
        mine = {arm: [row for row, name in zip(rows, arm_of, strict=True) if name == arm] for arm in arms}
        means = {arm: _mean(mine[arm], column.name, sign) for arm in arms}
        if len({value for value in means.values() if value < math.inf}) < 2:
            continue
        for arm in arms:
            rank = float(sum(other < means[arm] for other in means.values())) if means[arm] < math.inf else float(len(arms))
            best[arm], total[arm] = min(best[arm], rank), total[arm] + rank
    order = sorted(arms, key=lambda arm: (best[arm], total[arm], arms.index(arm)))
    kept = set(order[: math.ceil(len(arms) / 2)])
    return [arm for arm in arms if arm in kept]


def _mean(rows: Sequence[Mapping[str, Any]], column: str, sign: int) -> float:
    """Mean of a column with a sign by which less is better; infinite where a cell failed or has no value."""
    values = [row.get(column) for row in rows]
    known = [sign * value for value in values if value is not None and not math.isnan(value)]
    return fmean(known) if known and len(known) == len(values) else math.inf
