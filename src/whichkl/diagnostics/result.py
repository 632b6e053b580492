"""Result: what was measured about a fit."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from whichkl.diagnostics.missing_modes import MissingModes
from whichkl.divergences import Estimate
from whichkl.goodness import Calibration, TwoSample
from whichkl.samples import Block
from whichkl.solvers import Optimum

DRAWS = 10_000
NEGLIGIBLE = 10.0
"""An optimum so many nats worse than the best has no mass to speak of beside it, some e⁻¹⁰."""
_ROOM = 1 << 22
"""Numbers in the draws at most, 32 MB, but at least 1,000 draws."""


def draws_in(dim: int) -> int:
    """Return on how many fresh draws a fit is judged: 10,000 up to 419 dimensions, 1,000 from 4,194 on."""
    return min(DRAWS, max(1_000, _ROOM // dim))


@dataclass(frozen=True)
class Diagnostics:
    """What was measured about a fit; None where it doesn't apply."""

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
    """By how many nats a draw the next richer family does better, paired on the same unseen draws."""
    simpler_gain: Estimate | None = None
    """The same for the next simpler one, or for that in `simpler`."""
    simpler: str | None = None
    """The simplest family, where it does better still than the next simpler one."""
    correlated: bool | None = None
    """Whether columns hang together, where the family keeps them apart."""
    jump: float | None = None
    """By how many nats log p changes between draws of the model beyond what its gradient says, in the mean over lines."""
    least_kl: float | None = None
    """What reverse KL amounts to at least, in nats: from the importance weights, and from separate optima that q leaves out."""
    understated: float | None = None
    """How many times as wide as in the model a column is at most by linear response, where mean field was fitted."""
    separate: int = 1
    """How many of the optima lie apart from each other: as many components could hold them all."""
    evaluations: dict[str, int] | None = None
    curve: tuple[tuple[int, Estimate], ...] | None = field(default=None, repr=False)
    """Held-out mean −log q for each number of components, where that number was to be chosen."""
    two_sample: TwoSample | None = None
    """Whether a classifier tells the model's draws from unseen rows."""
    calibration: Calibration | None = None
    """Whether the probability integral transform of unseen rows is uniform."""
    missing_modes: MissingModes | None = None
    """Whether p has modes where a fit by reverse KL never goes."""
    held: Block | None = field(default=None, repr=False)
    """The unseen rows, in the coordinates of the target; not saved."""
    history: tuple[float, ...] = field(default=(), repr=False)
    """The best loss after each iteration, where the solver had it at hand (`Solution.history`)."""
    notes: tuple[str, ...] = ()
    """What the solver or the family says of how it was found."""

    def __str__(self) -> str:
        """A line for each thing that was measured."""
        shown = [(one.name, getattr(self, one.name)) for one in fields(self) if one.repr]
        return "\n".join(f"{name}: {_line(value)}" for name, value in shown if value is not None and value != ())


@dataclass(frozen=True)
class Judgement:
    """The value of the objective, the diagnostics, how the fit ended, and what was found."""

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
