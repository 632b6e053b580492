"""Refusals: targets to which reverse KL is infinite from every start, or that can't be normalised."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot

_UNBOUNDED = 1e12


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


def refuse_unbounded(elbo: float, spread: Float[Tensor, " d"], names: Sequence[str]) -> None:
    """Refuse a target whose best model is wider than 10¹² in a column, or has an ELBO above 10¹² nats.

    Raises:
        TargetError: as said, with the name of the widest column.
    """
    if float(spread.max()) > _UNBOUNDED:
        because = f"the model spreads without bound along {names[int(spread.argmax())]}: the density doesn't fall off there"
        instead = "Check the signs of `log_prob`, or pass `support=`; a column that is wider than 1e12 wants other units"
        raise TargetError(cannot("fit this target", because, instead))
    if elbo > _UNBOUNDED:
        because = f"the ELBO is {elbo:.3g} nats: `log_prob` rises without bound, or has a constant that takes its digits"
        raise TargetError(cannot("fit this target", because, "Check the signs of `log_prob`, or subtract the constant"))
