"""Estimate: a number in nats, its error, its reliability, and the constant up to which it is known."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from whichkl._checks import InputError, cannot, plain
from whichkl.files.reading import rebuilt
from whichkl.printable import HTML, shorten

NORMAL = 1.959963984540054
"""Standard errors to either side in a 95 % interval."""
Finite = Literal["certified", "infinite", "not certified"]

_NAMES_IN_WORDS = {
    "forward_kl": "Forward KL, KL(p‖q), the expectation under p,",
    "reverse_kl": "Reverse KL, KL(q‖p), the expectation under q,",
    "jeffreys": "The Jeffreys divergence, w KL(p‖q) + (1 − w) KL(q‖p),",
    "jeffreys_sum": "The Jeffreys divergence, both KLs summed,",
    "weighted_jeffreys": "The weighted Jeffreys divergence, w KL(p‖q) + (1 − w) KL(q‖p),",
    "jensen_shannon": "The Jensen–Shannon divergence",
    "skew_forward_kl": "The skew forward KL, the expectation under p,",
    "skew_reverse_kl": "The skew reverse KL, the expectation under q,",
    "renyi": "The Rényi divergence of p from q",
    "total_variation": "The total variation distance",
    "hellinger": "The squared Hellinger distance",
    "chi_squared": "The χ² divergence of p from q",
    "energy": "The energy distance",
    "mmd": "The squared maximum mean discrepancy",
    "sliced_wasserstein": "The squared sliced Wasserstein distance",
}
TABLE_HEADS = ("divergence", "value", "95 % interval", "method", "reliable")
"""What stands above `Estimate.cells`."""
_NOT_A_NUMBER = "the value, or its error, isn't a number: something overflowed, or there was nothing to measure on"
_AT_TEMPERATURE = ", at an assumed temperature"
_CONSTANTS = {
    ", H(p) included": "H(p)",
    f", H(p) included{_AT_TEMPERATURE}": "H(p), at an assumed temperature",
    ", log Z included": "+ log Z",
    ", log Z subtracted": "− log Z",
    f", log Z included{_AT_TEMPERATURE}": "+ log Z, at an assumed temperature",
    f", log Z subtracted{_AT_TEMPERATURE}": "− log Z, at an assumed temperature",
    _AT_TEMPERATURE: "at an assumed temperature",
}
UpTo = Literal["log_z", "entropy_p", "temperature", "entropy_p, temperature", "log_z, temperature"] | None
"""What a value contains or rests on besides the divergence; see `Estimate`."""


@dataclass(frozen=True)
class Estimate(HTML):
    """A divergence (or what a fit minimised) with its error, in nats unless `unit` says otherwise.

    Args:
        quantity: what it is, such as ``"forward_kl"``.
        value: the number; ∞ where the divergence is.
        stderr: its standard error; 0 for exact methods.
        up_to: None, ``"entropy_p"`` (value = divergence + H(p), the cross-entropy), ``"log_z"``: value = forward KL + log Z,
            and reverse KL − log Z, since log p̃ = log p + log Z has a plus in the first and a minus in the second; or
            ``"temperature"``: p or q was made of comparisons, and is known up to a power that their noise decides; or
            ``"entropy_p, temperature"`` or ``"log_z, temperature"``: both.
        unit: nats, bits, or none for what has no unit.
        finite: ``"certified"``, ``"infinite"``, or ``"not certified"`` where samples can't decide.
        method: how it was computed, in words.
        exact: whether only rounding and a stated quadrature error separate it from the truth.
        n: number of draws, where there are any.
        ess: effective number of draws.
        khat: Pareto shape of the weights' tail.
        cap: the largest value that the method could have returned.
        reliable: False where the method reports that its answer shouldn't be trusted.
        notes: sentences on how the number came about.

    >>> Estimate("reverse_kl", 0.5, 0.01, method="Monte Carlo", n=1000).interval
    (0.480400..., 0.519599...)
    """

    quantity: str
    value: float
    stderr: float = 0.0
    up_to: UpTo = None
    finite: Finite = "not certified"
    method: str = ""
    exact: bool = False
    n: int | None = None
    ess: float | None = None
    khat: float | None = None
    cap: float | None = None
    reliable: bool = True
    notes: tuple[str, ...] = field(default=())
    unit: Literal["nats", "bits", "none"] = "nats"

    def __post_init__(self) -> None:
        """Never call what isn't a number reliable."""
        if math.isnan(self.value) or math.isnan(self.stderr):
            object.__setattr__(self, "reliable", False)
            object.__setattr__(self, "notes", tuple(dict.fromkeys((*self.notes, _NOT_A_NUMBER))))

    @classmethod
    def settled(cls, quantity: str, value: float, method: str, *notes: str) -> Estimate:
        """Return an exact value, finite or not, of a method that decides which."""
        finite: Finite = "certified" if math.isfinite(value) else "infinite"
        return cls(quantity, value, finite=finite, method=method, exact=True, notes=notes)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, value ± 1.96 standard errors; that of a divergence begins at 0 at least."""
        reach = NORMAL * self.stderr
        is_divergence = self.quantity in _NAMES_IN_WORDS and self.up_to is None and self.value >= 0
        return (max(0.0, self.value - reach) if is_divergence else self.value - reach, self.value + reach)

    @property
    def bits(self) -> Estimate:
        """The same in bits: every nat is 1/ln 2 of them.

        Raises:
            InputError: the quantity has no unit (total variation, Hellinger, χ², distances between samples).
        """
        if self.unit == "none":
            raise InputError(cannot("give this in bits", f"`{self.quantity}` has no unit", "Read `.value`"))
        if self.unit == "bits":
            return self
        per = 1 / math.log(2)
        cap = None if self.cap is None else self.cap * per
        return dataclasses.replace(self, value=self.value * per, stderr=self.stderr * per, cap=cap, unit="bits")

    def __sub__(self, other: Estimate) -> Estimate:
        """Difference of two estimates known up to the same constant; their errors are taken as independent.

        Raises:
            InputError: they are known up to different constants, or in different units; or at an assumed temperature, and of
                different quantities.
        """
        is_other = self._is_at_temperature and self.quantity != other.quantity
        if (self.constant, self.unit) != (other.constant, other.unit) or is_other:
            mine, theirs = (f"{e.quantity} {e._known}" if is_other else e._known for e in (self, other))
            because = f"one is {mine} in {self.unit}, the other {theirs} in {other.unit}"
            raise InputError(cannot("subtract these estimates", because, "Compare estimates of the same kind"))
        return Estimate(
            quantity=f"{self.quantity} − {other.quantity}",
            value=self.value - other.value,
            stderr=math.hypot(self.stderr, other.stderr),
            method=f"difference of {self.method} and {other.method}",
            exact=self.exact and other.exact,
            reliable=self.reliable and other.reliable,
            finite=self.finite if self.finite == other.finite else "not certified",
            unit=self.unit,
        )

    @property
    def _is_at_temperature(self) -> bool:
        return self.up_to is not None and self.up_to.endswith("temperature")

    @property
    def includes_entropy(self) -> bool:
        """Whether the value is a cross-entropy, KL(p‖q) + H(p)."""
        return self.up_to is not None and self.up_to.startswith("entropy_p")

    @property
    def _known(self) -> str:
        """The constant up to which it is known, in the words of a message."""
        return "absolute" if self.up_to is None else "up to " * (self.up_to != "temperature") + _CONSTANTS[self.constant]

    def resting_on(self, origin: Any) -> Estimate:
        """Return the same value as one about a target of this origin, with the origin's error of log Z, and its constant if any.

        A log density that is known up to the temperature is divided by an estimate of its integral: log Z isn't named any more.
        """
        rests_on_z = self.up_to == "log_z" or self.quantity == "elbo"
        more = getattr(origin, "log_z_stderr", 0.0) if rests_on_z else 0.0
        found = self if more == 0 else dataclasses.replace(self, stderr=math.hypot(self.stderr, more), exact=False)
        if getattr(origin, "up_to", None) is None:
            return found
        is_divided = origin.log_z_stderr > 0  # a density that was made of such a one has another log Z
        lacks_z = self.up_to == "log_z" and not is_divided
        whole: UpTo = "entropy_p, temperature" if self.includes_entropy else "log_z, temperature" if lacks_z else "temperature"
        return dataclasses.replace(found, up_to=whole)

    def __repr__(self) -> str:
        return f"Estimate({shorten(str(self), 280)})"

    def __str__(self) -> str:
        """Return one line: quantity, value, error, constant, method."""
        doubt = "" if self.reliable else f"; not reliable: {'; '.join(self.notes)}"
        unit = "" if self.unit == "none" else f" {self.unit}"
        if self.includes_entropy:
            known = _AT_TEMPERATURE.lstrip(",") * self._is_at_temperature
            return f"cross-entropy KL(p‖q) + H(p){known} = {self.number}{unit} ({self.method}{doubt})"
        constant = f" {_CONSTANTS[self.constant]}" if self.constant else ""
        return f"{self.quantity}{constant} = {self.number}{unit} ({self.method}{doubt})"

    @property
    def number(self) -> str:
        """The value with its error, to the digits that the error allows; six decimals where it's exact."""
        if not math.isfinite(self.value):
            return "∞" if self.value > 0 else str(self.value)
        if self.exact:
            return f"{0.0 if abs(self.value) < 5e-7 else self.value:.6f}"
        digits = 4 if not 0 < self.stderr < math.inf else min(6, max(0, 1 - math.floor(math.log10(self.stderr))))
        return f"{self.value:.{digits}f} ± {self.stderr:.{digits}f}"

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of this estimate in a table, under `TABLE_HEADS`."""
        unit = "" if self.unit == "none" else f" {self.unit}"
        interval = "exact" if self.exact else f"{self.interval[0]:.4g} … {self.interval[1]:.4g}"
        return self.quantity, f"{self.number}{unit}{self.constant}", interval, self.method, "yes" if self.reliable else "no"

    @property
    def sentence(self) -> str:
        """The meaning of the number, and its reliability, as a sentence."""
        name = _NAMES_IN_WORDS.get(self.quantity, self.quantity.replace("_", " "))
        what = "The cross-entropy, KL(p‖q) + H(p)," if self.includes_entropy else name
        if math.isinf(self.value):
            return f"{what} is infinite."
        if self.exact:
            return f"{what} is {self.number}{'' if self.unit == 'none' else ' ' + self.unit}, exactly."
        low, high = self.interval
        trust = "" if self.reliable else ", but this method reports that it shouldn't be trusted here"
        constant = self.constant.replace(", H(p) included", "")
        known = f" ({constant.lstrip(', ')})" if constant else ""
        return f"{what} lies between {low:.4g} and {high:.4g}{known} with 95 % confidence{trust}."

    @property
    def constant(self) -> str:
        """What the value contains besides the divergence, as text; empty if nothing."""
        of_z = ", log Z included" if self.quantity == "forward_kl" else ", log Z subtracted"
        includes_z = self.up_to in ("log_z", "log_z, temperature")
        of_p = ", H(p) included" if self.includes_entropy else of_z if includes_z else ""
        return of_p + _AT_TEMPERATURE * self._is_at_temperature

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them; infinities as text."""
        fields: dict[str, Any] = plain(vars(self))
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Estimate:
        """Rebuild an estimate from `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        return rebuilt(cls, fields)
