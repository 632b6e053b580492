"""Wording: a verdict in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from whichkl.study.arms import Arm, ArmScores
from whichkl.study.measures import CHEAPER, column_words, unit_of
from whichkl.study.paired import MIN_PAIRS

if TYPE_CHECKING:
    from whichkl.study.verdict import Choice, Comparison

_MAX_NAMED_ARMS = 4
"""Largest number of arms that a sentence names one by one."""
_MIN_SHOWN = 5e-5
"""Smaller numbers are shown as 0."""


def sentence_of(
    outcome: str, winners: Sequence[str], choices: Sequence[Choice], comparisons: Sequence[Comparison], scores: ArmScores
) -> str:
    """Return the verdict in a sentence or two."""
    arms = {arm.name: arm for arm in scores.arms}
    if outcome == "failed":
        good = [arm.name for arm in scores.arms if arm.finished]
        left = f"only {good[0]} finished any" if good else "every cell failed"
        return f"No verdict: {left}, and there is nothing to compare."
    if outcome == "too_few_seeds":
        return _too_few(scores)
    if outcome == "depends":
        return _depends(choices, arms)
    if outcome == "winner":
        return _winner(winners[0], choices, comparisons, arms)
    alike = [one for one in comparisons if one.arm in winners and one.other in winners]
    if alike and all(one.kind == "equal" for one in alike):
        text = f"{listed(winners)} are equal for practical purposes{_over(comparisons)}."
    else:
        text = f"No detectable difference between {listed(winners)}{_over(comparisons)}."
    worse = [name for name in arms if name not in winners and any(one.other == name for one in comparisons)]
    if worse:
        text += f" For some need {listed(worse)} {'is' if len(worse) == 1 else 'are'} worse."
    cheap = _cheapest(arms[name] for name in winners)
    dear = max((arms[name] for name in winners), key=lambda arm: arm.cost)
    if cheap.cost < (1 - CHEAPER) * dear.cost:
        text += f" {cheap.name} is the cheapest of them: {cheap.cost_text} {cheap.unit} a cell, against up to {dear.cost_text}."
    return text + _failures(winners, arms)


def number(value: float, column: str) -> str:
    """Write a value with its unit.

    >>> number(0.4619953, "forward_kl"), number(0.05, "interval_gap"), number(float("inf"), "jeffreys")
    ('0.462 nats', '5.0 %', '∞ nats')
    """
    if math.isinf(value):
        text = "∞" if value > 0 else "−∞"
    elif unit_of(column) == "as a share":
        return f"{100 * value + 0.0:.1f} %".replace("-", "−")
    else:
        text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.4f}"
        text = text if abs(value) >= _MIN_SHOWN else "0"
    return f"{text} {unit_of(column)}".strip().replace("-", "−")


def listed(names: Sequence[str]) -> str:
    """Join names as a sentence does; of many, only the first few are named.

    >>> listed(["a", "b", "c"]), listed(list("abcdefg"))
    ('a, b and c', 'a, b, c, d and 3 more')
    """
    some = list(names)
    if len(some) > _MAX_NAMED_ARMS + 1:
        some = [*some[:_MAX_NAMED_ARMS], f"{len(names) - _MAX_NAMED_ARMS} more"]
    return some[0] if len(some) == 1 else f"{', '.join(some[:-1])} and {some[-1]}" if some else "none"


def _winner(name: str, choices: Sequence[Choice], comparisons: Sequence[Comparison], arms: dict[str, Arm]) -> str:
    won = [one for one in choices if one.winner == name]
    shared = [one.need for one in choices if one.winner is None]
    text = f"{name} is better"
    if won:
        gaps = [_nearest(one, comparisons) for one in won]
        text += f" for {listed([one.need for one in won])} ({'; '.join(gaps)})"
    text += _over(comparisons)
    text += f"; for {listed(shared)} nothing is detectably better." if shared else "."
    cheapest = _cheapest(arms.values())
    if cheapest.cost < (1 - CHEAPER) * arms[name].cost:
        mine, least = arms[name].cost_text, cheapest.cost_text
        text += f" It costs {mine} {cheapest.unit} a cell; the cheapest, {cheapest.name}, costs {least}."
    return text + _failures([name], arms)


def _nearest(choice: Choice, comparisons: Sequence[Comparison]) -> str:
    """State by how much a winner leads the nearest other arm."""
    mine = [one for one in comparisons if one.need == choice.need]
    near = min(mine, key=lambda one: one.difference)
    ends = [number(one, choice.column) for one in (near.low, near.high)]
    interval = f", interval {ends[0]} to {ends[1]}" if math.isfinite(near.low) and ends[0] != ends[1] else ""
    to_next = " to the next" if len(mine) > 1 else ""
    return f"{column_words(choice.column)} better by {number(near.difference, choice.column)}{to_next}{interval}"


def _depends(choices: Sequence[Choice], arms: dict[str, Arm]) -> str:
    wishes: dict[tuple[str, ...], list[str]] = {}
    for one in choices:
        wishes.setdefault(one.best, []).append(one.need)
    parts = [f"for {listed(needs)} {'take' if len(best) == 1 else 'any of'} {listed(best)}" for best, needs in wishes.items()]
    named = list(dict.fromkeys(name for best in wishes for name in best))
    cheapest, dearest = _cheapest(arms.values()), max((arms[name].cost for name in named), default=math.nan)
    is_dear = cheapest.cost < (1 - CHEAPER) * dearest
    cost = f" The cheapest is {cheapest.name} ({cheapest.cost_text} {cheapest.unit} a cell)." if is_dear else ""
    return f"It depends on what you need: {'; '.join(parts)}.{cost}" + _failures(named, arms)


def _cheapest(arms: Iterable[Arm]) -> Arm:
    """Return the cheapest arm that finished enough seeds, or the cheapest of all if none did."""
    some = list(arms)
    enough = [arm for arm in some if arm.finished >= MIN_PAIRS] or some
    return min(enough, key=lambda arm: (math.isnan(arm.cost), arm.cost))


def _too_few(scores: ArmScores) -> str:
    fewest = max((arm.finished for arm in scores.arms), default=0)
    failed = sum(arm.failed for arm in scores.arms)
    if len(scores.arms) < 2:
        return "No verdict: there is one arm, and nothing to compare it with."
    if fewest >= MIN_PAIRS and not scores.needs:
        return "No verdict: no column that a need is judged by was measured."
    seeds = max((arm.cells for arm in scores.arms), default=0)
    because = f"two arms must finish at least {MIN_PAIRS} common seeds, and no two did"
    if seeds < MIN_PAIRS:
        because = f"it needs at least {MIN_PAIRS} seeds, and this study has {seeds}"
    had = f" ({failed} cells failed)" if failed else ""
    return f"No verdict: {because}{had}. Add seeds to have the numbers judged."


def _over(comparisons: Sequence[Comparison]) -> str:
    pairs = sorted({one.pairs for one in comparisons})
    return f", over {pairs[0]} seeds" if len(pairs) == 1 else f", over {pairs[0]} to {pairs[-1]} seeds" if pairs else ""


def _failures(names: Sequence[str], arms: dict[str, Arm]) -> str:
    bad = [f"{name} failed in {arms[name].failed} of {arms[name].cells} seeds" for name in names if arms[name].failed]
    return f" But {listed(bad)}." if bad else ""
