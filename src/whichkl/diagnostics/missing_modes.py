"""Missing modes: the mass of p where q has none, and the sentence that reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from whichkl.files.reading import rebuilt

_MIN_MASS = 0.01
"""Least share of p's mass at modes that count as missing."""
_MIN_MASS_RATIO = 10
"""Least ratio of a mode's mass to the mass that a model reaches, at which a second fit is worth its cost."""


@dataclass(frozen=True)
class MissingModes:
    """Modes of p that q doesn't reach: there log q is below its 10⁻⁴ quantile under q."""

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
