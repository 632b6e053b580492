"""Integrals: the projection of a density of one to three variables, by quadrature that follows the projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.conversions.attainable import tails_too_heavy
from whichkl.conversions.projection import Dual, Projection
from whichkl.divergences.exact.boxes import SHARES, adapt
from whichkl.divergences.exact.charts import Chart
from whichkl.divergences.exact.located import BUDGET, TOLERANCE, Located
from whichkl.targets import Target

_MAX_ROUNDS = 30
_MAX_CHANGE = 1e-6
"""Largest last change of λ, in the inverse of a standard deviation of f, at which it counts as known."""
_DRAWS = 4096
"""Nodes that are drawn by their weights to place the next boxes."""


def project_density(r: Target, dual: Callable[[Float[Tensor, "n d"]], Dual]) -> tuple[Projection, float]:
    """Return the projection of a density r, and the log of its integral.

    Expectations under q ∝ r exp(λ·f) are sums over the nodes of an adaptive Gauss–Kronrod rule. The rule is built for q at the
    last λ, λ is found on its nodes, and so on until λ settles.

    Args:
        r: a target with a log density of up to three variables.
        dual: f at points, with the values of its moments.

    Raises:
        TargetError: no distribution has these moments, or q's integral isn't finite.
    """
    located, generator = Located.of(r), torch.Generator().manual_seed(0)
    sets, chart, settled = located.sets, located.chart, 10 * TOLERANCE[r.dim]
    found: Projection | None = None
    way, change = 0.0, math.inf
    for _ in range(_MAX_ROUNDS):
        x, volume = _rule(r, dual, found, sets, chart, located.shift)
        x, volume = x[volume > 0], volume[volume > 0]
        log_r = r.log_prob(x).detach().to("cpu", torch.float64) + volume.log()
        at, before = dual(x), found
        if before is None:
            origin = torch.softmax(log_r, 0) @ at.f
        way, found = _step(at, log_r, origin, way, before)
        if before is not None and way == 1:
            change = float(((found.multipliers - before.multipliers) * at.spread(log_r)).abs().max())
        if change <= settled:
            break
        rows = torch.multinomial(found.log_weights.exp(), _DRAWS, replacement=True, generator=generator)
        sets = [located.draws, x[rows]]
        chart = Chart.fitting(sets, located.bounds)
    if found is None or change > _MAX_CHANGE:
        raise tails_too_heavy()
    return found, float(torch.logsumexp(log_r, 0))


def _step(
    at: Dual, log_r: Float[Tensor, " n"], origin: Float[Tensor, " k"], way: float, before: Projection | None
) -> tuple[float, Projection]:
    """Project as far from the reference's own moments to the wanted ones as these nodes reach; return how far that is, and q."""
    start = None if before is None else before.multipliers
    for share in (1.0, 0.9, 0.5, 0.25, 0.1):
        goal = way + share * (1 - way)
        found = replace(at, values=origin + goal * (at.values - origin)).attempt(log_r, start)
        if isinstance(found, Projection):
            return goal, found
    return 1.0, at.project(log_r, start)


def _rule(
    r: Target,
    dual: Callable[[Tensor], Dual],
    found: Projection | None,
    sets: list[Tensor],
    chart: Chart,
    shift: float,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Return nodes and weights that integrate r exp(λ·f) and its products with f."""
    largest = list[float]()

    def integrand(x: Float[Tensor, "n d"]) -> Float[Tensor, "k n"]:
        at = dual(x)
        logs = r.log_prob(x).detach().to("cpu", torch.float64) - shift
        if found is not None:
            logs = torch.where(logs > -math.inf, logs + (at.f - at.values) @ found.multipliers, -math.inf)
            largest.append(float(logs.max()))  # the first boxes reach everywhere
            logs = logs - largest[0]
        density = logs.exp()
        f = torch.where(density > 0, (at.f - at.values).T, 0.0)
        return torch.cat([density[None], density * f])

    boxes = chart.boxes(sets, [[]] * r.dim, SHARES[0])
    whole = adapt(integrand, chart, boxes, 0.0, TOLERANCE[r.dim], BUDGET[r.dim])
    if not bool(whole.value.isfinite().all()) or (found is not None and not float(whole.error[0]) < 1e-3 * float(whole.value[0])):
        raise tails_too_heavy()
    return whole.rule(chart)
