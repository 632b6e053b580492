"""Refusals: targets to which reverse KL is infinite from every start, or that can't be normalised."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot

_UNBOUNDED, _OFF = 1e12, 0.1
"""Of a width, its inverse or nats; and how far from rest a model is that goes on shrinking, in standard deviations."""


def refuse_infinite(elbo: Float[Tensor, " b"]) -> None:
    """Refuse a target whose ELBO is finite at none of the ends of several starts.

    Raises:
        TargetError: as said.
    """
    if bool(elbo.isfinite().any()):
        return
    because = (
        "`log_prob` is -inf inside the support of every start, so that reverse KL is infinite there, or it doesn't fall off and "
        "can't be normalised"
    )
    instead = "Pass `support=`, check its signs, or use `forward_kl`, for which the target has to be drawn from"
    raise TargetError(cannot("minimise `reverse_kl` here", because, instead))


def refuse_unbounded(elbo: float, spread: Float[Tensor, "k d"], names: Sequence[str], residual: float = 0.0) -> None:
    """Refuse a target whose best model is wider than 10¹² in a column, or has an ELBO above 10¹² nats, or goes on shrinking.

    Args:
        elbo: of the best model.
        spread: standard deviations of the columns, of each of its components.
        names: of the columns.
        residual: how far the model is from rest; what lies at rest may be as narrow as it likes.

    Raises:
        TargetError: as said, with the name of the widest or the narrowest column.
    """
    if float(spread.max()) > _UNBOUNDED:
        name = names[int(spread.amax(0).argmax())]
        because = f"the model spreads without bound along {name}: the density doesn't fall off there"
        instead = "Check the signs of `log_prob`, or pass `support=`; a column that is wider than 1e12 wants other units"
        raise TargetError(cannot("fit this target", because, instead))
    if float(spread.min()) < 1 / _UNBOUNDED and residual > _OFF:
        name = names[int(spread.amin(0).argmin())]
        because = f"the model shrinks to a point along {name}: `log_prob` rises without bound there, so that ∫p may be infinite"
        instead = "Bound `log_prob` there, or bound x away from it with `support=`; of infinite mass there is no divergence"
        raise TargetError(cannot("fit this target", because, instead))
    if elbo > _UNBOUNDED:
        because = f"the ELBO is {elbo:.3g} nats: `log_prob` rises without bound, or has a constant that takes its digits"
        raise TargetError(cannot("fit this target", because, "Check the signs of `log_prob`, or subtract the constant"))
