"""Verdict: which arm of a study is better for which need, if any; failed cells are counted, never averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from whichkl._checks import InputError, cannot, plain
from whichkl.files.reading import rebuilt
from whichkl.printable import brief
from whichkl.study.arms import Arm, ArmScores, cells_by_arm, scores_of
from whichkl.study.measures import CHEAPER, NEEDS, Need
from whichkl.study.paired import MIN_PAIRS, Array, PairedDifferences, half_width, holm, paired, sign_flip
from whichkl.study.wording import sentence_of

Outcome = Literal["winner", "no_detectable_difference", "depends", "too_few_seeds", "failed"]
Kind = Literal["better", "equal", "unclear"]


@dataclass(frozen=True)
class Comparison:
    """The leading arm of a need compared with another arm, over the seeds that both finished."""

    need: str
    column: str
    arm: str
    """The leading one."""
    other: str
    difference: float
    """Mean over the seeds of other minus leader, in the column's unit, with lower as better; above 0 the leader is better."""
    low: float
    """The interval of this comparison alone, from `low` to `high`, by Student's t."""
    high: float
    pairs: int
    """Seeds that both finished."""
    p_t: float
    """p-value of the paired t test."""
    p_adjusted: float
    """The same after Holm's correction, over all pairs of arms and all needs."""
    p_flip: float
    """p-value of flipping the signs of the differences; it isn't corrected, since n pairs can't give less than 2^(1−n)."""
    threshold: float
    """Differences below this don't matter in practice, in the column's unit."""
    kind: Kind
    """`better`: detected, and it matters. `equal`: the whole interval is below the threshold. `unclear`: neither."""


@dataclass(frozen=True)
class Choice:
    """The conclusion for one need."""

    need: str
    column: str
    wish: str
    leader: str
    best: tuple[str, ...]
    """The leader, and every arm that isn't detectably worse; a single arm wins."""

    @property
    def winner(self) -> str | None:
        """The arm that is detectably better than every other; None where there is none."""
        return self.best[0] if len(self.best) == 1 else None


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a study; `decide` makes one."""

    __repr__ = brief

    outcome: Outcome
    sentence: str
    """The verdict in plain words."""
    winners: tuple[str, ...]
    """Arms that are among the best for every need: one where the outcome is `winner`."""
    choices: tuple[Choice, ...]
    """One per need that could be tested."""
    comparisons: tuple[Comparison, ...]
    front: tuple[str, ...]
    """Arms that no other dominates: as good for every need and in cost, and better for one (the Pareto front)."""
    arms: tuple[Arm, ...]
    """All arms, with the numbers of cells that finished and failed."""
    notes: tuple[str, ...] = ()
    level: float = 0.05

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        lists = {name: [vars(one) for one in getattr(self, name)] for name in ("choices", "comparisons", "arms")}
        fields: dict[str, Any] = plain({**vars(self), **lists})
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Verdict:
        """Read what `to_dict` returned.

        Raises:
            InputError: it's something else.
        """
        try:
            return rebuilt(cls, fields)
        except ValueError as error:
            raise InputError(cannot("read a verdict", str(error), "Give what `to_dict` returned")) from error

    def __str__(self) -> str:
        """The sentence, and the notes that qualify it."""
        return "\n".join([self.sentence, *self.notes])


def decide(rows: Sequence[Mapping[str, Any]], needs: Sequence[Need] = NEEDS, level: float = 0.05) -> Verdict:
    """Decide which arm is better for which need, in pairs over the seeds.

    An arm is better than another if three things hold: a paired t test rejects equality after Holm's correction over all pairs of
    arms and all needs, so does flipping the signs of the differences, and the difference is large enough to matter. An arm wins a
    need if it's better than every other. It wins the study if no other arm is better for any need. Two arms with fewer than six
    common finished seeds aren't compared.

    Args:
        rows: rows of a study's table, as `Study.rows`.
        needs: what to judge by; by default `NEEDS`.
        level: chance of naming any false difference.

    Raises:
        InputError: `level` isn't between 0 and 1, or an arm has a seed twice.

    >>> rows = [{"family": "gaussian", "objective": name, "seed": seed, "status": "converged", "jeffreys": gap + 0.01 * seed}
    ...         for seed in range(8) for name, gap in (("forward_kl", 1.0), ("reverse_kl", 2.0))]
    >>> decide(rows).winners
    ('gaussian · forward_kl',)
    """
    if not 0 < level < 1:
        raise InputError(cannot(f"use `level={level!r}`", "it isn't between 0 and 1", "Give, say, 0.05"))
    scores = scores_of(rows, cells_by_arm(rows), needs)
    tests = _Tests(scores, level)
    found = [one for one in map(tests.choice, range(len(scores.needs))) if one is not None]
    choices, comparisons = [choice for choice, _ in found], [one for _, mine in found for one in mine]
    outcome, winners = _outcome(scores, choices, comparisons)
    front = tests.front() if choices else ()
    sentence = sentence_of(outcome, winners, choices, comparisons, scores)
    notes = (*scores.notes, *_limits(scores, tests, choices))
    return Verdict(outcome, sentence, winners, tuple(choices), tuple(comparisons), front, scores.arms, notes, level)


class _Tests:
    """Tests all pairs of arms for all needs at once; less is better in all values."""

    def __init__(self, scores: ArmScores, level: float) -> None:
        self.scores, self.level, count = scores, level, len(scores.arms)
        self.i, self.j = np.triu_indices(count, 1)
        self.place = np.empty((count, count), dtype=np.int64)
        """[a, b]: the number of this pair among all pairs."""
        self.place[self.i, self.j] = self.place[self.j, self.i] = np.arange(len(self.i))
        values = [_differences(one[:, self.j], one[:, self.i]) for one in scores.values]
        self.found: list[PairedDifferences] = [paired(one) for one in values]
        p = np.concatenate([one.p for one in self.found]) if values else np.empty(0)
        self.count = int((~np.isnan(p)).sum())
        self.adjusted = holm(p).reshape(len(values), len(self.i))
        self.gain = [_square(one.mean, one.p, count, self.i, self.j) for one in self.found]
        """[a, b]: by how much arm a is better than b, on average; NaN where they can't be compared."""

    def choice(self, k: int) -> tuple[Choice, list[Comparison]] | None:
        """The leader of a need, by the number of arms that are worse on average, and its comparisons."""
        scores, gain = self.scores, self.gain[k]
        known = ~np.isnan(gain)
        if not known.any():
            return None
        wins = (gain > 0).sum(1) - (gain < 0).sum(1)
        wins[~known.any(1)] = -len(wins)  # an arm that can't be compared never leads
        lead, names = int(wins.argmax()), [arm.name for arm in scores.arms]
        need, column = scores.needs[k]
        others = [b for b in range(len(names)) if known[lead, b]]
        found = [self._comparison(k, lead, b) for b in others]
        best = [names[lead], *(one.other for one in found if one.kind != "better")]
        return Choice(need.name, column, need.wish, names[lead], tuple(best)), found

    def _comparison(self, k: int, a: int, b: int) -> Comparison:
        scores, (need, column) = self.scores, self.scores.needs[k]
        one, at = self.found[k], self.place[a, b]
        gain, pairs = float(self.gain[k][a, b]), int(one.pairs[at])
        reach = half_width(float(one.stderr[at]), pairs, self.level)
        threshold = self.threshold(k, a)
        flip = sign_flip(_differences(scores.values[k][:, b], scores.values[k][:, a]))
        adjusted = float(self.adjusted[k, at])
        kind: Kind = "unclear"
        if adjusted <= self.level and flip <= self.level and gain >= threshold:
            kind = "better"
        elif math.isfinite(gain) and abs(gain) + reach <= threshold:
            kind = "equal"
        low, high = (gain - reach, gain + reach) if math.isfinite(gain) else (-math.inf, math.inf)
        arm, other, p = scores.arms[a].name, scores.arms[b].name, float(one.p[at])
        return Comparison(need.name, column, arm, other, gain, low, high, pairs, p, adjusted, flip, threshold, kind)

    def threshold(self, k: int, a: int) -> float:
        """Return the least difference from arm `a` that matters in practice."""
        need, column = self.scores.needs[k]
        share = 0.0 if column in self.scores.up_to else need.relative
        values = self.scores.values[k][:, a]
        values = np.abs(values[np.isfinite(values)])
        return max(need.absolute, share * float(values.mean()) if len(values) else 0.0)

    def front(self) -> tuple[str, ...]:
        """Arms that no other dominates, on average over the seeds."""
        arms, count = self.scores.arms, len(self.scores.arms)
        cost = np.array([arm.cost for arm in arms])
        failures = np.array([arm.failed / arm.cells for arm in arms])
        with np.errstate(invalid="ignore"):
            better = cost[:, None] < (1 - CHEAPER) * cost[None, :]
            no_worse = ~(cost[None, :] < (1 - CHEAPER) * cost[:, None]) & (failures[:, None] <= failures[None, :])
        compared = np.zeros((count, count), dtype=bool)
        for k, gain in enumerate(self.gain):
            known = ~np.isnan(gain)
            least = np.array([self.threshold(k, a) for a in range(count)])
            p = _square(self.adjusted[k], self.found[k].p, count, self.i, self.j, symmetric=True)
            better |= known & (gain >= least[:, None]) & (np.nan_to_num(p, nan=1.0) <= self.level)
            no_worse &= ~(known & (gain <= -least[None, :]))
            compared |= known
        dominated = np.asarray((better & no_worse & compared).any(0))
        finished = np.array([arm.finished >= MIN_PAIRS for arm in arms])
        return tuple(arm.name for arm, out, ok in zip(arms, dominated, finished, strict=True) if ok and not out)


def _outcome(scores: ArmScores, choices: Sequence[Choice], comparisons: Sequence[Comparison]) -> tuple[Outcome, tuple[str, ...]]:
    if sum(arm.finished > 0 for arm in scores.arms) < min(2, len(scores.arms)):
        return "failed", ()
    if not choices:
        return "too_few_seeds", ()
    compared = {name for one in comparisons for name in (one.arm, one.other)}
    winners = tuple(arm.name for arm in scores.arms if arm.name in compared and all(arm.name in one.best for one in choices))
    if len(winners) == 1:
        return "winner", winners
    return ("no_detectable_difference", winners) if winners else ("depends", ())


def _limits(scores: ArmScores, tests: _Tests, choices: Sequence[Choice]) -> list[str]:
    """Return the notes that qualify a verdict."""
    notes = []
    for arm in scores.arms:
        if arm.failed:
            notes.append(f"{arm.name} failed in {arm.failed} of {arm.cells} seeds; it is compared over the others.")
    stopped = [f"{arm.name} in {arm.stopped} of {arm.cells}" for arm in scores.arms if arm.stopped]
    if stopped:
        notes.append(f"Stopped before convergence, by the budget or by a limit of the solver: {', '.join(stopped)}.")
    short = [arm.name for arm in scores.arms if arm.finished < MIN_PAIRS]
    if choices and short:
        notes.append(f"Not compared, because they finished fewer than {MIN_PAIRS} seeds: {', '.join(short)}.")
    if tests.count:
        notes.append(
            f"{tests.count:,} comparison{'s' * (tests.count > 1)} of two arms {'were' if tests.count > 1 else 'was'} made; "
            f"p-values are corrected for their number (Holm), so that the chance of any false difference is {tests.level:.0%}."
        )
    return notes


def _differences(b: Array, a: Array) -> Array:
    """B − a; 0 where both are the same infinity, NaN where either is missing."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(a) & (a == b), 0.0, b - a)


def _square(values: Array, p: Array, count: int, i: Any, j: Any, *, symmetric: bool = False) -> Array:
    """Values of pairs as an antisymmetric (or symmetric) matrix; NaN where a pair wasn't tested."""
    square = np.full((count, count), np.nan)
    known = np.where(np.isnan(p), np.nan, values)
    square[i, j], square[j, i] = known, known if symmetric else -known
    return square
