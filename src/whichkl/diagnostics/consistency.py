"""Consistency: whether the values of log p, its gradient and draws of p belong to one density.

A fit that follows a gradient doesn't see what the gradient doesn't explain, and draws of another density spoil every comparison.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.access import Access
from whichkl.targets import Target
from whichkl.targets.line_integral import clenshaw_curtis

MAX_LINES = 32
"""Largest number of lines between draws."""
_MIN_LINES = 4
"""Smallest number of lines inside the support on which a jump can be measured."""
_ORDER = 32
"""Order of the Clenshaw–Curtis rule on a line."""
_MAX_NUMBERS = 1 << 22
"""Largest number of coordinates of all points, where it allows `_MIN_LINES`."""
_MAX_POINTS_PER_CALL = 512
_HALVINGS = 8
_MIN_REST = 1e-3
"""Least difference, in nats, that halving a line must leave; a continuous steep change leaves less."""
_MIN_DIFFERENCE = 0.05
"""Least difference, in nats, by which a line counts."""
_MIN_JUMPING_LINES = 3
"""Smallest number of lines with a difference that isn't chance."""
_MAX_STEIN_DRAWS = 2_000
_MIN_STEIN_DRAWS = 30
_MIN_STANDARD_ERRORS = 6
_MIN_DEVIATION = 0.25
"""Least deviation from Stein's identity that counts; its terms are of size 1."""


def jumps(target: Target, x: Float[Tensor, "n d"]) -> float | None:
    """Return the change of log p between draws of a model that the integral of its gradient doesn't explain, in nats.

    log p(b) − log p(a) = ∫₀¹ ∇log p(a + t (b − a)) · (b − a) dt wherever log p is continuous. A `round()`, a threshold or a
    look-up in a table leaves a difference, and so does a gradient that isn't that of the values. Integrals use
    Clenshaw–Curtis on 33 points, and the differences are averaged over lines. A line counts as 0 if the rule of every second
    point differs by a tenth of the difference, which a kink or a wave explains. It also counts as 0 if halving it 8 times
    about the difference leaves less than 10⁻³ nats: log p was only steep. None if fewer than four lines lie inside the support.

    Args:
        target: p in unconstrained coordinates.
        x: draws of the model; the first half is joined to the second half by lines.

    Source: the gradient theorem; Clenshaw & Curtis (1960).

    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> jumps(Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=2), x)
    0.0
    """
    has_gradient = target.access & (Access.DIFFERENTIABLE | Access.SCORE)
    most = MAX_LINES if has_gradient else MAX_LINES // 2  # differences cost 2d calls per point
    count = min(most, len(x) // 2, max(_MIN_LINES, _MAX_NUMBERS // (x.shape[1] * (_ORDER + 1))))
    a, b = x[:count], x[count : 2 * count]
    off, known = _beyond(target, a, b, _MIN_DIFFERENCE)
    if int(known.sum()) < _MIN_LINES:
        return None
    lines = (off > 0).nonzero()[:, 0]
    a, b = a[lines], b[lines]
    for _ in range(_HALVINGS):
        if len(lines) < _MIN_JUMPING_LINES:
            return 0.0
        middle = (a + b) / 2
        left, right = (_beyond(target, *ends, _MIN_REST)[0] for ends in ((a, middle), (middle, b)))
        in_left = (left > right)[:, None]
        a, b = torch.where(in_left, a, middle), torch.where(in_left, middle, b)
        stays = torch.maximum(left, right) > 0
        off[lines[~stays]] = 0
        a, b, lines = a[stays], b[stays], lines[stays]
    return float(off[known].mean()) if len(lines) >= _MIN_JUMPING_LINES else 0.0


def _beyond(
    target: Target, a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], threshold: float
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Nats of change that the gradient doesn't explain, 0 where a kink would, and whether the line lies inside the support."""
    t, w = (part.to(a) for part in clenshaw_curtis(_ORDER))
    _, half = (part.to(a) for part in clenshaw_curtis(_ORDER // 2))
    points = a[:, None] + t[:, None] * (b - a)[:, None]
    parts = [target.trial(part) for part in points.reshape(-1, a.shape[1]).split(_MAX_POINTS_PER_CALL)]
    value, score = (torch.cat(one) for one in zip(*parts, strict=True))
    value, slope = value.reshape(len(a), -1), torch.einsum("nmd,nd->nm", score.reshape(points.shape), b - a)
    known = value.isfinite().all(-1)
    off = (value[:, -1] - value[:, 0] - slope @ w).abs()
    unsure = (slope @ w - slope[:, ::2] @ half).abs()
    return torch.where(known & (off >= threshold) & (off >= 10 * unsure), off, 0.0), known


def accesses_disagree(target: Target, seed: int) -> bool:
    """Return whether E_p[∇log p] = 0 or E_p[xᵢ ∂ᵢ log p] = −1 fails on p's own draws, by six standard errors and a quarter.

    Source: Stein (1972); as a check of samples, Gorham & Mackey (2015).
    """
    if target.bijection.is_discrete:
        return False
    free = target.unconstrained()
    if not (free.access.can_sample and free.access.can_evaluate):
        return False
    free = free.thinned()[0]
    x = free.samples if free.samples is not None else free.draws(_MAX_STEIN_DRAWS, seed + 3)
    if len(x) < _MIN_STEIN_DRAWS or target.weights is not None:
        return False
    x = x[torch.linspace(0, len(x) - 1, min(len(x), _MAX_STEIN_DRAWS), dtype=torch.float64, device="cpu").long()].to(
        torch.float64
    )
    value, score = free.trial(x)
    known = value.isfinite()
    if float(known.double().mean()) < 0.99:
        return True
    terms = stein_terms(x[known], score[known])
    off, stderr = terms.mean(0).abs(), terms.std(0) / math.sqrt(len(x))
    return bool(((off > _MIN_STANDARD_ERRORS * stderr) & (off > _MIN_DEVIATION)).any())


def stein_terms(x: Float[Tensor, "n d"], score: Float[Tensor, "n d"]) -> Float[Tensor, "n two_d"]:
    """Return s ∇log p and (x − c) ∇log p + 1, without units, per point and column: their means under p are 0."""
    centred = x - x.median(0).values
    scale = centred.square().mean(0).sqrt().clamp(min=1e-300)
    return torch.cat([score * scale, centred * score + 1], dim=1)
