"""Doubling: models that were fitted on few nodes are fitted again on twice as many, until the optima stay where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from whichkl.solvers.nodes.ensemble import Ensemble

NEAR_BEST = 3.0
"""Optima within this many nats of the best one must stay, too."""
S = TypeVar("S")
"""Several models on one set of nodes."""


@dataclass(frozen=True)
class Verdict:
    """What twice as many nodes have shown about the optima of the former ones."""

    node_error: float
    """How far the nodes have moved the best optimum, in units of its solver."""
    is_settled: bool
    factor: int = 2
    """The power of two by which to multiply the nodes next."""


@dataclass(frozen=True)
class Doubling(Generic[S]):
    """Fits on more and more nodes; each solver says how it begins, descends and judges.

    Args:
        first: the number of nodes from which on a fit is judged; fewer are a first approximation.
        max_nodes: the largest number of nodes.
        is_exact: whether the first nodes are enough, as for the trapezoid rule on the line.
        check: refuses models that nothing can come of.
        begin: the optima of a fit, a number of nodes -> the models on these nodes; None if the budget doesn't allow that.
        descend: models at their starts -> at their optima on the same nodes.
        judge: starts and ends on the present nodes, and their number -> whether the nodes are enough.
    """

    first: int
    max_nodes: int
    is_exact: bool
    check: Callable[[S], None]
    begin: Callable[[S, int], S | None]
    descend: Callable[[S], S]
    judge: Callable[[S, S, int], Verdict]

    def run(self, begun: S, ended: S, count: int) -> tuple[S, float]:
        """Return the models on the last nodes, and the node error of the best one, infinite where nodes weren't doubled."""
        error = math.inf
        while True:
            self.check(ended)
            is_settled, more = self.is_exact, max(self.first, 2 * count)
            if count > self.first:
                verdict = self.judge(begun, ended, count)
                error, is_settled, more = verdict.node_error, is_settled or verdict.is_settled, verdict.factor * count
            if is_settled or 2 * count > self.max_nodes:
                return ended, error
            count = min(more, self.max_nodes)
            start = self.begin(ended, count)
            if start is None:
                return ended, error
            begun, ended = start, self.descend(start)


def judge_by_cost(node_loss: float) -> Callable[[Ensemble, Ensemble, int], Verdict]:
    """Return a judge that asks whether nodes cost at most `node_loss` nats: the loss at their optimum above the true optimum's.

    The cost falls as 1/n. If the optimum of n/2 nodes gains G by descending on n others, then G is the cost of n/2 nodes plus
    that of n nodes, which is three times the latter.
    """

    def judge(begun: Ensemble, ended: Ensemble, count: int) -> Verdict:
        cost = (begun.loss - ended.loss) / 3
        best = int(ended.loss.argmin())
        return Verdict(float(cost[best]), bool((cost <= node_loss)[near_best(ended.loss)].all()))

    return judge


def near_best(loss: Tensor) -> Tensor:
    """Return which losses are within `NEAR_BEST` nats of the least."""
    return loss <= loss.min() + NEAR_BEST
