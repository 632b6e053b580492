"""Refusals: errors for targets whose reverse KL is infinite at every start, or that can't be normalised."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot

_UNBOUNDED = 1e12
"""A width, the inverse of a width, or a number of nats that counts as infinite."""
_MIN_RESIDUAL = 0.1
"""Standard deviations. Smallest gradient of a model that still shrinks."""


def refuse_infinite(elbo: Float[Tensor, " b"]) -> None:
    """Refuse a target whose ELBO isn't finite at the end of any start.

    Raises:
        TargetError: it is such a target.
    """
    if bool(elbo.isfinite().any()):
        return
    because = (
        "`log_prob` is -inf inside the support of every start, so that reverse KL is infinite there, or it doesn't fall off and "
        "can't be normalised"
    )
    instead = "Pass `support=`, check the signs of `log_prob`, or use `forward_kl`, which needs draws of the target"
    raise TargetError(cannot("minimise `reverse_kl` here", because, instead))


def refuse_unbounded(elbo: float, spread: Float[Tensor, "k d"], names: Sequence[str], residual: float = 0.0) -> None:
    """Refuse a target whose best model is wider than 10¹² in a column, has an ELBO above 10¹² nats, or still shrinks below 10⁻¹².

    Args:
        elbo: the ELBO of the best model.
        spread: standard deviations of the columns, per component.
        names: names of the columns.
        residual: length of the gradient at the model; a model at rest may be arbitrarily narrow.

    Raises:
        TargetError: it is such a target; the message names the widest or the narrowest column.
    """
    if float(spread.max()) > _UNBOUNDED:
        name = names[int(spread.amax(0).argmax())]
        because = f"the model spreads without bound along {name}: the density doesn't fall off there"
        instead = "Check the signs of `log_prob`, or pass `support=`; a column that is wider than 1e12 needs other units"
        raise TargetError(cannot("fit this target", because, instead))
    if float(spread.min()) < 1 / _UNBOUNDED and residual > _MIN_RESIDUAL:
        name = names[int(spread.amin(0).argmin())]
        because = f"the model shrinks to a point along {name}: `log_prob` rises without bound there, so that ∫p may be infinite"
        instead = "Bound `log_prob` there, or keep x away from it with `support=`; an infinite mass has no divergence"
        raise TargetError(cannot("fit this target", because, instead))
    if elbo > _UNBOUNDED:
        because = f"the ELBO is {elbo:.3g} nats: `log_prob` rises without bound, or contains a constant that uses up its digits"
        raise TargetError(cannot("fit this target", because, "Check the signs of `log_prob`, or subtract the constant"))
