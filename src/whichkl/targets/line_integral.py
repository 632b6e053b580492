"""LineIntegral: a log density up to a constant, computed from its score."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot

_MIN_ORDER = 8
_MAX_ORDER = 32
_MAX_HALVINGS = 12
_TOLERANCE = 1e-8
_MAX_TRIANGLES = 16
_MAX_RELATIVE_GAP = 0.02
"""Largest integral round a triangle, relative to its sides, of a score that is accepted."""
_MAX_GAP = 0.05
"""Largest integral round a triangle, in nats, that isn't reported."""


class LineIntegral:
    """log p(x) − log p(a) = ∫₀¹ ∇log p(a + t (x − a)) · (x − a) dt.

    Clenshaw–Curtis with 9 scores per point, and with 17 or 33 where the rule on every second score differs. Then the line is
    halved until the rules agree, so that kinks and far points cost more but lose no digits. The whole line must lie in the
    support.

    The first points are also joined to triangles with a. The integral round a triangle is 0 if the score is a gradient; `gap` is
    the largest such integral, in nats.

    Args:
        score: g(x), (n, d) → (n, d).
        anchor: (1, d), the point a, inside the support.
        count: called with the number of scores that are evaluated.

    Source: the gradient theorem; Clenshaw & Curtis (1960).

    >>> value = LineIntegral(lambda x: -x, torch.zeros(1, 2, dtype=torch.float64), lambda n: None)
    >>> value(torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64))
    tensor([-12.5000,  -0.5000], dtype=torch.float64)
    """

    def __init__(self, score: Callable[[Tensor], Tensor], anchor: Float[Tensor, "1 d"], count: Callable[[int], None]) -> None:
        self.score, self.anchor, self.count = score, anchor, count
        self.gap: float | None = None

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log p(x) − log p(a), in nats."""
        value = self._along(self.anchor.to(x).expand_as(x), x, _MAX_HALVINGS)
        if self.gap is None and len(x) > 2:
            self._check_closed(x, value)
        return value

    def _along(
        self, start: Float[Tensor, "n d"], end: Float[Tensor, "n d"], halvings: int, known: Float[Tensor, "n m"] | None = None
    ) -> Float[Tensor, " n"]:
        """Integrate along each line; where two rules disagree, use twice as many points, then halve the line.

        Args:
            start: where the lines start.
            end: where they end.
            halvings: how often they may still be halved.
            known: the slopes at the points of the previous rule, which are every second point of this rule.
        """
        order = _MIN_ORDER if known is None else 2 * (known.shape[1] - 1)
        t, weights = (part.to(end) for part in clenshaw_curtis(order))
        slope = end.new_empty(len(end), order + 1)
        if known is None:
            slope = self._slopes(start, end, t)
        else:
            slope[:, ::2], slope[:, 1::2] = known, self._slopes(start, end, t[1::2])
        value = slope @ weights
        off = (value - slope[:, ::2] @ clenshaw_curtis(order // 2)[1].to(end)).abs()
        again = ((off > _TOLERANCE * (1 + value.abs())) & value.isfinite()).nonzero()[:, 0]
        if not len(again):
            return value
        start, end = start[again], end[again]
        if order < _MAX_ORDER:
            better = self._along(start, end, halvings, slope[again])
        elif halvings:
            middle = (start + end) / 2
            better = self._along(torch.cat([start, middle]), torch.cat([middle, end]), halvings - 1).reshape(2, -1).sum(0)
        else:
            return value
        return value.index_put((again,), better)

    def _slopes(self, start: Float[Tensor, "n d"], end: Float[Tensor, "n d"], t: Float[Tensor, " m"]) -> Float[Tensor, "n m"]:
        """∇log p · (end − start) at the points t of each line."""
        way = end - start
        points = start[:, None] + t[:, None] * way[:, None]
        self.count(points.shape[0] * points.shape[1])
        return torch.einsum("nmd,nd->nm", self.score(points.reshape(-1, way.shape[1])).reshape(points.shape), way)

    def _check_closed(self, x: Float[Tensor, "n d"], value: Float[Tensor, " n"]) -> None:
        """Integrate round triangles of the anchor and two points."""
        known = value.isfinite().nonzero()[:, 0]
        if len(known) < 3:
            return
        picked = known[
            torch.linspace(0, len(known) - 1, min(len(known), _MAX_TRIANGLES + 1), dtype=torch.float32, device="cpu").long()
        ]
        a, b = picked[:-1], picked[1:]
        between = self._along(x[a], x[b], _MAX_HALVINGS)
        loop = (value[a] + between - value[b]).abs()
        size = value[a].abs() + between.abs() + value[b].abs()
        ok = loop.isfinite()
        if not bool(ok.any()):
            return
        self.gap = float(loop[ok].max())
        wrong = loop > _MAX_RELATIVE_GAP * size + 1e-3
        if 2 * int((wrong & ok).sum()) > int(ok.sum()):
            worst = int(torch.where(ok, loop, -1.0).argmax())
            because = (
                f"it is the gradient of no log density: round a triangle whose sides give up to {float(size[worst]):.3g} nats it "
                f"integrates to {float(loop[worst]):.3g}, not 0"
            )
            instead = "Check its signs and coordinates, or pass `log_prob=`, whose gradient it is"
            raise TargetError(cannot("use this `score`", because, instead))

    @property
    def is_open(self) -> bool:
        """Whether values depend on the path by more than a twentieth of a nat."""
        return self.gap is not None and self.gap > _MAX_GAP


@cache
def clenshaw_curtis(order: int) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Return the order + 1 points and weights of the rule on [0, 1], for an even order.

    Every second point is one of the rule of half the order.

    >>> t, w = clenshaw_curtis(8)
    >>> round(float(w @ t.square()), 12)
    0.333333333333
    """
    k = torch.arange(order + 1, dtype=torch.float64, device="cpu")
    j = torch.arange(1, order // 2 + 1, dtype=torch.float64, device="cpu")
    b = 2 - (j == order // 2).to(j.dtype)
    inner = (b / (4 * j.square() - 1) * torch.cos(2 * math.pi * k[:, None] * j / order)).sum(1)
    ends = 2 - ((k == 0) | (k == order)).to(k.dtype)
    return (1 - torch.cos(math.pi * k / order)) / 2, ends / order * (1 - inner) / 2
