"""Jumps: whether log p changes along lines by what its gradient says; a fit that follows gradients is blind to the rest."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.access import Access
from whichkl.targets import Target
from whichkl.targets.line_integral import clenshaw_curtis

LINES, _ORDER = 32, 32
_ROOM = 1 << 22
"""Numbers in the points at most, but at least four lines."""
_CALL = 512
"""Points of one call."""
_HALVINGS, _LEFT = 8, 1e-3
_TOLD, _FEW = 0.05, 3
"""Nats, and lines, from which a difference counts."""


def jumps(target: Target, x: Float[Tensor, "n d"]) -> float | None:
    """Return by how many nats log p changes between draws of a model beyond the integral of its gradient: the mean over lines.

    log p(b) − log p(a) = ∫₀¹ ∇log p(a + t (b − a)) · (b − a) dt wherever log p is continuous. A `round()`, a threshold or a
    look-up in a table leaves a difference, and so does a gradient that isn't that of the values. Integrals are by
    Clenshaw–Curtis on 33 points. Where the rule of every second point differs by a tenth of the difference, a kink or a wave
    would explain it, and the line counts as 0; so does one where, halved 8 times about the difference, less than 10⁻³ nats are
    left, since it was only steep. None where fewer than four lines lie inside the support.

    Args:
        target: p in unconstrained coordinates.
        x: draws of the model, in pairs that are joined by lines.

    Source: the gradient theorem; Clenshaw & Curtis (1960).

    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> jumps(Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=2), x)
    0.0
    """
    most = LINES if target.access & (Access.DIFFERENTIABLE | Access.SCORE) else LINES // 2  # differences cost 2d calls a point
    count = min(most, len(x) // 2, max(4, _ROOM // (x.shape[1] * (_ORDER + 1))))
    a, b = x[:count], x[count : 2 * count]
    off, known = _beyond(target, a, b, _TOLD)
    if int(known.sum()) < 4:
        return None
    lines = (off > 0).nonzero()[:, 0]
    a, b = a[lines], b[lines]
    for _ in range(_HALVINGS):
        if len(lines) < _FEW:
            return 0.0
        middle = (a + b) / 2
        left, right = (_beyond(target, *ends, _LEFT)[0] for ends in ((a, middle), (middle, b)))
        in_left = (left > right)[:, None]
        a, b = torch.where(in_left, a, middle), torch.where(in_left, middle, b)
        stays = torch.maximum(left, right) > 0
        off[lines[~stays]] = 0
        a, b, lines = a[stays], b[stays], lines[stays]
    return float(off[known].mean()) if len(lines) >= _FEW else 0.0


def _beyond(
    target: Target, a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], told: float
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Nats of change that the gradient doesn't explain, 0 where a kink would, and whether the line lies inside the support."""
    t, w = (part.to(a) for part in clenshaw_curtis(_ORDER))
    _, half = (part.to(a) for part in clenshaw_curtis(_ORDER // 2))
    points = a[:, None] + t[:, None] * (b - a)[:, None]
    parts = [target.trial(part) for part in points.reshape(-1, a.shape[1]).split(_CALL)]
    value, score = (torch.cat(one) for one in zip(*parts, strict=True))
    value, slope = value.reshape(len(a), -1), torch.einsum("nmd,nd->nm", score.reshape(points.shape), b - a)
    known = value.isfinite().all(-1)
    off = (value[:, -1] - value[:, 0] - slope @ w).abs()
    unsure = (slope @ w - slope[:, ::2] @ half).abs()
    return torch.where(known & (off >= told) & (off >= 10 * unsure), off, 0.0), known
