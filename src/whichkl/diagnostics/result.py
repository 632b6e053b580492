"""Result: what was measured about a fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from whichkl.diagnostics.missing_modes import MissingModes
from whichkl.divergences import Estimate
from whichkl.files.reading import checked
from whichkl.goodness import Calibration, TwoSample
from whichkl.samples import Block
from whichkl.solvers import Optimum

MAX_DRAWS = 10_000
"""Largest number of fresh draws on which a fit is judged."""
_MIN_DRAWS = 1_000
_MAX_NUMBERS = 1 << 22
"""Largest number of coordinates of these draws, 32 MB, where it allows `_MIN_DRAWS`."""
MAX_LOSS_GAP = 10.0
"""Largest loss above the best, in nats, at which an optimum matters; beyond it, its mass is below e⁻¹⁰ of the best one's."""


def draws_in(dim: int) -> int:
    """Return the number of fresh draws on which a fit is judged: 10,000 up to 419 dimensions, 1,000 from 4,194 on."""
    return min(MAX_DRAWS, max(_MIN_DRAWS, _MAX_NUMBERS // dim))


@dataclass(frozen=True)
class Diagnostics:
    """What was measured about a fit; None where a measure doesn't apply."""

    optima: tuple[Optimum, ...]
    iterations: int
    residual: float
    nodes: int | None = None
    node_error: float | None = None
    elbo: Estimate | None = None
    ess: float | None = None
    khat: float | None = None
    held_out: Estimate | None = None
    """Mean −log q on draws that the fit hasn't seen (forward KL plus H(p))."""
    richer_gain: Estimate | None = None
    """The gain of the next richer family, in nats per draw, paired on the same unseen draws."""
    simpler_gain: Estimate | None = None
    """The gain of the next simpler family, or of the one in `simpler`."""
    simpler: str | None = None
    """The simplest family, if it does even better than the next simpler one."""
    correlated: bool | None = None
    """Whether columns are correlated, if the family has independent columns."""
    jump: float | None = None
    """The change of log p between draws of the model that its gradient doesn't explain, in nats, averaged over lines."""
    least_kl: float | None = None
    """A lower bound of reverse KL, in nats: from the importance weights, and from separate optima that q leaves out."""
    understated: float | None = None
    """The largest ratio of a column's standard deviation by linear response to that of the model, for mean field."""
    separate: int = 1
    """The number of optima that hardly overlap; a mixture of this many components could hold them all."""
    evaluations: dict[str, int] | None = None
    curve: tuple[tuple[int, Estimate], ...] | None = field(default=None, repr=False)
    """Held-out mean −log q per number of components, if that number was chosen."""
    two_sample: TwoSample | None = None
    """Whether a classifier distinguishes the model's draws from unseen rows."""
    calibration: Calibration | None = None
    """Whether the probability integral transform of unseen rows is uniform."""
    missing_modes: MissingModes | None = None
    """Whether p has modes that a fit by reverse KL doesn't reach."""
    held: Block | None = field(default=None, repr=False)
    """The unseen rows, in the coordinates of the target; not saved."""
    history: tuple[float, ...] = field(default=(), repr=False)
    """The best loss after each iteration, if the solver had it (`Solution.history`)."""
    notes: tuple[str, ...] = ()
    """Remarks of the solver and the family."""

    def __str__(self) -> str:
        """One line per measure."""
        shown = [(one.name, getattr(self, one.name)) for one in fields(self) if one.repr]
        return "\n".join(f"{name}: {_line(value)}" for name, value in shown if value is not None and value != ())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them; the parameters of the optima and `held` aren't in it."""
        saved = {name: getattr(self, name) for name in _SAVED}
        return {
            "optima": [{"loss": o.loss, "converged": o.converged, "is_global": o.is_global} for o in self.optima],
            **{name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in saved.items()},
            "curve": None if self.curve is None else [[count, one.to_dict()] for count, one in self.curve],
            "history": list(self.history),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], optima: tuple[Optimum, ...]) -> Diagnostics:
        """Read back what `to_dict` wrote; older versions may lack measures.

        Args:
            saved: what was written.
            optima: the optima, with their models.

        Raises:
            ValueError: a field is of another type; the message names it.
        """
        hints = get_type_hints(cls)
        found = {name: checked(hints[name], saved[name], f"diagnostics.{name}") for name in _SAVED if name in saved}
        curve = checked(list[tuple[Any, ...]] | None, saved.get("curve"), "diagnostics.curve")
        if curve is not None:
            found["curve"] = tuple((checked(int, count, "diagnostics.curve"), Estimate.from_dict(one)) for count, one in curve)
        return cls(optima, **found)


_SAVED = tuple(one.name for one in fields(Diagnostics) if one.name not in ("optima", "curve", "held"))
"""The fields that are saved as they are."""


@dataclass(frozen=True)
class Judgement:
    """The value of the objective, the diagnostics, the status of the fit, and the findings."""

    value: Estimate
    diagnostics: Diagnostics
    status: str
    findings: frozenset[str]


def _line(value: Any) -> str:
    """Write what was measured in one line."""
    if isinstance(value, Estimate):
        return f"{value.number} nats ({value.method})"
    if isinstance(value, Optimum):
        return f"{value.loss:.4f}{'' if value.is_global else ', local'}{'' if value.converged else ', not converged'}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(one)}" for name, one in value.items())
    if isinstance(value, tuple):
        return "; ".join(map(_line, value))
    return str(value)
