"""Result: what was measured about a fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from torch import Tensor

from whichkl.diagnostics.beyond import MAX_MASS
from whichkl.divergences import Estimate
from whichkl.files.reading import checked, rebuilt
from whichkl.goodness import Calibration, TwoSample
from whichkl.printable import brief, wrapped
from whichkl.samples import Block
from whichkl.solvers import Optimum

MAX_DRAWS = 10_000
"""Largest number of fresh draws on which a fit is judged."""
_MIN_DRAWS = 1_000
_MAX_NUMBERS = 1 << 22
"""Largest number of coordinates of these draws, 32 MB, where it allows `_MIN_DRAWS`."""
SMALL_KL = 0.01
"""Nats of KL that don't matter."""
MAX_LOSS_GAP = 10.0
"""Largest loss above the best, in nats, at which an optimum matters; beyond it, its mass is below e⁻¹⁰ of the best one's."""
_MIN_MASS = 0.01
"""Least share of p's mass at modes that count as missing."""
_MIN_MASS_RATIO = 10
"""Least ratio of a mode's mass to the mass that a model reaches, at which a second fit is worth its cost."""


def draws_in(dim: int) -> int:
    """Return the number of fresh draws on which a fit is judged: 10,000 up to 419 dimensions, 1,000 from 4,194 on."""
    return min(MAX_DRAWS, max(_MIN_DRAWS, _MAX_NUMBERS // dim))


@dataclass(frozen=True)
class MissingModes:
    """Modes of p that q doesn't reach: there log q is below its 10⁻⁴ quantile under q."""

    __repr__ = brief

    mass: float
    """Share of these modes in the mass at them and where q reaches, by importance sampling; modes that weren't found don't
    count."""
    stderr: float
    """Its standard error."""
    by_particles: float | None
    """The share of the particles (or draws of p) at these modes, a rough cross-check: few particles settle the weights of modes
    badly. None where the particles didn't get down to the temperature of p."""
    least_kl: float
    """The least that these modes add to KL(q‖p), −log(1 − mass), in nats."""
    count: int
    """The number of distinct missing modes; there may be more."""
    modes: tuple[tuple[float, ...], ...]
    """Where they are, in the coordinates of the target, heaviest first; at most twenty."""
    shares: tuple[float, ...]
    """The share of each of these."""
    names: tuple[str, ...]
    """The coordinates' names."""
    unresolved: float
    """Share of the particles that q doesn't reach and that lead to no missing mode: tails, ridges, necks."""
    method: str
    """``"particles"``, ``"draws of p"``, or ``"none"`` where `reason` says why."""
    searched: str
    """Where the search looked; nothing is known about modes elsewhere."""
    gradients: int
    """Points at which log p and its gradient were evaluated."""
    calls: int
    """Batched calls of the target."""
    reason: str | None = None
    beyond: float | None = None
    """`Diagnostics.beyond`, by the points of the search; None where they are no points of p."""

    @property
    def found(self) -> bool:
        """Whether q misses at least 1 % of p's mass, by two standard errors."""
        return is_missed(self.mass, self.stderr)

    def outweigh(self, count: int) -> bool:
        """Whether the `count` heaviest modes hold half of p's mass, or ten times what the model reaches, by two errors."""
        return sum(self.shares[:count]) - 2 * self.stderr > min(0.5, _MIN_MASS_RATIO * (1 - self.mass))

    def __str__(self) -> str:
        """One sentence."""
        if self.reason is not None:
            return f"Missing modes weren't looked for: {self.reason}."
        if not self.found:
            return f"No missing mode was found by {self.method}, searched {self.searched}."
        where = ", ".join(f"{name} = {value:.3g}" for name, value in list(zip(self.names, self.modes[0], strict=False))[:4])
        where += ", …" if len(self.names) > 4 else ""
        what = "mode that the fit misses" if self.count == 1 else "modes that the fit misses"
        share = f"{self.mass:.1%} ± {self.stderr:.1%} of the mass, at least {self.least_kl:.2g} nats"
        return f"{self.count} {what} ({share}), the heaviest at {where}."

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MissingModes:
        """Read back what `to_dict` wrote."""
        return rebuilt(cls, fields)


def is_missed(mass: float, stderr: float) -> bool:
    """Whether a mass is at least 1 % by two standard errors."""
    return mass - 2 * stderr > _MIN_MASS


@dataclass(frozen=True)
class Diagnostics:
    """What was measured about a fit; None where a measure doesn't apply."""

    __repr__ = brief

    optima: tuple[Optimum, ...]
    iterations: int
    residual: float
    nodes: int | None = None
    node_error: float | None = None
    elbo: Estimate | None = None
    ess: float | None = None
    khat: float | None = None
    log_z: Estimate | None = None
    """Log of p's normaliser, where points of p and draws of the model were weighted together."""
    held_out: Estimate | None = None
    """Mean −log q on draws that the fit hasn't seen (forward KL plus H(p))."""
    richer_gain: Estimate | None = None
    """The gain of the next richer family, in nats per draw, paired on the same unseen draws."""
    simpler_gain: Estimate | None = None
    """The gain of the next simpler family, or of the one in `simpler`."""
    simpler: str | None = None
    """The simplest family, if it does even better than the next simpler one."""
    richer: str | None = None
    """The richer family that the findings name, one that the rows allow."""
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
    rows_too_few: str | None = None
    """Why the rows can't show how well a mixture does on others."""
    evaluations: dict[str, int] | None = None
    curve: tuple[tuple[int, Estimate], ...] | None = field(default=None, repr=False)
    """Held-out mean −log q per number of components, if that number was chosen."""
    two_sample: TwoSample | None = None
    """Whether a classifier distinguishes the model's draws from unseen rows."""
    calibration: Calibration | None = None
    """Whether the probability integral transform of unseen rows is uniform."""
    missing_modes: MissingModes | None = None
    """Whether p has modes that a fit by reverse KL doesn't reach."""
    beyond: float | None = None
    """The share of p's mass, less two standard errors, where p/q is above e times the largest importance weight."""
    held: Block | None = field(default=None, repr=False)
    """The unseen rows, in the coordinates of the target; not saved."""
    log_weights: Tensor | None = field(default=None, repr=False)
    """log p − log q at the fresh draws of the model by which it was judged; not saved."""
    history: tuple[float, ...] = field(default=(), repr=False)
    """The best loss after each iteration, if the solver had it (`Solution.history`)."""
    notes: tuple[str, ...] = ()
    """Remarks of the solver and the family."""
    left_out: tuple[str, ...] = ()
    """What wasn't measured, or with less than there is, so that judging costs no more than the fit; `Fit.check` does the rest."""

    @property
    def weights_miss_mass(self) -> bool:
        """Whether more than a hundredth of p lies where its density is above what any weight shows."""
        return (self.beyond or 0.0) > MAX_MASS

    @property
    def leaves_optima_out(self) -> bool:
        """Whether other optima that hardly overlap the best one have mass that matters."""
        return self.separate > 1 and (self.least_kl or 0.0) > SMALL_KL

    def __str__(self) -> str:
        """One line per measure."""
        shown = [(one.name, getattr(self, one.name)) for one in fields(self) if one.repr]
        measured = [f"{name}: {_line(value)}" for name, value in shown if value is not None and value != ()]
        return "\n".join(line for one in measured for line in wrapped(one))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them; the parameters of the optima and `held` aren't in it."""
        saved = {name: getattr(self, name) for name in _SAVED}
        return {
            "optima": [{"loss": o.loss, "converged": o.converged, "is_global": o.is_global} for o in self.optima],
            **{name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in saved.items()},
            "curve": None if self.curve is None else [[count, one.to_dict()] for count, one in self.curve],
            "history": list(self.history),
            "notes": list(self.notes),
            "left_out": list(self.left_out),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], optima: tuple[Optimum, ...]) -> Diagnostics:
        """Read back what `to_dict` wrote; a `ValueError` names a field of another type. Older versions may lack measures."""
        hints = get_type_hints(cls)
        found = {name: checked(hints[name], saved[name], f"diagnostics.{name}") for name in _SAVED if name in saved}
        curve = checked(list[tuple[Any, ...]] | None, saved.get("curve"), "diagnostics.curve")
        if curve is not None:
            found["curve"] = tuple((checked(int, count, "diagnostics.curve"), Estimate.from_dict(one)) for count, one in curve)
        return cls(optima, **found)


_SAVED = tuple(one.name for one in fields(Diagnostics) if one.name not in ("optima", "curve", "held", "log_weights"))
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
