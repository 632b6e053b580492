"""Ends: columns whose values are all above 0, or between 0 and 1, while the model's draws aren't."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl.process.seeds import seeded
from whichkl.targets import Target

_DRAWS = 2_000
_MIN_MASS = 0.01
"""Least mass of the model beyond an end that is noted."""
_MIN_ROWS = 20
_MAX_NAMED_COLUMNS = 5


def beyond_the_ends(target: Target, model: Any, seed: int) -> tuple[str, ...]:
    """Name the columns that look bounded, with the model's mass beyond the end; none if `support=` was given.

    The support of p isn't guessed: a model is carried onto a support only if it was given.
    """
    if target.samples is None or target.context is not None or not target.bijection.is_real or len(target.samples) < _MIN_ROWS:
        return ()
    if not isinstance(model, Distribution):
        return ()
    x = target.samples
    with seeded(seed), torch.no_grad():
        draws = model.sample((_DRAWS,)).reshape(_DRAWS, -1).to(x)
    return (
        *_noted(target, (x > 0).all(0) & (x > 1).any(0), (draws <= 0).double().mean(0), "above 0", "positive"),
        *_noted(
            target, ((x > 0) & (x < 1)).all(0), ((draws <= 0) | (draws >= 1)).double().mean(0), "between 0 and 1", "unit_interval"
        ),
    )


def _noted(target: Target, bounded: Tensor, beyond: Tensor, where: str, support: str) -> tuple[str, ...]:
    columns = (bounded & (beyond > _MIN_MASS)).nonzero().flatten().tolist()
    if not columns:
        return ()
    shown = ", ".join(f"`{target.names[i]}` ({float(beyond[i]):.0%})" for i in columns[:_MAX_NAMED_COLUMNS])
    more = f" and {len(columns) - _MAX_NAMED_COLUMNS} more" if len(columns) > _MAX_NAMED_COLUMNS else ""
    return (f"every row lies {where} in {shown}{more}, with this share of the model beyond: support='{support}' keeps it inside",)
