"""Doubling: models are fitted again on twice as many nodes until the optima stay; targets without an optimum are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.solvers.nodes.ensemble import Ensemble

NEAR_BEST = 3.0
"""Optima within this many nats of the best one must stay, too."""
_UNBOUNDED = 1e12
"""A width, the inverse of a width, or a number of nats that counts as infinite."""
_MIN_RESIDUAL = 0.1
"""Standard deviations. Smallest gradient of a model that still shrinks."""
S = TypeVar("S")
"""Several models on one set of nodes."""


class Verdict(NamedTuple):
    """What twice as many nodes have shown about the optima of the former ones."""

    node_error: float
    """How far the nodes have moved the best optimum, in units of its solver."""
    is_settled: bool
    factor: int = 2
    """The power of two by which to multiply the nodes next."""


def double_nodes(
    fitted: S, count: int, max_nodes: int, is_exact: bool, refit: Callable[[S, int], tuple[S, Verdict] | None], first: int = 0
) -> tuple[S, float | None]:
    """Fit on more and more nodes, and return the last models with the node error of the best; None if no doubling was judged.

    Args:
        fitted: the models at their optima on `count` nodes.
        count: the number of these nodes.
        max_nodes: the largest number of nodes.
        is_exact: whether the first nodes are enough, as for the trapezoid rule on the line.
        refit: models and a larger number of nodes -> their optima there and what they show; None if the budget forbids it.
        first: the number of nodes from which on a fit is judged, if it is above `count`: fewer are a first approximation.
    """
    first, error, more, is_settled = max(first, count), None, 2 * count, is_exact
    while not is_settled and 2 * count <= max_nodes:
        count = min(max(first, more), max_nodes)
        found = refit(fitted, count)
        if found is None:
            break
        fitted, verdict = found
        more = 2 * count
        if count > first:
            error, is_settled, more = verdict.node_error, verdict.is_settled, verdict.factor * count
    return fitted, error


def judge_by_cost(node_loss: float, begun: Ensemble, ended: Ensemble) -> Verdict:
    """Return whether the nodes cost at most `node_loss` nats: the loss at their optimum above the true optimum's.

    The cost falls as 1/n. If the optimum of n/2 nodes gains G by descending on n others, then G is the cost of n/2 nodes plus
    that of n nodes, which is three times the latter.
    """
    cost = (begun.loss - ended.loss) / 3
    return Verdict(float(cost[int(ended.loss.argmin())]), bool((cost <= node_loss)[near_best(ended.loss)].all()))


def near_best(loss: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Return which losses are within `NEAR_BEST` nats of the least."""
    return loss <= loss.min() + NEAR_BEST


def refuse_infinite(elbo: Float[Tensor, " b"]) -> None:
    """Refuse a target whose ELBO isn't finite at the end of any start."""
    if bool(elbo.isfinite().any()):
        return
    because = (
        "`log_prob` is -inf inside the support of every start, so that reverse KL is infinite there, or it doesn't fall off and "
        "can't be normalised"
    )
    instead = "Pass `support=`, check the signs of `log_prob`, or use `forward_kl`, which needs draws of the target"
    raise TargetError(cannot("minimise `reverse_kl` here", because, instead))


def refuse_unbounded(
    elbo: Float[Tensor, " b"], spread: Float[Tensor, "b k d"], residual: Float[Tensor, " b"], names: Sequence[str]
) -> None:
    """Refuse a target whose best model is wider than 10¹² in a column, has an ELBO above 10¹² nats, or still shrinks below 10⁻¹².

    `spread` holds the standard deviations of each model's columns, per component. A model may be arbitrarily narrow if it is at
    rest, which `residual`, the length of its gradient, tells. The message names the widest or the narrowest column.
    """
    best = int(elbo.argmax())
    spread = spread[best]
    if float(spread.max()) > _UNBOUNDED:
        name = names[int(spread.amax(0).argmax())]
        because = f"the model spreads without bound along {name}: the density doesn't fall off there"
        instead = "Check the signs of `log_prob`, or pass `support=`; a column that is wider than 1e12 needs other units"
        raise TargetError(cannot("fit this target", because, instead))
    if float(spread.min()) < 1 / _UNBOUNDED and float(residual[best]) > _MIN_RESIDUAL:
        name = names[int(spread.amin(0).argmin())]
        because = f"the model shrinks to a point along {name}: `log_prob` rises without bound there, so that ∫p may be infinite"
        instead = "Bound `log_prob` there, or keep x away from it with `support=`; an infinite mass has no divergence"
        raise TargetError(cannot("fit this target", because, instead))
    if (nats := float(elbo[best])) > _UNBOUNDED:
        because = f"the ELBO is {nats:.3g} nats: `log_prob` rises without bound, or contains a constant that uses up its digits"
        raise TargetError(cannot("fit this target", because, "Check the signs of `log_prob`, or subtract the constant"))
