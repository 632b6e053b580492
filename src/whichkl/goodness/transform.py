"""Transform: calibration of a model by the probability integral transform of unseen rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.files.reading import rebuilt
from whichkl.goodness.draws import Unable, drawn, equal_rows, law_at, like, log_density
from whichkl.goodness.margin_laws import margins
from whichkl.printable import brief
from whichkl.process.torch_modes import plain_modes

_MIN_ROWS, MAX_ROWS_RANKED = 20, 20_000
_MIN_DRAWS, _MAX_DRAWS, _DRAWS_PER_ROW = 10_000, 20_000, 2
_MAX_RANKED_ROWS = 4_000
"""Rows, and draws, of a model whose margins have no closed form: a flow may draw column by column."""
_MAX_CONDITIONAL_ROWS = 10_000
_CONDITIONAL_DRAWS = 100_000
"""Draws over all rows of a conditional model: 20 to 200 per row."""
_LEVEL = 0.01
_MAX_P_VALUE, _MIN_DISTANCE = 1e-4, 0.06
"""A gap speaks against a fit up to this p-value, and from this size."""
_LEVELS = 100
"""The distribution function is compared at k/100."""
_SIMULATED_CURVES = 2_000
_MAX_NUMBERS_SUMMED = 1_000
"""Largest number of uniform numbers for which the chance of a gap is summed term by term: 10,000 take a hundredth of a second."""
JOINT = "joint density"
"""The name of the transform that sees all columns at once."""


@dataclass(frozen=True)
class ColumnCalibration:
    """The transforms u of one column: uniform where the model is right."""

    name: str
    curve: tuple[float, ...] = field(repr=False)
    """Distribution function of the transforms at 0.01, 0.02, …, 0.99."""
    distance: float
    """Largest gap of the curve from the diagonal (Kolmogorov and Smirnov)."""
    p_value: float
    """Chance of such a gap somewhere among all the columns compared (Bonferroni)."""
    exact: bool
    """Whether u is F(x) in closed form; else a rank among draws of the model."""
    effective: int
    """Number of independent uniform numbers with the same variation: fewer than the rows where these share draws."""
    compared: int
    """Number of columns that were compared."""

    @property
    def differs(self) -> bool:
        """Whether uniformity of the column is rejected at 1 %, corrected for the number of columns."""
        return self.p_value < _LEVEL

    @property
    def differs_much(self) -> bool:
        """Whether it is rejected beyond doubt, with a gap that matters: this speaks against a fit."""
        return self.p_value < _MAX_P_VALUE and self.distance > _MIN_DISTANCE

    @property
    def band(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Ends between which all curves of all columns lie together with 95 % chance, if the model is right."""
        return band(self.effective, 1 - _LEVEL / self.compared)


@dataclass(frozen=True)
class Calibration:
    """The transforms of every column, and of all columns together; empty where there is a `reason`."""

    __repr__ = brief

    columns: tuple[ColumnCalibration, ...]
    """One per column, then `joint density` where there are several columns."""
    rows: int = 0
    p_value: float | None = None
    """The smallest p-value of a column."""
    notes: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def differs(self) -> bool:
        """Whether uniformity of some column is rejected at 1 %."""
        return self.p_value is not None and self.p_value < _LEVEL

    def __str__(self) -> str:
        """One sentence."""
        if self.p_value is None:
            return f"No calibration: {self.reason}."
        if not self.differs:
            count = len(self.columns)
            least = f"p = {self.p_value:.2g}" if count == 1 else f"the least of {count} corrected p-values is {self.p_value:.2g}"
            return f"Calibrated as far as {self.rows:,} unseen rows can tell: {least}."
        off = sorted((one for one in self.columns if one.differs), key=lambda one: -one.distance)
        shown = ", ".join(f"{one.name} (gap {one.distance:.3f}, p = {one.p_value:.2g})" for one in off[:3])
        more = f" and {len(off) - 3} more" if len(off) > 3 else ""
        if not any(one.differs_much for one in off):
            doubt = "the gaps are small" if off[0].distance <= _MIN_DISTANCE else "the rows are too few to be sure"
            return f"Perhaps not calibrated on {self.rows:,} unseen rows: {shown}{more}; {doubt}."
        return f"Not calibrated on {self.rows:,} unseen rows: {shown}{more}."

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Calibration:
        """Read back what `to_dict` wrote, also from JSON."""
        return rebuilt(cls, fields)


@plain_modes()
def transform_calibration(
    x: Float[Tensor, "n d"],
    w: Float[Tensor, " n"] | None,
    context: Float[Tensor, "n c"] | None,
    model: Any,
    names: Sequence[str],
    seed: int = 0,
    most: int = MAX_ROWS_RANKED,
    draws: int = _CONDITIONAL_DRAWS,
) -> Calibration:
    """Compare u = F_q(x) of unseen rows with uniform numbers, column by column and for all columns together.

    F is the model's margin in closed form where there is one. Otherwise u is the rank among the model's draws with ties broken at
    random, which is uniform for laws with atoms, too. The transform of all columns together is the rank of log q(x) among log q
    of the model's draws: it detects dependence that no margin shows. A conditional model has a law F(y|x), and draws, per row.

    Args:
        x: rows of p, in the coordinates of the model; at most 20,000 are used, 10,000 of pairs, and 4,000 without a closed form.
        w: their weights: a row stays with chance w / max w. Or None.
        context: what each row is conditioned on, or None.
        model: a `Distribution`, or a function of contexts that returns one.
        names: the d column names.
        seed: for draws, ties and the choice of rows.
        most: largest number of rows that are used, up to 20,000.
        draws: number of draws of a conditional model, over all rows; each row has 20 to 200.

    Source: Dawid (1984); randomised ranks: Czado, Gneiting & Held (2009); ranks of log q: Hyndman (1996), Gneiting et al. (2008).

    >>> law = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> print(transform_calibration(x, None, None, law, ["a", "b"]))
    Calibrated as far as 1,000 unseen rows can tell: the least of 3 corrected p-values is ....
    >>> print(transform_calibration(x * torch.tensor([1.0, 2.0]), None, None, law, ["a", "b"]))
    Not calibrated on 1,000 unseen rows: joint density (gap 0.2..., p = ...), b (gap 0.1..., p = ...).
    """
    try:
        x, context = equal_rows(x, w, context, most if context is None else min(most, _MAX_CONDITIONAL_ROWS), seed)
        if len(x) < _MIN_ROWS:
            raise Unable(f"{len(x)} unseen rows of equal weight are too few; at least {_MIN_ROWS} are needed")
        law = model if context is None else law_at(model, context)
        u = _exact(law, x)
        if u is None and context is None:
            x = x[:: -(-len(x) // _MAX_RANKED_ROWS)]
        own = 0 if context is None else max(20, min(200, draws // len(x)))
        return _judged(x, _transforms(law, x, u, seed, own), names)
    except Unable as error:
        return Calibration((), reason=str(error))


@dataclass(frozen=True)
class _Transforms:
    columns: Tensor | None
    """(n, d), or None where there are neither closed forms nor draws."""
    exact: bool
    joint: Tensor | None
    effective: int
    """Number of independent numbers with the same variation as the ranks."""
    missing: str = ""
    """The reason why there are no draws, or no log density."""


def _judged(x: Tensor, u: _Transforms, names: Sequence[str]) -> Calibration:
    """Compare every transform with the uniform law."""
    n, d = x.shape
    if u.columns is None:
        raise Unable(u.missing)
    parts = [(name, u.columns[:, j], u.exact) for j, name in enumerate(names)]
    parts += [] if u.joint is None else [(JOINT, u.joint, False)]
    columns = []
    for name, one, exact in parts:
        effective, values = n if exact else u.effective, one.numpy()
        gap = distance(values)
        p_value = min(1.0, len(parts) * distance_p_value(gap, effective))
        curve = np.searchsorted(np.sort(values), levels(), side="right") / n
        columns.append(ColumnCalibration(name, tuple(curve.tolist()), gap, p_value, exact, effective, len(parts)))
    notes = [f"all columns at once weren't compared: {u.missing}"] if u.joint is None and u.missing else []
    repeated = [name for j, name in enumerate(names) if u.exact and len(x[:, j].unique()) < n / 2]
    if repeated:
        notes.append(f"values repeat in {', '.join(repeated)}: with enough rounded rows no density is calibrated")
    return Calibration(tuple(columns), n, min(one.p_value for one in columns), tuple(notes))


def _transforms(law: Any, x: Tensor, u: Tensor | None, seed: int, own: int) -> _Transforms:
    """Rank rows among draws, and their log densities; columns with a closed form are taken as they are.

    All rows of a single law are ranked among the same draws, so that ranks vary with the draws, too. Each row of a conditional
    law is ranked among `own` draws of its own.
    """
    n, d = x.shape
    if u is not None and d == 1:
        return _Transforms(u, True, None, n)
    shape = own if own else _MAX_RANKED_ROWS if u is None else max(_MIN_DRAWS, min(_MAX_DRAWS, _DRAWS_PER_ROW * n))
    try:
        draws = drawn(law, (shape,), d, seed + 1)
    except Unable as error:
        return _Transforms(u, u is not None, None, n, str(error))
    generator, joint, missing = torch.Generator().manual_seed(seed + 2), None, ""
    if u is not None:
        columns = u
    elif own:
        columns = _rank_in_own(x, draws, generator)
    else:
        columns = torch.stack([_rank(x[:, j], draws[:, j], generator) for j in range(d)], 1)
    if d > 1:
        try:
            if own:
                both = log_density(law, torch.cat([x[None], draws]))
                joint = _rank_in_own(both[0], both[1:], generator)
            else:
                joint = _rank(log_density(law, x), log_density(law, draws), generator)
        except Unable as error:
            missing = str(error)
    effective = n if own else round(n * len(draws) / (n + len(draws)))
    return _Transforms(columns, u is not None, joint, effective, missing)


def _exact(law: Any, x: Tensor) -> Tensor | None:
    """Return closed-form transforms of every column; None where there are none, or some aren't finite."""
    with torch.no_grad():
        try:
            u = margins(law, like(law, x))
        except Exception:  # whatever a law of the user's own raises: its draws can be ranked instead
            return None
    if u is None or tuple(u.shape) != tuple(x.shape) or not bool(u.isfinite().all()):
        return None
    return u.to("cpu", torch.float64).clamp(0, 1)


def _rank(x: Tensor, draws: Tensor, generator: torch.Generator) -> Tensor:
    """Return (draws below x + V (draws equal to x + 1)) / (m + 1) with V uniform on [0, 1]."""
    ordered = draws.sort().values
    less, upto = torch.searchsorted(ordered, x.contiguous()), torch.searchsorted(ordered, x.contiguous(), right=True)
    share = torch.rand(len(x), generator=generator, dtype=torch.float64, device="cpu")
    return (less + share * (upto - less + 1)) / (len(draws) + 1)


def _rank_in_own(x: Tensor, draws: Tensor, generator: torch.Generator) -> Tensor:
    """Return the same for each row of x among the draws of its own law."""
    less, same = (draws < x).sum(0), (draws == x).sum(0)
    share = torch.rand(less.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (less + share * (same + 1)) / (len(draws) + 1)


def levels() -> np.ndarray:
    """Return 0.01, 0.02, …, 0.99."""
    return np.arange(1, _LEVELS) / _LEVELS


@lru_cache(maxsize=64)
def band(n: int, chance: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the ends at every level between which the whole curve of n uniform numbers lies with this chance.

    The ends are binomial quantiles with one tail for all levels, which is set on simulated curves. So the band is narrow at both
    ends, where that of Kolmogorov and Smirnov is as wide as in the middle.

    Source: Säilynoja, Bürkner & Vehtari (2022), section 2.2.

    >>> low, high = band(100, 0.95)
    >>> round(low[49], 2), round(high[49], 2)
    (0.36, 0.64)
    """
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(_LEVELS, 1 / _LEVELS), size=_SIMULATED_CURVES).cumsum(1)[:, :-1]
    z = levels()
    below, above = scipy.stats.binom.cdf(counts, n, z), scipy.stats.binom.sf(counts - 1, n, z)
    tail = float(np.quantile(2 * np.minimum(below, above).min(1), 1 - chance))
    low, high = scipy.stats.binom.ppf(tail / 2, n, z) / n, scipy.stats.binom.isf(tail / 2, n, z) / n
    return tuple(low.tolist()), tuple(high.tolist())


def distance(u: np.ndarray) -> float:
    """Return Kolmogorov and Smirnov's distance from uniform: the largest gap of the distribution functions."""
    u = np.sort(u)
    n = len(u)
    return float(max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max()))


def distance_p_value(d: float, n: float) -> float:
    """Return the chance of this distance or a larger one for n uniform numbers.

    That of each side alone, s, is exact up to 1,000 numbers (Birnbaum & Tingey, 1951), and above that its expansion in 1/√n:
    exp(−2z² − 2z/(3√n) + 4z²(1 − z²)/(9n)) with z = d√n. Both have the chance 2 (s − s⁴ + s⁹ − …) for large n
    (Kolmogorov, 1933). From 20 numbers on, the relative error of chances between 0.1 and 0.001 is below 10⁻⁴, and that of chances
    down to 10⁻²⁰ is below 0.005.
    """
    side = _one_sided(min(d, 1.0), max(1, round(n)))
    both = 2 * sum((-1) ** (k - 1) * side ** (k * k) for k in range(1, 30))
    return min(1.0, max(0.0, both)) if side < 1 else 1.0


def _one_sided(d: float, n: int) -> float:
    if d <= 0 or d >= 1:
        return float(d <= 0)
    if n <= _MAX_NUMBERS_SUMMED:  # as `scipy.special.smirnov`, which takes a tenth of a second to load in a first fit
        j = torch.arange(math.floor(n * (1 - d)) + 1, dtype=torch.float64, device="cpu")
        ways = math.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
        return d * float((ways + (j - 1) * (d + j / n).log() + torch.xlogy(n - j, (1 - d - j / n).clamp(min=0))).exp().sum())
    z = d * math.sqrt(n)
    return math.exp(-2 * z * z - 2 * z / (3 * math.sqrt(n)) + 4 * z * z * (1 - z * z) / (9 * n))
