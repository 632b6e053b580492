"""Tails: whether an integral over one to three variables diverges far out or at the ends of the domain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError
from whichkl.divergences.exact.charts import contrast

_LINES_PER_APPROACH = 8
_STEP_IN_OCTAVES = 0.25
REACHES = (100, 40, 15)


@dataclass(frozen=True)
class _Approach:
    """A bundle of lines that go to an end: which coordinates (of a basis) move, and which way."""

    place: str
    basis: Float[Tensor, "d d"]
    moves: tuple[tuple[int, float, float], ...]
    """(coordinate, sign, end) each; an infinite end is approached in steps of the basis."""

    def points(
        self, starts: Float[Tensor, "m d"], paces: Float[Tensor, "m d"], power: Float[Tensor, " s"]
    ) -> tuple[Tensor, Tensor]:
        """Points (m, s, d) along the lines, and the log of the volume per step of log distance, (m, s)."""
        x = starts[:, None].expand(-1, len(power), -1).clone()
        log_volume = torch.zeros(len(starts), len(power), dtype=torch.float64, device="cpu")
        for j, sign, end in self.moves:
            pace = paces[:, j, None]
            if math.isfinite(end):
                x[..., j] = end - sign * pace * self.basis[j, j] * 2.0**-power
                log_volume = log_volume - power * math.log(2)
            else:
                x = x + sign * pace[..., None] * 2.0 ** power[:, None] * self.basis[:, j]
                log_volume = log_volume + power * math.log(2)
        return x, log_volume


def diverges(
    log_size: Callable[[Tensor], Tensor],
    bounds: Sequence[tuple[float, float]],
    draws: Sequence[Float[Tensor, "n d"]],
    names: Sequence[str],
    reaches: Sequence[int] = REACHES,
    shown: Sequence[tuple[float, float]] | None = None,
) -> str | None:
    """Describe where ∫|h| diverges; None where no divergence is seen.

    Along bundles of lines that leave the draws towards an end, in every set of coordinates, on all of ℝᵈ also in the
    directions in which one set of draws is widest compared with the other: the integral diverges if |h| times the volume doesn't
    fall as the distance is doubled, up to 2¹⁰⁰ widths. That is sufficient, and on the line also necessary
    up to slowly varying factors.

    The description names the ends `shown` instead of `bounds`. `log_size` is log|h|; the lines start at draws of each density;
    of the numbers of octaves in `reaches` the first is taken at which the function doesn't fail.
    """
    dim, found = len(bounds), []
    each = _LINES_PER_APPROACH // 2
    starts = torch.cat([one[:: max(1, len(one) // each)][:each] for one in draws])
    # Lines of different directions: an integrand can vanish along one line and diverge along the others.
    paces = torch.rand(len(starts), dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu") / 2 + 0.5
    if dim == 1:  # one line is enough for an end of the line
        starts, paces = starts[:1], torch.ones_like(paces[:1])
    # One line of eight may follow a ridge of no volume; two hardly do.
    needed = 1 if dim == 1 else 2
    for approach in _approaches(bounds, draws, names, shown or bounds):
        for reach in reaches:
            # The first eight widths belong to the bulk, where the integrand may well rise.
            power = torch.arange(3, reach, _STEP_IN_OCTAVES, dtype=torch.float64, device="cpu")
            x, log_volume = approach.points(starts, paces, power)
            try:
                size = log_size(x.reshape(-1, dim)).reshape(log_volume.shape) + log_volume
            except TargetError:  # overflow inside the user's function: try fewer octaves
                continue
            known = x.isfinite().all(-1) & ~size.isnan()
            for j, _, end in approach.moves:
                # Nearer than float64 resolves, a point is the end itself, where a density means nothing.
                known &= x[..., j] != end
            if sum(_grows(line[ok]) for line, ok in zip(size, known, strict=True)) >= needed:
                if dim > 1:
                    return approach.place
                found.append(approach.place)
            break
    return " and ".join(found) or None


def _grows(size: Float[Tensor, " s"]) -> bool:
    """Whether the last two octaves before an overflow, or the last of all, don't fall; what precedes the support is skipped."""
    known = size.isfinite().nonzero()
    if len(known) == 0:
        return False
    size = size[int(known[0]) :]
    overflow = (~size.isfinite()).nonzero()
    # Nine points are two octaves, in steps of a quarter.
    last = size[: int(overflow[0]) if len(overflow) else len(size)][-9:]
    # log(|h| · volume) that doesn't fall per octave: every octave adds as much again.
    return len(last) == 9 and bool((last.diff() >= -1e-6).all())


def _approaches(
    bounds: Sequence[tuple[float, float]], draws: Sequence[Tensor], names: Sequence[str], shown: Sequence[tuple[float, float]]
) -> list[_Approach]:
    dim = len(bounds)
    pooled = torch.cat(list(draws))
    spread = pooled.quantile(torch.tensor([0.1, 0.9], dtype=pooled.dtype, device="cpu"), 0)
    width = torch.where(spread[1] > spread[0], spread[1] - spread[0], torch.ones(dim, dtype=pooled.dtype, device="cpu"))
    found = []
    for moving in (sorted(one) for size in range(1, dim + 1) for one in itertools.combinations(range(dim), size)):
        for sides in itertools.product((0, 1), repeat=len(moving)):
            moves = tuple((j, 2.0 * side - 1.0, bounds[j][side]) for j, side in zip(moving, sides, strict=True))
            seen = tuple((j, sign if shown[j][0] < shown[j][1] else -sign, shown[j][sign > 0]) for j, sign, _ in moves)
            found.append(_Approach(_place(seen, names), torch.diag(width), moves))
    if dim > 1 and all(math.isinf(end) for ends in shown for end in ends):
        basis = contrast(draws)
        for j, sign in itertools.product(range(dim), (-1.0, 1.0)):
            towards = ", ".join(f"{sign * v:.2g}" for v in basis[:, j] / basis[:, j].norm())
            found.append(_Approach(f"far out in the direction ({towards})", basis, ((j, sign, math.inf),)))
    return found


def _place(moves: Sequence[tuple[int, float, float]], names: Sequence[str]) -> str:
    if len(names) == 1:
        end = moves[0][2]
        return f"as x → {end:g}" if math.isfinite(end) else f"in the {'left' if moves[0][1] < 0 else 'right'} tail"
    return "as " + ", ".join(f"{names[j]} → {end:g}".replace("inf", "∞").replace("-", "−") for j, _, end in moves)
