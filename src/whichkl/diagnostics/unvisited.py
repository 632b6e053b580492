"""Unvisited: modes of the log density where samples of p would lie, and hardly any do, as those of a chain that got stuck."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.importance import effective_sample_size
from whichkl.process.seeds import seeded
from whichkl.solvers.ascents import ascend
from whichkl.solvers.particles.lost_modes import Mode, modes_at
from whichkl.targets import Target

_MAX_DIM = 200
_MAX_ROWS, _MIN_ROWS = 10_000, 30
_STARTS, _OWN_STARTS = 32, 4
"""Number of ascents from Gaussians around the samples, and from draws of the model and from samples, each."""
_MIN_WIDTH, _MAX_WIDTH = 3.0, 20.0
"""Standard deviations of these Gaussians, in those of the samples; the last is that of the search for missing modes."""
_MAX_CALLS, _PATIENCE, _MAX_DECREMENT = 40, 2.0, 0.01
_MAX_MODES, _DRAWS_PER_MODE = 8, 64
_MAX_EVALUATIONS = 3_000
"""Evaluations of a budget that must be left; the search usually takes a few hundred."""
_MIN_SHARE = 0.01
"""Least share of p's mass at a mode that counts as unvisited."""
_MAX_VISITED = 0.1
"""Largest number of samples there, as a share of those that would be there."""
_MAX_CHANCE = 1e-6
"""Largest chance of so few samples."""
_MAX_ERROR = 0.25
"""Largest relative standard error of a mode's mass."""


def unvisited_modes(target: Target, draws: Float[Tensor, "n d"] | None, seed: int) -> tuple[Float[Tensor, "k d"], str]:
    """Return modes of the log density that the target's samples don't reach, in its coordinates, and the heaviest in words.

    Ascents from Gaussians of 3 to 20 times the samples' width, from the samples and from draws of the model end at modes. The
    integrals of p̃ over two modes' ellipsoids have the ratio of the numbers of samples in them. A mode is unvisited if this ratio
    to the mode with most samples makes it worth 1 % of p, and at most a tenth of the samples that it should hold are there, which
    has a chance of at most 10⁻⁶ (Poisson).

    Args:
        target: a target with samples and a log density.
        draws: draws of a model, in free coordinates, or None.
        seed: fixes the starts.
    """
    nowhere = torch.zeros(0, target.dim, dtype=torch.float64, device="cpu"), ""
    if (
        target.bijection.is_discrete
        or target.dim > _MAX_DIM
        or target.evaluations.most - target.evaluations.total < _MAX_EVALUATIONS
    ):
        return nowhere
    free = target.unconstrained()
    if not (free.access.can_sample and free.access.can_evaluate):
        return nowhere
    x, w, count = _rows(free, seed)
    if count < _MIN_ROWS:
        return nowhere
    mean, scale = w @ x, (w @ (x - w @ x).square()).sqrt().clamp(min=1e-300)

    def density(y: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        value, score = free.trial((mean + scale * y).to(free.device))
        return value.to("cpu", torch.float64), score.to("cpu", torch.float64) * scale

    y = (x - mean) / scale
    rejected = free.evaluations["rejected"]
    with seeded(seed + 14):
        width = torch.logspace(math.log10(_MIN_WIDTH), math.log10(_MAX_WIDTH), _STARTS, dtype=torch.float64, device="cpu")
        around = width[:, None] * torch.randn(_STARTS, target.dim, dtype=torch.float64, device="cpu")
        of_q = y[:0] if draws is None else (draws[:_OWN_STARTS].to("cpu", torch.float64) - mean) / scale
        starts = torch.cat([around, of_q, y[torch.randint(len(y), (_OWN_STARTS,), device="cpu")]])
        ends = ascend(lambda at, _: density(at), starts, tolerance=_MAX_DECREMENT, max_calls=_MAX_CALLS, patience=_PATIENCE)
        modes = modes_at(density, ends, _MAX_DECREMENT, y, w, most=_MAX_MODES, draws=_DRAWS_PER_MODE)
        found = [(mode, met) for mode, met in modes if mode.log_mass > -math.inf and mode.error < _MAX_ERROR]
    free.evaluations["rejected"] = rejected  # the starts lie far from p, where a density that fails does no harm
    missed = _unvisited(found, count)
    if not missed:
        return nowhere
    tops = target.bijection.forward((mean + scale * torch.stack([mode.top for mode, *_ in missed])).to(target.device))
    where = ", ".join(f"{name} = {value:.3g}" for name, value in list(zip(target.names, tops[0].tolist(), strict=False))[:4])
    _, wanted, met = missed[0]
    words = (
        f"the log density has a mode at {where}, where about {wanted:,.0f} of {count:,.0f} samples would lie, and {met:,.0f} do"
    )
    return tops, words


def _unvisited(found: list[tuple[Mode, float]], count: float) -> list[tuple[Mode, float, float]]:
    """Return modes with too few samples, heaviest first, each with the number that would be there and that of those that are."""
    known, most = max(found, key=lambda one: one[1], default=(None, 0.0))
    if known is None or most == 0:
        return []
    missed = []
    for mode, met in found:
        share = most * math.exp(min(700.0, mode.log_mass - known.log_mass))
        share /= 1 + max(0.0, share - met)  # of all of p, the samples' part and this
        wanted, there = share * count, met * count
        chance = float(torch.special.gammaincc(*torch.tensor([there + 1.0, wanted], dtype=torch.float64, device="cpu")))
        if share > _MIN_SHARE and there <= _MAX_VISITED * wanted and chance <= _MAX_CHANCE:
            missed.append((mode, wanted, there))
    return sorted(missed, key=lambda one: -one[1])


def _rows(free: Target, seed: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"], float]:
    """Return at most 10,000 samples, their weights, and how many independent ones they are worth."""
    p = free.thinned()[0]
    x = p.draws(_MAX_ROWS // 5, seed + 15) if p.samples is None else p.samples
    w = torch.ones_like(x[:, 0]) if p.weights is None else p.weights
    if len(x) > _MAX_ROWS:
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu")[:_MAX_ROWS].to(x.device)
        x, w = x[rows], w[rows]
    x, w = x.to("cpu", torch.float64), w.to("cpu", torch.float64)
    return x, w / w.sum(), min(effective_sample_size(w.log()), float(len(x.unique(dim=0))))
