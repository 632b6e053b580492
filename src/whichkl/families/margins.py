"""Margins: families of one column, fitted by sums over its values; `Product` has one for each of its columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Beta, Distribution, Exponential, Gamma, Laplace, LogNormal, Normal

from whichkl._checks import InputError, cannot
from whichkl.families.columns import Coin, Counts, codes
from whichkl.families.field_checks import BITS, COUNTS, INSIDE_UNIT, NOT_NEGATIVE, POSITIVE, REAL, ValueRange, codes_of

Sums = Mapping[str, Tensor]
Found = dict[str, Tensor]


class Margin:
    """One column's family: its values, the sums that it needs, and its law of maximum likelihood.

    By default the law has one parameter, which is the mean.
    """

    name: ClassVar[str]
    values: ValueRange
    """The values that it takes."""
    distribution: ClassVar[Any]
    """Torch's class of its law."""
    parameter_names: ClassVar[tuple[str, ...]]
    """What `distribution` calls the law's parameters."""
    about_median: ClassVar[bool] = False
    """Whether the origin must be the column's weighted median."""
    inner_value: ClassVar[float] = 0.0
    """A value that it takes, for values and origins that it doesn't."""

    def sums(self, x: Float[Tensor, " m"], w: Float[Tensor, " m"], origin: Float[Tensor, ""]) -> Found:
        """Return sums over these values, besides Σw, which add up over blocks; all values and the origin are inside."""
        return {"total": w @ x}

    def fitted(self, sums: Sums, origin: Float[Tensor, ""], column: str) -> Found:
        """Return the parameters of maximum likelihood; refuse a column where it has no maximum."""
        return {self.parameter_names[0]: sums["total"] / sums["weight"]}

    def parameters(self, law: Distribution) -> Found:
        """Return a law's parameters by name."""
        return {name: getattr(law, name) for name in self.parameter_names}

    def law(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the law with these parameters."""
        law: Distribution = self.distribution(**parameters, validate_args=False)
        return law

    def statistics(self, x: Float[Tensor, " m"], w: Float[Tensor, " m"], origin: Float[Tensor, ""]) -> Found:
        """Return `sums`, Σw, the number of rows with a weight, and the number of values outside the range."""
        inside, at = self.values.contains(x), self._inner(origin)
        counted = {"rows": (w > 0).sum(), "weight": w.sum(), "outside": (~inside).sum()}
        return {**counted, **self.sums(torch.where(inside, x, at), w, at)}

    def from_statistics(self, sums: Sums, origin: Float[Tensor, ""], column: str) -> Distribution:
        """Return the law of maximum likelihood; refuse values outside the range."""
        if outside := int(sums["outside"]):
            self.refuse(column, f"it holds {outside:,} {'value' if outside == 1 else 'values'} outside {self.values.words}")
        return self.law(self.fitted(sums, self._inner(origin), column))

    def count_parameters(self, x: Float[Tensor, " m"]) -> int:
        """Return the number of free parameters on a column."""
        return len(self.parameter_names)

    def refuse(self, column: str, because: str, instead: str = "Drop the column, or give it another margin") -> NoReturn:
        """Refuse a column that can't be fitted."""
        raise InputError(cannot(f"fit `{self.name}` to column `{column}`", because, instead))

    def refuse_constant(self, column: str) -> NoReturn:
        """Refuse a column whose values are all the same."""
        self.refuse(column, "it is constant, so its density is unbounded", "Drop the column")

    def _inner(self, origin: Tensor) -> Tensor:
        """Return the origin if it is in the range, else a value that is."""
        return origin if bool(self.values.contains(origin)) else torch.full_like(origin, self.inner_value)


class _Normal(Margin):
    """N(m, s): the mean and the standard deviation (division by Σw)."""

    name, values = "normal", REAL
    distribution, parameter_names = Normal, ("loc", "scale")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Found:
        return _moments(x - origin, w)

    def fitted(self, sums: Sums, origin: Tensor, column: str) -> Found:
        shift, sd = _mean_and_sd(self, sums, column)
        return {"loc": origin + shift, "scale": sd}


class _LogNormal(Margin):
    """log x ~ N(m, s), from the moments of log(x / o)."""

    name, values, inner_value = "lognormal", POSITIVE, 1.0
    distribution, parameter_names = LogNormal, ("loc", "scale")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Found:
        return _moments(_log_ratio(x, origin), w)

    def fitted(self, sums: Sums, origin: Tensor, column: str) -> Found:
        shift, sd = _mean_and_sd(self, sums, column)
        return {"loc": origin.log() + shift, "scale": sd}


class _Laplace(Margin):
    """exp(−|x − m| / b) / 2b: m the weighted median, which is the origin, b the mean distance from it."""

    name, values, about_median = "laplace", REAL, True
    distribution, parameter_names = Laplace, ("loc", "scale")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Found:
        return {"distance": w @ (x - origin).abs()}

    def fitted(self, sums: Sums, origin: Tensor, column: str) -> Found:
        scale = sums["distance"] / sums["weight"]
        if float(scale) <= 0:
            self.refuse_constant(column)
        return {"loc": origin, "scale": scale}


class _Exponential(Margin):
    """λ exp(−λx): λ = 1 / mean."""

    name, values = "exponential", NOT_NEGATIVE
    distribution, parameter_names = Exponential, ("rate",)

    def fitted(self, sums: Sums, origin: Tensor, column: str) -> Found:
        if float(sums["total"]) <= 0:
            self.refuse(column, "all its values are 0, so its density is unbounded")
        return {"rate": sums["weight"] / sums["total"]}


class _Gamma(Margin):
    """∝ xᵏ⁻¹ exp(−λx): log k − ψ(k) = log E[x] − E[log x], and λ = k / E[x]. Source: Choi & Wette (1969)."""

    name, values, inner_value = "gamma", POSITIVE, 1.0
    distribution, parameter_names = Gamma, ("concentration", "rate")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Found:
        return {"first": w @ ((x - origin) / origin), "logs": w @ _log_ratio(x, origin)}

    def fitted(self, sums: Sums, origin: Tensor, column: str) -> Found:
        mean = sums["first"] / sums["weight"]
        gap = float(torch.log1p(mean) - sums["logs"] / sums["weight"])
        if gap <= 1e-15:
            self.refuse_constant(column)
        shape = origin.new_tensor(_gamma_shape(gap))
        return {"concentration": shape, "rate": shape / (origin * (1 + mean))}


class _Beta(Margin):
    """∝ xᵃ⁻¹ (1 − x)ᵇ⁻¹: ψ(a) − ψ(a + b) = E[log x] and ψ(b) − ψ(a + b) = E[log(1 − x)]."""

    name, values, inner_value = "beta", INSIDE_UNIT, 0.5
    distribution, parameter_names = Beta, ("concentration1", "concentration0")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Found:
        return {**_moments(x - origin, w), "log": w @ x.log(), "log_rest": w @ torch.log1p(-x)}

    def fitted(self, sums: Sums, origin: Tensor, column: str) -> Found:
        shift, sd = _mean_and_sd(self, sums, column)
        mean, variance = float(origin + shift), float(sd) ** 2  # the start is the law with these
        total = max(mean * (1 - mean) / variance - 1, 1e-3)
        logs = np.array([float(sums["log"] / sums["weight"]), float(sums["log_rest"] / sums["weight"])])
        a, b = _beta_shapes(np.array([mean, 1 - mean]) * total, logs)
        return {"concentration1": origin.new_tensor(a), "concentration0": origin.new_tensor(b)}


class _Bernoulli(Margin):
    """0 or 1; the probability of 1 is their mean."""

    name, values = "bernoulli", BITS
    distribution, parameter_names = Coin, ("probs",)

    def fitted(self, sums: Sums, origin: Tensor, column: str) -> Found:
        return {"probs": (sums["total"] / sums["weight"]).clamp(0, 1)}


class _Poisson(Margin):
    """λˣ exp(−λ) / x!: λ is the mean."""

    name, values = "poisson", COUNTS
    distribution, parameter_names = Counts, ("rate",)


class CategoricalMargin(Margin):
    """Categories 0 … K−1 and their frequencies (n_k + s) / (n + s K).

    Args:
        categories: K; None for one more than the largest code, where every code below must occur.
        smoothing: s, the number of rows that are added to every category.
    """

    name, parameter_names = "categorical", ("probs",)

    def __init__(self, categories: int | None = None, smoothing: float = 0.0) -> None:
        self.categories, self.smoothing = categories, smoothing
        self.values = codes_of(categories)

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Found:
        """Return the weight of each code and the number of its rows; a later block may have more codes."""
        code, least = x.long(), self.categories or 0
        return {"counts": torch.bincount(code, weights=w, minlength=least), "seen": torch.bincount(code, minlength=least)}

    def fitted(self, sums: Sums, origin: Tensor, column: str) -> Found:
        """Return the frequencies; refuse a code that never occurs if K isn't given."""
        missing = (sums["seen"] == 0).nonzero().flatten().tolist()
        if missing and self.categories is None:
            top, first = len(sums["seen"]) - 1, ", ".join(str(code) for code in missing[:5]) + ", …" * (len(missing) > 5)
            because = f"its codes go to {top}, and {first} {'never occurs' if len(missing) == 1 else 'never occur'}"
            instead = (
                f"Recode it (torch.unique(x, return_inverse=True)), or use Categorical(categories={top + 1}) "
                "if these are categories that happen not to occur"
            )
            self.refuse(column, because, instead)
        share = sums["counts"] / sums["weight"] * sums["rows"] + self.smoothing
        return {"probs": share / share.sum()}

    def parameters(self, law: Distribution) -> Found:
        """Return `probs` (K,)."""
        logits: Tensor = law.logits  # type: ignore[attr-defined]
        return {"probs": logits.exp()}

    def law(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the law of categories."""
        return codes(parameters["probs"])

    def count_parameters(self, x: Tensor) -> int:
        """One less than the number of codes that occur."""
        return len(x.unique()) - 1


# Where two margins have the same score, the first one is chosen.
MARGINS: dict[str, type[Margin]] = {
    kind.name: kind
    for kind in (_Bernoulli, _Poisson, CategoricalMargin, _Normal, _Laplace, _Exponential, _Gamma, _LogNormal, _Beta)
}


def _moments(y: Tensor, w: Tensor) -> Found:
    return {"first": w @ y, "second": w @ y.square()}


def _mean_and_sd(margin: Margin, sums: Sums, column: str) -> tuple[Tensor, Tensor]:
    shift = sums["first"] / sums["weight"]
    variance = sums["second"] / sums["weight"] - shift.square()
    if float(variance) <= 0:
        margin.refuse_constant(column)
    return shift, variance.sqrt()


def _log_ratio(x: Tensor, origin: Tensor) -> Tensor:
    """log(x / o), to all digits also where x is near o."""
    off = (x - origin) / origin
    return torch.where(off.abs() < 0.5, torch.log1p(off), x.log() - origin.log())


def _gamma_shape(gap: float) -> float:
    """Solve log k − ψ(k) = gap > 0 by Newton's method in log k."""
    k = (3 - gap + math.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    for _ in range(50):
        step = (_log_minus_digamma(k) - gap) / (1 - k * float(scipy.special.polygamma(1, k)))
        k *= math.exp(-max(-2.0, min(2.0, step)))
        if abs(step) < 1e-15:
            break
    return k


def _log_minus_digamma(k: float) -> float:
    if k < 20:
        return math.log(k) - float(scipy.special.digamma(k))
    r = 1 / k**2  # the asymptotic series, since the two logarithms would cancel
    return 1 / (2 * k) + r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r * (1 / 240 - r / 132))))


def _beta_shapes(start: np.ndarray, logs: np.ndarray) -> tuple[float, float]:
    """Minimise log B(a, b) − a E[log x] − b E[log(1 − x)], which is convex, by Newton's method."""

    def loss(at: np.ndarray) -> float:
        return float(scipy.special.betaln(*at) - at @ logs)

    at = start
    for _ in range(200):
        gradient = scipy.special.digamma(at) - scipy.special.digamma(at.sum()) - logs
        step = -np.linalg.solve(np.diag(scipy.special.polygamma(1, at)) - scipy.special.polygamma(1, at.sum()), gradient)
        length, size = 1.0, float(np.abs(step / at).max())
        while (at + length * step <= 0).any() or (size > 1e-5 and loss(at + length * step) > loss(at)):
            length /= 2
            if length < 1e-12:
                return float(at[0]), float(at[1])
        at = at + length * step
        if size < 1e-14:
            break
    return float(at[0]), float(at[1])
