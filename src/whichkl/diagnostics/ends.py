"""Ends: columns whose values all keep to one side of 0, or between 0 and 1, where the model doesn't."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl.process.seeds import seeded
from whichkl.targets import Target

_DRAWS = 2_000
_NOTED = 0.01
"""Mass beyond the end from which it's worth a note."""
_ROWS = 20
_SHOWN = 5


def beyond_the_ends(target: Target, model: Any, seed: int) -> tuple[str, ...]:
    """Say which columns look bounded, and how much of the model's mass lies beyond; nothing where `support=` was given.

    The support of p isn't guessed: a model is carried onto one only where it was named.
    """
    if target.samples is None or target.context is not None or not target.bijection.is_real or len(target.samples) < _ROWS:
        return ()
    if not isinstance(model, Distribution):
        return ()
    x = target.samples
    with seeded(seed), torch.no_grad():
        draws = model.sample((_DRAWS,)).reshape(_DRAWS, -1).to(x)
    return (
        *_said(target, (x > 0).all(0) & (x > 1).any(0), (draws <= 0).double().mean(0), "above 0", "positive"),
        *_said(
            target, ((x > 0) & (x < 1)).all(0), ((draws <= 0) | (draws >= 1)).double().mean(0), "between 0 and 1", "unit_interval"
        ),
    )


def _said(target: Target, bounded: Tensor, beyond: Tensor, where: str, support: str) -> tuple[str, ...]:
    columns = (bounded & (beyond > _NOTED)).nonzero().flatten().tolist()
    if not columns:
        return ()
    shown = ", ".join(f"`{target.names[i]}` ({float(beyond[i]):.0%})" for i in columns[:_SHOWN])
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return (f"every row lies {where} in {shown}{more}, with so much of the model beyond: support='{support}' keeps it inside",)
