"""Conditional: which families of y given x take the values that y has."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

_MOST_CODES = 20


def conditional_families(y: Float[Tensor, "n d"]) -> tuple[str, tuple[str, ...]]:
    """Say what y holds, and write the families of y given x that take it, the simplest first.

    Args:
        y: rows of y, some or all of them.

    >>> import torch
    >>> conditional_families(torch.tensor([[0.0], [1.0], [1.0]]))[1][0]
    'GeneralizedLinear("bernoulli")'
    """
    least, most = float(y.min()), float(y.max())
    if bool((y != y.round()).any()) or least < 0 or least == most:
        return "real numbers", ("LinearGaussian()", "MixtureDensityNetwork()", 'Neural("normal")', "Flow()")
    flat = y.shape[1] == 1
    if most == 1:
        return "0 and 1", (*_linear("bernoulli", flat), 'Neural("bernoulli")', "Autoregressive()")
    counts = (*_linear("poisson", flat), 'Neural("poisson")')
    classes = (*_linear("categorical", flat), 'Neural("categorical")')
    if most < _MOST_CODES and len(y.unique()) == most + 1:
        return f"whole numbers from 0 to {most:.0f}, which may be classes or counts", (*classes, *counts)
    return "whole numbers from 0", (*counts, "LinearGaussian()", "MixtureDensityNetwork()")


def _linear(response: str, flat: bool) -> tuple[str, ...]:
    """Generalized linear models take one column of y."""
    return (f'GeneralizedLinear("{response}")',) if flat else ()
