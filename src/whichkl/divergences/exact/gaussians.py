"""Gaussians: their divergences of any dimension, as sums without cancellation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from whichkl.divergences.estimate import Estimate
from whichkl.divergences.kinds import IntegralDivergence

_EPS = 2.0**-52
_MAX_DENSE = 2_000
"""Largest dimension at which a low-rank covariance is written out."""
_MAX_PRECISE = 30
"""Largest dimension of matrices in mpmath's numbers, which take a tenth of a second there."""
_ENOUGH = 1e-12
"""Relative error from which matrices are taken in mpmath's numbers."""
_DIGITS = (50, 100, 200)


@dataclass(frozen=True)
class _Gaussian:
    """A mean, and a root of the covariance: standard deviations (d,), or a lower triangular matrix (d, d)."""

    mean: Float[Tensor, " d"]
    root: Tensor
    given: Distribution

    @property
    def full(self) -> Float[Tensor, "d d"]:
        return self.root.diag() if self.root.ndim == 1 else self.root

    def noise(self) -> float:
        """Relative rounding error of the root: by Cholesky it's that of the covariance times its condition."""
        if self.root.ndim == 1:
            return _EPS
        power = 1 if _given(self.given) == "scale_tril" else 2
        return _EPS * len(self.mean) * float(torch.linalg.cond(self.root)) ** power


def gaussian_kl(p: Distribution, q: Distribution) -> tuple[float, float] | None:
    """KL(p‖q) of two Gaussians of any dimension in nats, and its rounding error; None for other laws.

    With E = L_q⁻¹ (L_p − L_q) and the difference of means δ it's ½ (Σᵢ (Eᵢᵢ² + 2 (Eᵢᵢ − log(1 + Eᵢᵢ))) + Σ_{i>j} Eᵢⱼ² +
    |L_q⁻¹ δ|²): no term is negative, so that nothing cancels where p is close to q. Matrices whose condition costs digits are
    taken in mpmath's numbers, up to 30 dimensions.

    >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
    >>> gaussian_kl(Normal(zero, one), Normal(2.0**-30 * one, one))[0] == 2.0**-61
    True
    """
    one, other = _read(p), _read(q)
    if one is None or other is None or one.mean.shape != other.mean.shape:
        return None
    shift = one.mean - other.mean
    if one.root.ndim == other.root.ndim == 1:
        gap = (one.root - other.root) / other.root
        value = float((shift / other.root).square().sum() + _spread(one.root, other.root, gap).sum()) / 2
        return value, 0.0 if math.isfinite(value) else math.inf
    solved = torch.linalg.solve_triangular(other.full, one.full - other.full, upper=False)
    moved = torch.linalg.solve_triangular(other.full, shift[:, None], upper=False)
    spread = _spread(one.full.diagonal(), other.full.diagonal(), solved.diagonal())
    value = float(moved.square().sum() + solved.tril(-1).square().sum() + spread.sum()) / 2
    error = max(one.noise(), other.noise()) * (math.sqrt(2 * value) + 2 * value)
    if error > _ENOUGH * value and len(shift) <= _MAX_PRECISE:
        precise = _precise(one, other)
        if precise is not None:
            return precise, 0.0
    return value, error


def _spread(first: Tensor, last: Tensor, gap: Tensor) -> Tensor:
    """r² − 1 − 2 log r, r = first / last = 1 + gap, from the gap where it is small."""
    near, ratio = gap.abs() < 0.5, first / last
    small = torch.where(near, gap, 0.0)
    return torch.where(near, small.square() + 2 * _log_excess(small), ratio.square() - 1 - 2 * (first.log() - last.log()))


def _log_excess(x: Tensor) -> Tensor:
    """X − log(1 + x), by its series where both agree to several digits."""
    small = torch.where(x.abs() < 0.02, x, 0.0)
    series = torch.zeros_like(x)
    for k in range(11, 1, -1):
        series = small * series + (-1) ** k / k
    return torch.where(x.abs() < 0.02, small.square() * series, x - x.log1p())


def gaussian(p: Distribution, q: Distribution, kind: IntegralDivergence) -> Estimate | None:
    """Rényi, squared Hellinger and χ² of two Gaussians of any dimension; None for other kinds and other laws.

    In coordinates in which Σ_p = I and Σ_q = diag(1 + εᵢ), with the difference of means δ, Rényi's divergence of order a is
    Σᵢ a/2 δᵢ² / (1 + aεᵢ) + (log(1 + aεᵢ) − a log(1 + εᵢ)) / 2(1 − a), ∞ where some 1 + aεᵢ isn't positive;
    Hellinger is 1 − exp(−D_½ / 2) and χ² is exp(D_2) − 1. Source: Gil, Alajaji & Linder (2013).
    """
    order = {"hellinger": 0.5, "chi_squared": 2.0, "renyi": getattr(kind, "order", None)}.get(kind.name)
    one, other = _read(p), _read(q)
    if order is None or one is None or other is None or one.mean.shape != other.mean.shape:
        return None
    shift = other.mean - one.mean
    if one.root.ndim == other.root.ndim == 1:
        gap = (other.root - one.root) / one.root
        excess, moved = gap * (2 + gap), shift / one.root
    else:
        solved = torch.linalg.solve_triangular(one.full, other.full - one.full, upper=False)
        excess, basis = torch.linalg.eigh(solved + solved.T + solved @ solved.T)
        moved = basis.T @ torch.linalg.solve_triangular(one.full, shift[:, None], upper=False)[:, 0]
    mixed = 1 + order * excess
    if bool((mixed <= 0).any()):
        note = f"{kind.formula} grows in a direction where p is too wide for q (order × Σ_q + (1 − order) × Σ_p isn't positive)"
        return Estimate.settled(kind.name, math.inf, "closed form", note)
    # log(1 + aε) − a log(1 + ε) by what each logarithm lacks of its argument: the arguments themselves cancel.
    logs = order * _log_excess(excess) - _log_excess(order * excess)
    renyi = float((order / 2 * moved.square() / mixed).sum() + logs.sum() / (2 * (1 - order)))
    if kind.name == "chi_squared" and renyi > 700:
        return None  # it is finite, and beyond the largest float64
    value = -math.expm1(-renyi / 2) if kind.name == "hellinger" else math.expm1(renyi) if kind.name == "chi_squared" else renyi
    noise = max(one.noise(), other.noise())
    return with_error(Estimate.settled(kind.name, value, "closed form"), noise * (math.sqrt(2 * abs(renyi)) + 2 * abs(value)))


def with_error(found: Estimate, error: float) -> Estimate | None:
    """Return a closed form with its rounding error: exact where that is below a millionth of it; None where no digits are left.

    It's 0 rather than below 0.
    """
    value = max(found.value, 0.0)
    if not error <= max(0.01 * value, 1e-3):
        return None
    if error <= max(1e-6 * value, 1e-12):
        return replace(found, value=value)
    note = f"rounding error at most {error:.1g}: terms that are larger than their sum cancel"
    return replace(found, value=value, stderr=error, exact=False, notes=(*found.notes, note))


def _given(p: Distribution) -> str:
    """The parameter by which a multivariate Gaussian was given: torch keeps the others that were asked for after it."""
    names = ("scale_tril", "covariance_matrix", "precision_matrix", "_unbroadcasted_cov_factor")
    return next((name for name in vars(p) if name in names), "")


def _read(p: Distribution) -> _Gaussian | None:
    base = p.base_dist if isinstance(p, Independent) else p
    if isinstance(base, Normal) and len(p.event_shape) <= 1 and p.batch_shape == ():
        mean, scale = (one.detach().cpu().to(torch.float64).reshape(-1) for one in (base.loc, base.scale))
        return _Gaussian(mean, scale, p)
    if not isinstance(p, (MultivariateNormal, LowRankMultivariateNormal)) or p.batch_shape != ():
        return None
    if len(p.loc) > _MAX_DENSE and isinstance(p, LowRankMultivariateNormal):
        return None
    given = _given(p)
    value = getattr(p, given).detach().cpu().to(torch.float64)
    if given == "_unbroadcasted_cov_factor":
        value = value @ value.T + cast(Any, p)._unbroadcasted_cov_diag.detach().cpu().to(torch.float64).diag()
    elif given == "precision_matrix":
        value = torch.linalg.inv(value)
    root, failed = (value, False) if given == "scale_tril" else torch.linalg.cholesky_ex(value)
    return None if failed else _Gaussian(p.loc.detach().cpu().to(torch.float64), root.reshape(len(p.loc), -1), p)


def _precise(one: _Gaussian, other: _Gaussian) -> float | None:
    """The same in as many digits as it takes; None where a covariance isn't positive definite in them."""
    import mpmath as mp  # it takes a tenth of a second to import

    shift = [mp.mpf(a) - mp.mpf(b) for a, b in zip(one.mean.tolist(), other.mean.tolist(), strict=True)]
    previous = None
    for digits in _DIGITS:
        with mp.workdps(digits):
            try:
                first, last = _precise_root(one), _precise_root(other)
            except (ValueError, ZeroDivisionError):
                return None
            solved = [_solved(last, column) for column in (*zip(*first, strict=True), shift)]
            squares = mp.fsum(v**2 for column in solved for v in column)
            logs = 2 * mp.fsum(mp.log(first[j][j] / last[j][j]) for j in range(len(shift)))
            value = (squares - len(shift) - logs) / 2
            if previous is not None and abs(value - previous) <= 1e-17 * abs(value):
                return float(value)
            previous = value
    return None


def _solved(root: list[list[Any]], column: Sequence[Any]) -> list[Any]:
    """Solve a lower triangular system by forward substitution."""
    found: list[Any] = []
    for row, value in zip(root, column, strict=True):
        known = sum(a * b for a, b in zip(row, found, strict=False))
        found.append((value - known) / row[len(found)])
    return found


def _precise_root(p: _Gaussian) -> list[list[Any]]:
    import mpmath as mp

    if p.root.ndim == 1:
        return mp.diag(p.root.tolist()).tolist()  # type: ignore[no-any-return]
    given, law = _given(p.given), cast(Any, p.given)
    value = mp.matrix(getattr(law, given).detach().cpu().to(torch.float64).tolist())
    if given == "_unbroadcasted_cov_factor":
        value = value * value.T + mp.diag(law._unbroadcasted_cov_diag.detach().cpu().to(torch.float64).tolist())
    elif given != "scale_tril":
        value = value**-1 if given == "precision_matrix" else (value + value.T) / 2
    return (value if given == "scale_tril" else mp.cholesky(value)).tolist()  # type: ignore[no-any-return]
