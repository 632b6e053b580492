"""Matching: the gradient or the values of a loss against every row divergence, with fitted parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError
from whichkl.distillation.losses import DIVERGENCES, RowDivergence, divergence_named
from whichkl.divergences.kinds import parameters_of

Rows = Float[Tensor, "n v"]

TOLERANCE = 1e-4
"""Largest share of the norm that may be left over: above single precision's rounding, far below any other divergence."""
TOLERANCE_OF_NARROW = 0.05
"""The same for a loss that rounds to bfloat16 inside."""

_MAX_LEFT_OF_GUESS = 0.1
"""Largest 1 − cosine of a guess of the temperature that a search may start from."""
_RANGES = {
    "weight_on_forward": (0.0, 1.0, False),
    "weight": (1e-3, 1 - 1e-3, False),
    "order": (0.02, 20.0, True),
    "head_mass": (0.02, 0.98, False),
    "weight_on_teacher": (0.01, 1.0, False),
}
"""Ranges of the parameters: lowest, highest, and whether the search is by logarithm."""


@dataclass(frozen=True)
class AuditBatch:
    """The rows that count in a call, and what the call returned."""

    teacher: Rows
    student: Rows
    labels: Float[Tensor, " n"]
    value: float
    gradient: Rows


@dataclass(frozen=True)
class Identified:
    """What a loss was found to be.

    Attributes:
        name: of a divergence in `DIVERGENCES`, "cross_entropy", "labels only" (a cross-entropy with the labels, and nothing of the
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


def by_gradient(batch: AuditBatch, labels: bool, unit: float, tolerance: float = TOLERANCE) -> Match | None:
    """Match the gradient of one batch of logits of this unit; None if nothing in the reference family has it."""
    return _search(_gradient_fit(batch, labels), batch.gradient, unit, tolerance)


def same_gradient(match: Match, batch: AuditBatch) -> bool:
    """Whether a divergence that was found by values has the gradient that was seen."""
    found = _gradient_fit(batch, bool(match.on_labels))(match.divergence, match.temperature)
    near = max(abs(found.factor - match.factor) / abs(match.factor), abs(found.on_labels - match.on_labels) / abs(match.factor))
    return found.left < 10 * TOLERANCE and near < 10 * TOLERANCE


def residual(match: Match, batch: AuditBatch) -> Tensor:
    """What a match leaves of the gradient of a batch."""
    return batch.gradient.flatten() - expected_gradient(match, batch)


def expected_gradient(match: Match, batch: AuditBatch) -> Tensor:
    """The gradient of a match, flat."""
    return match.factor * _reference(batch, match.divergence, match.temperature) + match.on_labels * _hard_gradient(batch)


def _reference(batch: AuditBatch, divergence: RowDivergence, temperature: float) -> Tensor:
    log_p, log_q = log_probs(batch.teacher, temperature), log_probs(batch.student, temperature)
    return divergence.gradient(log_p, log_q)[1].flatten() / temperature


def _gradient_fit(batch: AuditBatch, labels: bool) -> Fit:
    return _least_squares(partial(_reference, batch), batch.gradient.flatten(), _hard_gradient(batch) if labels else None)


def _hard_gradient(batch: AuditBatch) -> Tensor:
    """The gradient of the sum of the cross-entropies with the labels."""
    q = batch.student.softmax(-1)
    return q.scatter_add(-1, batch.labels[:, None], q.new_full((len(q), 1), -1.0)).flatten()


def by_value(batches: list[AuditBatch], labels: bool, unit: float) -> Match | None:
    """Match the values of many batches."""
    teacher, student = torch.stack([one.teacher for one in batches]), torch.stack([one.student for one in batches])

    def reference(divergence: RowDivergence, temperature: float) -> Tensor:
        return divergence.value(log_probs(teacher, temperature), log_probs(student, temperature)).sum(-1)

    hard = torch.stack([hard_total(one) for one in batches]) if labels else None
    seen = torch.tensor([one.value for one in batches], dtype=torch.float64, device="cpu")
    return _search(_least_squares(reference, seen, hard), seen, unit, TOLERANCE)


def on_labels_only(batch: AuditBatch, tolerance: float) -> float | None:
    """The multiple of the labels' cross-entropy whose gradient was seen, or None if there is more in it."""
    hard, seen = _hard_gradient(batch), batch.gradient.flatten()
    if not bool(seen.isfinite().all()) or not bool(seen.any()):
        return None
    factor = float(hard @ seen / (hard @ hard))
    return factor if float((seen - factor * hard).norm()) < tolerance * float(seen.norm()) else None


def guessed_temperature(teacher: Rows, step: Rows, change: Rows) -> float | None:
    """The temperature T at which a change of the gradient near the teacher fits; None if none does.

    Near the teacher every divergence of the family is its Fisher metric, (diag p − p pᵀ) step, times a factor, p = softmax(z/T):
    the temperature shows before it is known which divergence it is.
    """

    def left(temperature: float) -> float:
        p = (teacher / temperature).softmax(-1)
        column = (p * (step - (p * step).sum(-1, keepdim=True))).flatten()
        size = float(column.norm() * change.norm())
        return 1 - abs(float(column @ change.flatten())) / size if size > 0 else 1.0

    if not bool(change.isfinite().all()):
        return None
    grid = _grid(0.02, 400.0, 60, True)
    at = min(range(len(grid)), key=lambda i: left(grid[i]))
    ends = (math.log(grid[max(at - 1, 0)]), math.log(grid[min(at + 1, len(grid) - 1)]))
    found = scipy.optimize.minimize_scalar(lambda u: left(math.exp(u)), bounds=ends, method="bounded")
    best = math.exp(float(found.x))
    return best if left(best) < _MAX_LEFT_OF_GUESS else None


def twins(match: Match, batch: AuditBatch, labels: bool, tolerance: float) -> list[Match]:
    """Return other divergences with the same gradient at the same temperature, such as Rényi's and the interpolated KL of order ½."""
    fit, found = _gradient_fit(batch, labels), []
    for name, entry in DIVERGENCES.items():
        knob = next(iter(entry.parameters), "")
        if name == match.divergence.name or knob not in _RANGES:
            continue
        other = _refined(lambda x, name=name: fit(_turned(name, x), match.temperature), *_RANGES[knob], 21, tolerance)  # type: ignore[misc]
        found += [] if other is None else [_plain(other, fit)]
    return found


def total(divergence: RowDivergence, temperature: float, teacher: Rows, student: Rows) -> Tensor:
    """The sum of a divergence over rows."""
    return divergence.value(log_probs(teacher, temperature), log_probs(student, temperature)).sum()


def hard_total(batch: AuditBatch) -> Tensor:
    """The sum of the cross-entropies with the labels."""
    return -batch.student.log_softmax(-1).gather(-1, batch.labels[:, None]).sum()


def entropy(batch: AuditBatch, temperature: float) -> Tensor:
    """The sum of the teacher's entropies."""
    log_p = log_probs(batch.teacher, temperature)
    return -(log_p.exp() * log_p).sum()


def log_probs(logits: Rows, temperature: float) -> Rows:
    """Log-probabilities at a temperature."""
    return torch.log_softmax(logits / temperature, -1)


def _search(fit: Fit, seen: Tensor, unit: float, tolerance: float) -> Match | None:
    """Try the plain divergences first, then parameters, then temperatures, then both; the first that fits is taken.

    Where rounding leaves much over, so that several may fit, a later one is taken if it leaves far less.
    """
    if not bool(seen.isfinite().all()) or float(seen.norm()) == 0:
        return None
    plain = [divergence_named(name) for name, entry in DIVERGENCES.items() if not entry.parameters]
    knobs = {name: next(iter(entry.parameters)) for name, entry in DIVERGENCES.items() if entry.parameters}
    turned = {name: _RANGES[knob] for name, knob in knobs.items() if knob in _RANGES}  # others have no range to search
    refined, both, cutoff = partial(_refined, tolerance=tolerance), partial(_both, unit=unit, tolerance=tolerance), tolerance

    def at_unit(divergence: RowDivergence) -> Match:
        return fit(divergence, unit)

    def fit_turned(name: str, value: float, temperature: float = unit) -> Match:
        return fit(_turned(name, value), temperature)

    tiers: list[list[Callable[[], Match | None]]] = [
        [partial(at_unit, divergence) for divergence in plain],
        [partial(refined, partial(fit_turned, name), *ends, count=21) for name, ends in turned.items()],
        [partial(refined, partial(fit, one), 0.1 * unit, 50.0 * unit, True, count=31) for one in plain],
        [partial(both, partial(fit_turned, name), *ends) for name, ends in turned.items()],
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
            if tolerance <= TOLERANCE:
                break
    return None if chosen is None else _plain(chosen, fit)


def _turned(name: str, value: float) -> RowDivergence:
    return divergence_named(name, **{next(iter(DIVERGENCES[name].parameters)): value})


def _plain(match: Match, fit: Fit) -> Match:
    """The plainest parameter and temperature that fit as well: where the fit is a step function a whole interval does."""
    parameters = [float(value) for value in vars(match.divergence).values()]
    for digits in (0, 1, 2, 3):
        try:
            divergence = _turned(match.divergence.name, round(parameters[0], digits)) if parameters else match.divergence
            near = fit(divergence, float(f"{match.temperature:.{digits + 1}g}"))
        except InputError:  # rounded to an end that isn't allowed
            continue
        if near.left <= max(2 * match.left, TOLERANCE / 1000):
            return near
    return match


def _least_squares(reference: Callable[[RowDivergence, float], Tensor], seen: Tensor, hard: Tensor | None) -> Fit:
    """Return the fit of what was seen by a multiple of a reference and, where there are labels, of their cross-entropy."""

    def fit(divergence: RowDivergence, temperature: float) -> Match:
        size, column = float(seen.norm()), reference(divergence, temperature)
        if not bool(column.isfinite().all()):
            return Match(divergence, temperature, 0.0, 0.0, 1.0)
        if not float(column.norm()) > 0:
            return Match(divergence, temperature, 0.0, 0.0, 1.0)
        if hard is not None:
            both = torch.stack([column, hard], -1)
            factor, hard_weight = (float(one) for one in torch.linalg.lstsq(both, seen[:, None]).solution[:, 0])
            if abs(hard_weight) * float(hard.norm()) >= TOLERANCE * size:
                left = float((seen - factor * column - hard_weight * hard).norm())
                if abs(factor) * float(column.norm()) < TOLERANCE * size:  # a factor below what is resolved names nothing
                    return Match(divergence, temperature, 0.0, 0.0, 1.0)
                return Match(divergence, temperature, factor, hard_weight, left / size)
        factor = float(column @ seen) / max(float(column @ column), 1e-300)
        return Match(divergence, temperature, factor, 0.0, float((seen - factor * column).norm()) / size)

    return fit


def _refined(
    fit: Callable[[float], Match], low: float, high: float, log: bool, count: int, tolerance: float = TOLERANCE
) -> Match | None:
    """The best of a grid, refined by one-dimensional search in the two neighbouring cells."""
    points = _grid(low, high, count, log)
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
    fit: Callable[[float, float], Match], low: float, high: float, log: bool, unit: float, tolerance: float
) -> Match | None:
    """The best of a grid of parameter and temperature, refined by Nelder & Mead's search."""
    points = [(x, t) for x in _grid(low, high, 9, log) for t in _grid(0.25 * unit, 16.0 * unit, 13, True)]
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


def _grid(low: float, high: float, count: int, log: bool) -> list[float]:
    """Return numbers from low to high, evenly spaced, or with evenly spaced logarithms."""
    x = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
    values: list[float] = (low * (high / low) ** x if log else low + (high - low) * x).tolist()
    return values
