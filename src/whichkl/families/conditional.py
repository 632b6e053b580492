"""Conditional: the families of y given x that take the values of y."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

_MAX_CLASSES = 20
"""Largest number of values that may be classes; more are counts."""


def conditional_families(y: Float[Tensor, "n d"]) -> tuple[str, tuple[str, ...]]:
    """Return what y holds in words, and the families of y given x that take it, the simplest first.

    Args:
        y: some or all rows of y.

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
    if most < _MAX_CLASSES and len(y.unique()) == most + 1:
        return f"whole numbers from 0 to {most:.0f}, which may be classes or counts", (*classes, *counts)
    return "whole numbers from 0", (*counts, "LinearGaussian()", "MixtureDensityNetwork()")


def _linear(response: str, flat: bool) -> tuple[str, ...]:
    """Generalized linear models take one column of y."""
    return (f'GeneralizedLinear("{response}")',) if flat else ()
