"""Search: the divergence, parameter and temperature that leave least of what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import scipy
import torch
from torch import Tensor

from whichkl._checks import InputError
from whichkl.distillation.losses import DIVERGENCES, RowDivergence, divergence_named
from whichkl.divergences.kinds import parameters_of

TOLERANCE = 1e-4
"""Largest share of the norm that may be left over: above single precision's rounding, far below any other divergence."""
TOLERANCE_OF_NARROW = 0.05
"""The same for a loss that rounds to bfloat16 inside."""

RANGES = {
    "weight_on_forward": (0.0, 1.0, False),
    "weight": (1e-3, 1 - 1e-3, False),
    "order": (0.02, 20.0, True),
    "head_mass": (0.02, 0.98, False),
    "weight_on_teacher": (0.01, 1.0, False),
}
"""Ranges of the parameters: lowest, highest, and whether the search is by logarithm."""


@dataclass(frozen=True)
class Identified:
    """What a loss was found to be.

    Attributes:
        name: of a divergence in `DIVERGENCES`, "cross_entropy", "labels only" (a cross-entropy with the labels, nothing of the
            teacher), or "something else".
        parameters: of that divergence, as fitted.
        temperature: that divides both logits.
        weight: what multiplies the divergence, summed or averaged over tokens; None before the reduction is known.
        reduction: how tokens are put together.
        hard_labels: weight of a cross-entropy with the labels that is added to it.
        note: further remarks.
    """

    name: str
    parameters: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    weight: float | None = None
    reduction: str = ""
    hard_labels: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        if self.name == "labels only":
            return f"{self.hard_labels:.4g} × cross-entropy with the labels, and nothing of the teacher"
        said = [] if self.weight is None or abs(self.weight - 1) < 1e-3 else [f"{self.weight:.4g} ×"]
        said.append(self.name)
        if self.parameters:
            said.append("(" + ", ".join(f"{key}={value:.4g}" for key, value in self.parameters.items()) + ")")
        if abs(self.temperature - 1) > 1e-3:
            said.append(f"at temperature {self.temperature:.4g}")
        if self.hard_labels:
            said.append(f"+ {self.hard_labels:.4g} × cross-entropy with the labels")
        text = " ".join(said) + (f", {self.reduction}" if self.reduction else "")
        return text + (f": {self.note}" if self.note else "")


@dataclass(frozen=True)
class Match:
    """A divergence at a temperature, whose multiple (plus one of the labels' cross-entropy) is what was seen."""

    divergence: RowDivergence
    temperature: float
    factor: float
    on_labels: float
    left: float

    @property
    def identified(self) -> Identified:
        """What this is, without the factor."""
        parameters = {name: float(getattr(self.divergence, name)) for name in parameters_of(self.divergence)}
        return Identified(self.divergence.name, parameters, self.temperature, hard_labels=self.on_labels)

    @property
    def label(self) -> str:
        """What this is in words, with its factor's sign."""
        return ("minus " if self.factor < 0 else "") + str(self.identified)


Fit = Callable[[RowDivergence, float], Match]
"""The multiple of a divergence at a temperature that is nearest to what was seen."""


def search(fit: Fit, seen: Tensor, unit: float, tolerance: float, is_known: bool = False) -> Match | None:
    """Try the plain divergences first, then parameters, then temperatures, then both; the first that fits is taken.

    Where rounding leaves much over, so that several may fit, a later one is taken if it leaves far less. `is_known` states that
    the unit was found: the temperature is then near it.
    """
    if not bool(seen.isfinite().all()) or float(seen.norm()) == 0:
        return None
    plain = [divergence_named(name) for name, entry in DIVERGENCES.items() if not entry.parameters]
    knobs = {name: next(iter(entry.parameters)) for name, entry in DIVERGENCES.items() if entry.parameters}
    ranges = {name: RANGES[knob] for name, knob in knobs.items() if knob in RANGES}  # others have no range to search
    temperatures = grid_of(0.5 * unit, 2.0 * unit, 5, True) if is_known else grid_of(0.25 * unit, 16.0 * unit, 13, True)
    one_by_one, both = partial(refined, tolerance=tolerance), partial(_both, temperatures=temperatures, tolerance=tolerance)
    cutoff = tolerance

    def at_unit(divergence: RowDivergence) -> Match:
        return fit(divergence, unit)

    def fit_turned(name: str, value: float, temperature: float = unit) -> Match:
        return fit(turned(name, value), temperature)

    tiers: list[list[Callable[[], Match | None]]] = [
        [partial(at_unit, divergence) for divergence in plain],
        [partial(one_by_one, partial(fit_turned, name), *ends, count=21) for name, ends in ranges.items()],
        [partial(one_by_one, partial(fit, one), 0.1 * unit, 50.0 * unit, True, count=31) for one in plain],
        [partial(both, partial(fit_turned, name), *ends) for name, ends in ranges.items()],
    ]
    chosen: Match | None = None
    for tier in tiers:
        best: Match | None = None
        for attempt in tier:
            found = attempt()
            if found is not None and (best is None or found.left < best.left):
                best = found
            if best is not None and best.left < TOLERANCE / 1000:  # other divergences of the tier leave at least 1e-5
                break
        if best is not None and best.left < cutoff:
            chosen, cutoff = best, best.left / 4
            if best.left < TOLERANCE:
                break
    return None if chosen is None else plainest(chosen, fit)


def turned(name: str, value: float) -> RowDivergence:
    """Return a divergence by its name with this value of its parameter."""
    return divergence_named(name, **{next(iter(DIVERGENCES[name].parameters)): value})


def plainest(match: Match, fit: Fit) -> Match:
    """The plainest parameter and temperature that fit as well: where the fit is a step function a whole interval does."""
    parameters = [float(value) for value in vars(match.divergence).values()]
    for digits in (0, 1, 2, 3):
        try:
            divergence = turned(match.divergence.name, round(parameters[0], digits)) if parameters else match.divergence
            near = fit(divergence, float(f"{match.temperature:.{digits + 1}g}"))
        except InputError:  # rounded to an end that isn't allowed
            continue
        if near.left <= max(2 * match.left, TOLERANCE / 1000):
            return near
    return match


def refined(
    fit: Callable[[float], Match], low: float, high: float, log: bool, count: int, tolerance: float = TOLERANCE
) -> Match | None:
    """The best of a grid, refined by one-dimensional search in the two neighbouring cells."""
    points = grid_of(low, high, count, log)
    tried = [fit(x) for x in points]
    best = min(range(count), key=lambda i: tried[i].left)
    if tried[best].left < TOLERANCE / 10:
        return tried[best]
    if tried[best].left > 0.5:
        return None
    ends = (points[max(best - 1, 0)], points[min(best + 1, count - 1)])
    to, back = (math.log, math.exp) if log else (float, float)
    found = scipy.optimize.minimize_scalar(
        lambda u: fit(back(u)).left, bounds=(to(ends[0]), to(ends[1])), method="bounded", options={"xatol": 1e-9}
    )
    match = min(fit(back(float(found.x))), tried[best], key=lambda one: one.left)
    return match if match.left < tolerance else None


def _both(
    fit: Callable[[float, float], Match], low: float, high: float, log: bool, temperatures: list[float], tolerance: float
) -> Match | None:
    """The best of a grid of parameter and temperature, refined by Nelder & Mead's search."""
    points = [(x, t) for x in grid_of(low, high, 9, log) for t in temperatures]
    x, t = min(points, key=lambda point: fit(*point).left)
    if fit(x, t).left > 0.5:
        return None
    to, back = (math.log, math.exp) if log else (float, float)

    def left(u: Any) -> float:
        return fit(min(max(back(float(u[0])), low), high), math.exp(float(u[1]))).left

    cell = ((to(high) - to(low)) / 9, math.log(1.6))
    inward = -1 if to(x) + cell[0] > to(high) else 1
    start = [(to(x), math.log(t)), (to(x) + inward * cell[0], math.log(t)), (to(x), math.log(t) + cell[1])]
    options = {"initial_simplex": start, "xatol": 1e-7, "fatol": 1e-8, "maxfev": 250}
    found = scipy.optimize.minimize(left, start[0], method="Nelder-Mead", options=options)
    match = fit(min(max(back(float(found.x[0])), low), high), math.exp(float(found.x[1])))
    return match if match.left < tolerance else None


def grid_of(low: float, high: float, count: int, log: bool) -> list[float]:
    """Return numbers from low to high, evenly spaced, or with evenly spaced logarithms."""
    x = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
    values: list[float] = (low * (high / low) ** x if log else low + (high - low) * x).tolist()
    return values
