"""Margins of real numbers: normal, Laplace, log-normal, exponential, gamma and beta."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.distributions import Beta, Distribution, Exponential, Gamma, Laplace, LogNormal, Normal

from whichkl.families.margins import Margin, Sums


class NormalMargin(Margin):
    """N(m, s): the mean and the standard deviation (division by Σw)."""

    name = "normal"
    takes = "finite numbers"

    def allows(self, values: Tensor) -> Tensor:
        """All finite numbers."""
        return values.isfinite()

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w (x − o) and Σ w (x − o)²."""
        y = values - origin
        return {"first": w @ y, "second": w @ y.square()}

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Return N(o + E(x − o), √Var)."""
        shift, sd = _moments(self, sums, column)
        return Normal(origin + shift, sd, validate_args=False)

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `loc` and `scale`."""
        return _named(law, "loc", "scale")

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the normal law."""
        return Normal(parameters["loc"], parameters["scale"], validate_args=False)


class LogNormalMargin(Margin):
    """log x ~ N(m, s)."""

    name = "lognormal"
    takes = "numbers above 0"
    safe = 1.0

    def allows(self, values: Tensor) -> Tensor:
        """Finite numbers above 0."""
        return values.isfinite() & (values > 0)

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w log(x / o) and its square's."""
        y = _log_ratio(values, origin)
        return {"first": w @ y, "second": w @ y.square()}

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Return the law whose logarithm has these moments."""
        shift, sd = _moments(self, sums, column)
        return LogNormal(origin.log() + shift, sd, validate_args=False)

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `loc` and `scale` of log x."""
        return _named(law, "loc", "scale")

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the log-normal law."""
        return LogNormal(parameters["loc"], parameters["scale"], validate_args=False)


class LaplaceMargin(Margin):
    """exp(−|x − m| / b) / 2b: m the weighted median, b the mean distance from it."""

    name = "laplace"
    takes = "finite numbers"
    about_median = True

    def allows(self, values: Tensor) -> Tensor:
        """All finite numbers."""
        return values.isfinite()

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w |x − o|, where o is the median."""
        return {"distance": w @ (values - origin).abs()}

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Return the law at the median."""
        scale = sums["distance"] / sums["weight"]
        if float(scale) <= 0:
            self.refuse_constant(column)
        return Laplace(origin, scale, validate_args=False)

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `loc` and `scale`."""
        return _named(law, "loc", "scale")

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the Laplace law."""
        return Laplace(parameters["loc"], parameters["scale"], validate_args=False)


class ExponentialMargin(Margin):
    """λ exp(−λx): λ = 1 / mean."""

    name = "exponential"
    takes = "numbers from 0"
    free = 1

    def allows(self, values: Tensor) -> Tensor:
        """Finite numbers from 0."""
        return values.isfinite() & (values >= 0)

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w x."""
        return {"total": w @ values}

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Return the law of this mean."""
        if float(sums["total"]) <= 0:
            self.refuse(column, "all its values are 0, so its density is unbounded")
        return Exponential(sums["weight"] / sums["total"], validate_args=False)

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `rate`."""
        return _named(law, "rate")

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the exponential law."""
        return Exponential(parameters["rate"], validate_args=False)


class GammaMargin(Margin):
    """∝ xᵏ⁻¹ exp(−λx): log k − ψ(k) = log E[x] − E[log x], and λ = k / E[x]. Source: Choi & Wette (1969)."""

    name = "gamma"
    takes = "numbers above 0"
    safe = 1.0

    def allows(self, values: Tensor) -> Tensor:
        """Finite numbers above 0."""
        return values.isfinite() & (values > 0)

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w (x / o − 1) and Σ w log(x / o)."""
        return {"first": w @ ((values - origin) / origin), "logs": w @ _log_ratio(values, origin)}

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Solve for the shape k by Newton's method in log k."""
        mean = sums["first"] / sums["weight"]
        gap = float(torch.log1p(mean) - sums["logs"] / sums["weight"])
        if gap <= 1e-15:
            self.refuse_constant(column)
        shape = origin.new_tensor(_shape(gap))
        return Gamma(shape, shape / (origin * (1 + mean)), validate_args=False)

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `concentration` k and `rate` λ."""
        return _named(law, "concentration", "rate")

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the gamma law."""
        return Gamma(parameters["concentration"], parameters["rate"], validate_args=False)


class BetaMargin(Margin):
    """∝ xᵃ⁻¹ (1 − x)ᵇ⁻¹: ψ(a) − ψ(a + b) = E[log x] and ψ(b) − ψ(a + b) = E[log(1 − x)]."""

    name = "beta"
    takes = "numbers between 0 and 1, without the ends"
    safe = 0.5

    def allows(self, values: Tensor) -> Tensor:
        """Numbers strictly between 0 and 1."""
        return (values > 0) & (values < 1)

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w log x and Σ w log(1 − x), and the moments about o, for the start."""
        y = values - origin
        logs = {"log": w @ values.log(), "log_rest": w @ torch.log1p(-values)}
        return {"first": w @ y, "second": w @ y.square(), **logs}

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Solve both equations by Newton's method, from the law with the same mean and variance."""
        shift, sd = _moments(self, sums, column)
        mean, variance = float(origin + shift), float(sd) ** 2
        total = max(mean * (1 - mean) / variance - 1, 1e-3)
        logs = np.array([float(sums["log"] / sums["weight"]), float(sums["log_rest"] / sums["weight"])])
        a, b = _beta_shapes(np.array([mean, 1 - mean]) * total, logs)
        return Beta(origin.new_tensor(a), origin.new_tensor(b), validate_args=False)

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `concentration1` a and `concentration0` b."""
        return _named(law, "concentration1", "concentration0")

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the beta law."""
        return Beta(parameters["concentration1"], parameters["concentration0"], validate_args=False)


def _named(law: Distribution, *names: str) -> dict[str, Tensor]:
    return {name: getattr(law, name) for name in names}


def _log_ratio(values: Tensor, origin: Tensor) -> Tensor:
    """log(x / o), to all digits also where x is near o."""
    off = (values - origin) / origin
    return torch.where(off.abs() < 0.5, torch.log1p(off), values.log() - origin.log())


def _moments(margin: Margin, sums: Mapping[str, Tensor], column: str) -> tuple[Tensor, Tensor]:
    shift = sums["first"] / sums["weight"]
    variance = sums["second"] / sums["weight"] - shift.square()
    if float(variance) <= 0:
        margin.refuse_constant(column)
    return shift, variance.sqrt()


def _shape(gap: float) -> float:
    """Solve log k − ψ(k) = gap > 0."""
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
    """Minimise log B(a, b) − a E[log x] − b E[log(1 − x)], which is convex."""

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
