"""Margins of real numbers: normal, Laplace, log-normal, exponential, gamma and beta."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.distributions import Beta, Exponential, Gamma, Laplace, LogNormal, Normal

from whichkl.families.margins import Margin, Sums
from whichkl.families.value_ranges import INSIDE_UNIT, NOT_NEGATIVE, POSITIVE, REAL


class NormalMargin(Margin):
    """N(m, s): the mean and the standard deviation (division by Σw)."""

    name, values = "normal", REAL
    distribution, parameter_names = Normal, ("loc", "scale")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w (x − o) and Σ w (x − o)²."""
        return _moments(x - origin, w)

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """M = o + E(x − o), s = √Var."""
        shift, sd = _mean_and_sd(self, sums, column)
        return {"loc": origin + shift, "scale": sd}


class LogNormalMargin(Margin):
    """log x ~ N(m, s)."""

    name, values, inner_value = "lognormal", POSITIVE, 1.0
    distribution, parameter_names = LogNormal, ("loc", "scale")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w log(x / o) and Σ w log²(x / o)."""
        return _moments(_log_ratio(x, origin), w)

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """M = log o + E log(x / o), s = √Var."""
        shift, sd = _mean_and_sd(self, sums, column)
        return {"loc": origin.log() + shift, "scale": sd}


class LaplaceMargin(Margin):
    """exp(−|x − m| / b) / 2b: m the weighted median, b the mean distance from it."""

    name, values, about_median = "laplace", REAL, True
    distribution, parameter_names = Laplace, ("loc", "scale")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w |x − o|, where o is the median."""
        return {"distance": w @ (x - origin).abs()}

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """M = o, b = E|x − o|."""
        scale = sums["distance"] / sums["weight"]
        if float(scale) <= 0:
            self.refuse_constant(column)
        return {"loc": origin, "scale": scale}


class ExponentialMargin(Margin):
    """λ exp(−λx): λ = 1 / mean."""

    name, values = "exponential", NOT_NEGATIVE
    distribution, parameter_names = Exponential, ("rate",)

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w x."""
        return {"total": w @ x}

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """λ = Σw / Σ w x."""
        if float(sums["total"]) <= 0:
            self.refuse(column, "all its values are 0, so its density is unbounded")
        return {"rate": sums["weight"] / sums["total"]}


class GammaMargin(Margin):
    """∝ xᵏ⁻¹ exp(−λx): log k − ψ(k) = log E[x] − E[log x], and λ = k / E[x]. Source: Choi & Wette (1969)."""

    name, values, inner_value = "gamma", POSITIVE, 1.0
    distribution, parameter_names = Gamma, ("concentration", "rate")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w (x / o − 1) and Σ w log(x / o)."""
        return {"first": w @ ((x - origin) / origin), "logs": w @ _log_ratio(x, origin)}

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """Solve for the shape k by Newton's method in log k."""
        mean = sums["first"] / sums["weight"]
        gap = float(torch.log1p(mean) - sums["logs"] / sums["weight"])
        if gap <= 1e-15:
            self.refuse_constant(column)
        shape = origin.new_tensor(_gamma_shape(gap))
        return {"concentration": shape, "rate": shape / (origin * (1 + mean))}


class BetaMargin(Margin):
    """∝ xᵃ⁻¹ (1 − x)ᵇ⁻¹: ψ(a) − ψ(a + b) = E[log x] and ψ(b) − ψ(a + b) = E[log(1 − x)]."""

    name, values, inner_value = "beta", INSIDE_UNIT, 0.5
    distribution, parameter_names = Beta, ("concentration1", "concentration0")

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w log x and Σ w log(1 − x), and the moments about o, for the start."""
        return {**_moments(x - origin, w), "log": w @ x.log(), "log_rest": w @ torch.log1p(-x)}

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """Solve both equations by Newton's method, from the law with the same mean and variance."""
        shift, sd = _mean_and_sd(self, sums, column)
        mean, variance = float(origin + shift), float(sd) ** 2
        total = max(mean * (1 - mean) / variance - 1, 1e-3)
        logs = np.array([float(sums["log"] / sums["weight"]), float(sums["log_rest"] / sums["weight"])])
        a, b = _beta_shapes(np.array([mean, 1 - mean]) * total, logs)
        return {"concentration1": origin.new_tensor(a), "concentration0": origin.new_tensor(b)}


def _moments(y: Tensor, w: Tensor) -> Sums:
    return {"first": w @ y, "second": w @ y.square()}


def _mean_and_sd(margin: Margin, sums: Mapping[str, Tensor], column: str) -> tuple[Tensor, Tensor]:
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
