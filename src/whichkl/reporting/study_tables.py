"""The tables of a study's report, as rows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from whichkl.study import Study, Verdict
from whichkl.study.arms import arm_of
from whichkl.study.measures import FIELDS
from whichkl.study.result import UP_TO
from whichkl.study.verdict import Comparison
from whichkl.study.wording import column_words, listed, number

MOST_ARMS, MOST_ROWS = 40, 60
_NEEDED = ("jeffreys", "forward_kl", "reverse_kl", "interval_gap")
_REACH = ("coverage", "density", "missed_mass", "c2st", "mmd")
_WEIGHTS = ("ess_q", "ess_p", "khat", "interval_50", "interval_90")
_HEADS = {
    "jeffreys": "Jeffreys",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "interval_gap": "interval gap",
    "missed_mass": "missed mass",
    "ess_q": "ESS of q",
    "ess_p": "ESS of p",
    "khat": "k̂",
    "c2st": "C2ST",
    "mmd": "MMD²",
    "interval_50": "50 % interval",
    "interval_90": "90 % interval",
}
_SAYS = {"better": "worse", "equal": "equal", "unclear": "not told apart"}


def arms_shown(verdict: Verdict) -> list[str]:
    """Return the arms that tables show: those on the front, then the others, in their order."""
    rest = [arm.name for arm in verdict.arms if arm.name not in set(verdict.front)]
    return [*verdict.front, *rest][:MOST_ARMS]


def need_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """For each need: the arm to take, and by how much it leads."""
    rows: list[tuple[str, ...]] = []
    for choice in verdict.choices:
        mine = [one for one in verdict.comparisons if one.need == choice.need]
        near = min(mine, key=lambda one: one.difference)
        lead = f"{number(near.difference, choice.column)}" if choice.winner else "no detectable lead"
        take = choice.winner or listed(choice.best)
        rows.append((choice.need, f"{choice.wish} ({column_words(choice.column)})", take, lead))
    return rows


def scorecard_rows(study: Study, shown: Sequence[str]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """The needs' columns, the others of the scorecard, and the user's own: a table each, as far as there are values."""
    arms: dict[str, list[Mapping[str, Any]]] = {name: [] for name in shown}
    for cell in study.cells:
        if cell.row["status"] != "failed" and arm_of(cell.row) in arms:
            arms[arm_of(cell.row)].append(cell.row)
    known, some = set(FIELDS), [row for rows in arms.values() for row in rows]
    own = [name for name in dict.fromkeys(name for row in some for name in row) if name not in known]
    tables = []
    for group in (_NEEDED, _REACH, _WEIGHTS, own):
        columns = [name for name in group if any(row.get(name) is not None for row in some)]
        if columns:
            heads = tuple(_head(name, some) for name in columns)
            rows = [(arm, *(_mean(mine, name) for name in columns)) for arm, mine in arms.items()]
            tables.append((("arm", *heads), rows))
    return tables


def cost_rows(verdict: Verdict, shown: Sequence[str]) -> list[tuple[str, ...]]:
    """What each arm costs, and what became of its cells."""
    arms = {arm.name: arm for arm in verdict.arms}
    rows: list[tuple[str, ...]] = []
    for name in shown:
        arm = arms[name]
        cost = "–" if math.isnan(arm.cost) else f"{arm.cost:,.0f}"
        rows.append((name, cost, f"{arm.finished} of {arm.cells}", str(arm.failed), str(arm.stopped)))
    return rows


def comparison_rows(verdict: Verdict, need: str) -> tuple[list[tuple[str, ...]], int]:
    """A need's comparisons, the nearest first, and how many are left out."""
    mine = sorted((one for one in verdict.comparisons if one.need == need), key=lambda one: one.difference)
    return [_compared(one) for one in mine[:MOST_ARMS]], max(0, len(mine) - MOST_ARMS)


def failure_rows(study: Study) -> tuple[list[tuple[str, ...]], int]:
    """Failed cells by arm and error, and how many kinds are left out."""
    found: dict[tuple[str, str], list[int]] = {}
    for cell in study.failed:
        found.setdefault((arm_of(cell.row), str(cell.row.get("error"))), []).append(cell.row["seed"])
    rows: list[tuple[str, ...]] = []
    for (arm, error), seeds in found.items():
        rows.append((arm, str(len(seeds)), listed([str(one) for one in seeds]), error[:300]))
    return rows[:MOST_ROWS], max(0, len(rows) - MOST_ROWS)


def _compared(one: Comparison) -> tuple[str, ...]:
    ends = [number(value, one.column).removesuffix(" nats") for value in (one.low, one.high)]
    interval = f"{ends[0]} to {ends[1]}" if math.isfinite(one.low) else "–"
    p = (_p(one.p_adjusted), _p(one.p_flip))
    return (one.other, number(one.difference, one.column), interval, str(one.pairs), *p, _SAYS[one.kind])


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Mean and standard error of a column over the cells that have it, to the digits that the error leaves."""
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    if not values:
        return "–"
    mean = fmean(values)
    if not math.isfinite(mean):
        return "∞" if mean > 0 else "−∞" if mean < 0 else "–"
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    digits = 4 if error < 5e-5 else max(0, min(4, 1 - math.floor(math.log10(error))))
    text = f"{mean + 0.0:,.{digits}f}" if error >= 5e-5 or abs(mean) < 1e4 else f"{mean:,.0f}"
    text = "0" if float(text.replace(",", "")) == 0 and error < 5e-5 else text
    return (f"{text} ± {error:,.{digits}f}" if error >= 5e-5 else text).replace("-", "−")


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _head(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    constant = next((row.get(f"{name}_up_to") for row in rows if row.get(f"{name}_up_to")), None)
    return f"{_HEADS.get(name, name)}{f' {UP_TO.get(constant, constant)}' if constant else ''}"
