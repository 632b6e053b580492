"""Richness: whether rows are too few to show how well a mixture does on others, by its losses on unseen and on fitted rows."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MixtureSameFamily

from whichkl.diagnostics.findings import MAX_KL

_MAX_SPREAD_RATIO = 4 / 3
"""Largest ratio of the standard deviation of −log q over unseen rows to that over fitted rows, where components overlap."""
_MAX_OPTIMISM = 2.5
"""Largest difference of both means of −log q, in k/n nats for k numbers of the model and n rows; up to `MAX_KL` nats any does."""
_MANY_ROWS_PER_NUMBER = 30
"""Rows per number of the model from which on a larger difference isn't for want of rows."""
_TOO_FEW = "too few rows for so rich a model"
_MIN_SHARE, _MAX_SHARED_ROWS = 0.95, 0.02
"""A row belongs to a component that has at least this share of its density; at most this part of the rows may belong to none."""


def doubt_of_rows(
    model: MixtureSameFamily,
    x: Float[Tensor, "n d"],
    unseen: Float[Tensor, " n"],
    fitted: Float[Tensor, " n"],
    rows_per_number: float,
    weights: Float[Tensor, " n"] | None = None,
) -> tuple[str, bool] | None:
    """Say why the mean −log q at unseen rows may not be the fit's, and whether the rows are too few for so rich a mixture.

    By theory unseen rows cost k/n nats more than fitted ones (Akaike, 1973). A multiple of that, or losses that vary more, too,
    show components that rest on few rows: a new row beyond these can cost tens of nats, though none of n rows did. Where rows
    are many, a multiple shows that a model of a part of them is another optimum. Components that share no rows are single laws,
    each fitted to rows of its own, whose losses vary more by theory.

    >>> two = MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), torch.distributions.Normal(torch.zeros(2), 1.0))
    >>> doubt_of_rows(two, torch.zeros(2), torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0]), 10.0)
    ('−log q varies 3 times as much over unseen rows as over fitted ones: too few rows for so rich a model', True)
    """
    (mean, spread), (fitted_mean, fitted_spread) = _moments(unseen, weights), _moments(fitted, weights)
    optimism = mean - fitted_mean
    if max(MAX_KL, _MAX_OPTIMISM / rows_per_number) < optimism < math.inf:
        times, are_few = optimism * rows_per_number, rows_per_number < _MANY_ROWS_PER_NUMBER
        found = f"unseen rows cost {optimism:.2g} nats more than fitted ones, {times:.2g} times what theory expects"
        other = "a model of a part of the rows is another optimum"
        return f"{found}: {_TOO_FEW if are_few else other}", are_few
    if _MAX_SPREAD_RATIO * fitted_spread < spread < math.inf and _overlap(model, x):
        found = f"−log q varies {spread / fitted_spread:.2g} times as much over unseen rows as over fitted ones"
        return f"{found}: {_TOO_FEW}", True
    return None


def _overlap(model: MixtureSameFamily, x: Float[Tensor, "n d"]) -> bool:
    """Whether rows lie between components, as where several components follow one curve."""
    parts, logits = model.component_distribution, model.mixture_distribution.logits
    shares = (parts.log_prob(x.to(logits)[:, None]) + logits).softmax(-1)
    return float((shares.amax(-1) < _MIN_SHARE).to(torch.float64).mean()) > _MAX_SHARED_ROWS


def _moments(loss: Float[Tensor, " n"], weights: Float[Tensor, " n"] | None) -> tuple[float, float]:
    """Return the mean and the standard deviation of a loss."""
    loss = loss.detach().to("cpu", torch.float64)
    w = torch.ones_like(loss) if weights is None else weights.to(loss)
    w = w / w.sum()
    mean = w @ loss
    return float(mean), math.sqrt(float(w @ (loss - mean).square()))
