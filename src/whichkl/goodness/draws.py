"""Draws: rows of a model, conditional or not, and data rows of equal weight; or the reason why there are none."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.distributions import draws_of, log_prob_of_rows
from whichkl.importance import stays_by_weight
from whichkl.process.seeds import seeded


class Unable(Exception):
    """A check can't be made with this model or these rows; the text is the reason, in a few words."""


def equal_rows(
    x: Float[Tensor, "n d"], w: Float[Tensor, " n"] | None, context: Float[Tensor, "n c"] | None, most: int, seed: int
) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m c"] | None]:
    """Return at most this many rows of equal weight, in float64 on the CPU: a row of weight w is kept with chance w / max w.

    Raises:
        Unable: the rows and what they are conditioned on don't match, or a cell isn't finite.
    """
    x = x.detach().to("cpu", torch.float64)
    context = None if context is None else context.detach().to("cpu", torch.float64)
    if context is not None and len(context) != len(x):
        raise Unable(f"there are {len(x)} rows and {len(context)} contexts")
    if not all(bool(one.isfinite().all()) for one in (x, context) if one is not None):
        raise Unable("some rows aren't finite")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator, device="cpu")
    if w is not None:
        rows = rows[stays_by_weight(w, generator)[rows]]
    rows = rows[:most].sort().values
    return x[rows], None if context is None else context[rows]


def law_at(model: Any, context: Float[Tensor, "n c"]) -> Distribution:
    """Return the law of y at each row of the context, without gradients.

    Raises:
        Unable: the model raises, or returns something else.
    """
    try:
        with torch.no_grad():
            law = model(like(model, context))
    except Exception as error:
        raise Unable(f"the model raised {type(error).__name__}: {error}") from error
    if not isinstance(law, Distribution):
        raise Unable(f"the model returned a `{type(law).__name__}`, not a Distribution")
    return law.expand((len(context),)) if law.batch_shape == () else law


def drawn(law: Any, shape: tuple[int, ...], width: int, seed: int) -> Float[Tensor, "... d"]:
    """Draw from a law without touching the global generators: `(*shape, *batch, d)` in float64 on the CPU.

    Raises:
        Unable: it can't be sampled, or the draws have another width, or aren't finite.
    """
    if not callable(getattr(law, "sample", None)):
        raise Unable("the model has no `sample`")
    try:
        with seeded(seed), torch.no_grad():
            x = draws_of(law, torch.Size(shape))
    except Exception as error:
        raise Unable(f"drawing from the model raised {type(error).__name__}: {error}") from error
    x = x.detach().to("cpu", torch.float64)
    x = x if len(law.event_shape) else x[..., None]
    if x.shape[-1] != width:
        raise Unable(f"the model's draws have {x.shape[-1]} columns, and the rows have {width}")
    bad = int((~x.isfinite()).any(-1).sum())
    if bad:
        raise Unable(f"{bad:,} of {x[..., 0].numel():,} draws of the model aren't finite")
    return x


def log_density(law: Any, x: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
    """Log density of rows in float64 on the CPU, where NaN becomes −∞.

    Raises:
        Unable: the law has no density, or it raises.
    """
    try:
        with torch.no_grad():
            value = log_prob_of_rows(law, like(law, x[..., 0] if len(law.event_shape) == 0 else x))
    except Exception as error:
        raise Unable(f"the model's `log_prob` raised {type(error).__name__}: {error}") from error
    if tuple(value.shape) != tuple(x.shape[:-1]):
        raise Unable(f"the model's `log_prob` has shape {tuple(value.shape)} for rows of shape {tuple(x.shape)}")
    value = value.detach().to("cpu", torch.float64)
    known: Tensor = torch.where(value.isnan(), -torch.inf, value)
    return known


def like(model: Any, x: Tensor) -> Tensor:
    """Return x in the dtype and on the device in which a model computes, where its parameters determine these."""
    one = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else _parameter(model)
    return x if one is None else x.to(one.device, one.dtype)


def _parameter(law: Any) -> Tensor | None:
    """Return a floating parameter of a law, or of the laws that it consists of; properties, which may draw, aren't read."""
    held = list(vars(law).values()) if isinstance(law, Distribution) else []
    own = next((one for one in held if isinstance(one, Tensor) and one.is_floating_point()), None)
    return own if own is not None else next((found for one in held if (found := _parameter(one)) is not None), None)
