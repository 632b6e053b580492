"""Regions: descriptions of where one density has mass and the other has none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def intervals(x: Float[Tensor, " n"], missed: Float[Tensor, " n"], ends: Sequence[float]) -> str:
    """The runs of points with missed mass on the line, as intervals that end at a support's end, or at a point.

    >>> intervals(torch.linspace(0, 2, 9), torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, 1]), [1.1])
    '1.1 < x'
    """
    order = torch.argsort(x)
    here, runs = x[order], (missed[order] > 0).to(torch.int8)
    zero = torch.zeros(1, dtype=torch.int8, device="cpu")
    change = torch.diff(torch.cat([zero, runs, zero]))
    starts, stops = (change == 1).nonzero().flatten().tolist(), (change == -1).nonzero().flatten().tolist()
    digits = 3 - math.floor(math.log10(float(here.quantile(0.9) - here.quantile(0.1)) + 1e-300))
    parts = []

    def edge(below: int, above: int, near: int) -> str:
        """The support's end between two neighbouring points, or the point itself."""
        between = [e for e in ends if float(here[below]) <= e <= float(here[above])]
        return f"{round(between[0] if between else float(here[near]), digits) + 0.0:g}"

    for start, end in list(zip(starts, stops, strict=True))[:4]:
        low = f"{edge(start - 1, start, start)} < " if start > 0 else ""
        high = f" < {edge(end - 1, end, end - 1)}" if end < len(here) else ""
        parts.append(f"{low}x{high}" if low or high else "every x")
    return " and ".join(parts) + (" and elsewhere" if len(starts) > 4 else "")


def outside(missed: Float[Tensor, " n"], log_p: Float[Tensor, " n"], log_q: Float[Tensor, " n"]) -> str:
    """Describe whose mass is missed, as the end of "0.1 of the mass of …".

    >>> outside(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, -math.inf]))
    'p lies outside the support of q'
    """
    of_p, of_q = (bool(((missed > 0) & (there == -math.inf)).any()) for there in (log_q, log_p))
    one, other = {(True, False): ("p", "q"), (False, True): ("q", "p")}.get((of_p, of_q), ("each", "the other"))
    return f"{one} lies outside the support of {other}"


def ranges(
    draws: Float[Tensor, "n d"], missed: Float[Tensor, " n"], names: Sequence[str], ends: Sequence[Sequence[float]] = ()
) -> str:
    """The sides of supports' ends that the other density misses, or else the ranges of missed draws; nothing if there are none.

    >>> draws, missed = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 4.0]]), torch.tensor([0.0, 1, 1])
    >>> ranges(draws, missed, ["x1", "x2"])
    '1 ≤ x1 ≤ 2, 3 ≤ x2 ≤ 4'
    >>> ranges(draws, missed, ["x1", "x2"], [[], [0.5]])
    'x2 > 0.5'
    """
    inside, reached = draws[missed > 0], draws[missed == 0]
    if len(inside) == 0:
        return ""
    beyond, parts = torch.zeros(len(inside), dtype=torch.bool, device="cpu"), []
    for j, places in enumerate(ends):
        for end in places:
            for sign, word in ((-1, "<"), (1, ">")):
                over = sign * (inside[:, j] - end) > 0
                if bool(over.any()) and not bool((sign * (reached[:, j] - end) > 0).any()):
                    parts.append(f"{names[j]} {word} {end:g}")
                    beyond |= over
    if bool(beyond.all()):
        return " or ".join(parts)
    low, high = inside.amin(0).tolist(), inside.amax(0).tolist()
    return ", ".join(f"{a:.3g} ≤ {name} ≤ {b:.3g}" for a, b, name in zip(low, high, names, strict=True))
