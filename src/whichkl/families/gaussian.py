"""Gaussian: one normal distribution, with a full, a diagonal or a low-rank covariance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from whichkl._checks import InputError, cannot
from whichkl.families.factors import maximum_likelihood_factors
from whichkl.families.family import MomentFamily
from whichkl.families.field_checks import check_choice, check_whole, expect, refuse_dependent

Covariance = Literal["full", "diagonal", "low_rank"]
_MAX_SHIFT = 10.0
"""Largest distance, in standard deviations, of the mean from 0 for sums of squares about 0; they lose two digits there."""

_MAX_COLUMNS_FOR_NUMPY = 32
"""Largest width of a product by NumPy; wider ones are shared among BLAS's threads, whose number would change the last digit."""


@dataclass(frozen=True)
class Gaussian(MomentFamily):
    """q(x) = exp(−½ (x − m)ᵀ Σ⁻¹ (x − m)) / √|2πΣ|.

    Args:
        covariance: ``"full"`` (Σ any positive definite matrix), ``"diagonal"``, or ``"low_rank"`` (Σ = WWᵀ + D with W of shape
            (d, rank) and D diagonal: factor analysis).
        rank: the number of factors, the columns of W; for ``"low_rank"`` alone, where it must be below d.

    Raises:
        InputError: another word for `covariance`, or a rank that doesn't go with it.

    >>> Gaussian("diagonal")
    Gaussian(covariance='diagonal')
    >>> Gaussian("low_rank", rank=2)
    Gaussian(covariance='low_rank', rank=2)
    """

    covariance: Covariance = "full"
    rank: int | None = None

    def __post_init__(self) -> None:
        check_choice(self, "covariance", get_args(Covariance))
        if self.covariance == "low_rank":
            check_whole(self, "rank", "Give, say, rank=2")
        elif self.rank is not None:
            because = "a rank belongs to covariance='low_rank'"
            raise InputError(cannot(f"use `rank={self.rank!r}` with {self.covariance!r}", because, "Leave it out"))

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"Gaussian(covariance={self.covariance!r}{rank})"

    def config(self) -> dict[str, Any]:
        """Return the class name and the fields; no rank where there is none."""
        return {name: value for name, value in super().config().items() if value is not None}

    @property
    def label(self) -> str:
        """Such as ``"a full Gaussian"``."""
        return f"a rank-{self.rank} Gaussian" if self.rank else f"a {self.covariance} Gaussian"

    def statistics(
        self, x: Tensor, w: Tensor, origin: Tensor, context: Any = None, *, overwrite: bool = False, total: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return Σw, Σ w (x − o) and Σ w (x − o)(x − o)ᵀ, or its diagonal alone for a diagonal covariance."""
        y = x
        if total is None and bool(origin.any()):
            y = x.sub_(origin) if overwrite else x - origin
        if total is not None or all(float(end) == 1 for end in w.aminmax()):  # the usual case, at half the cost
            second = y.square().sum(0) if self.covariance == "diagonal" else gram(y)
            first, count = y.sum(0) if total is None else total, torch.tensor(len(y), dtype=torch.int64, device="cpu")
            return {"rows": count, "weight": count.to(w), "first": first, "second": second}
        second = w @ y.square() if self.covariance == "diagonal" else (w[:, None] * y).T @ y
        return {"rows": (w > 0).sum(), "weight": w.sum(), "first": w @ y, "second": second}

    def origin(self, x: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
        """Return 0 if the rows are near it, which saves a subtraction; else the first row."""
        is_near = x.mean(0).square() <= _MAX_SHIFT**2 * x.var(0, correction=0)
        return torch.zeros_like(x[0]) if bool(is_near.all()) else x[0].clone()

    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, " d"], names: Sequence[str]) -> Distribution:
        """Return argmax Σ wᵢ log q(xᵢ): the weighted mean and covariance (division by Σw, not by one less).

        For a low rank, Σ is the WWᵀ + D of maximum likelihood.
        """
        dim = len(origin)
        self.check_count(int(sums["rows"]), dim)
        shift = sums["first"] / sums["weight"]
        second = sums["second"] / sums["weight"]
        if self.covariance == "diagonal":
            variance = second - shift.square()
            self.refuse_constant(variance <= 0, names)
            return diagonal_gaussian(origin + shift, variance.sqrt())
        covariance = second - torch.outer(shift, shift)
        self.refuse_constant(covariance.diagonal() <= 0, names)
        if self.covariance == "low_rank":
            return low_rank(origin + shift, *maximum_likelihood_factors(covariance, self.rank_in(dim), names))
        refuse_dependent(self, covariance, names, "Gaussian('diagonal')")
        return gaussian(origin + shift, torch.linalg.cholesky(covariance), self.covariance)

    def minimum_rows(self, dim: int) -> int:
        """Return d + 1 for a full covariance, 2 for a diagonal one, rank + 2 for a low rank."""
        if self.covariance == "low_rank":
            return min(self.rank_in(dim) + 2, dim + 1)
        return dim + 1 if self.covariance == "full" else 2

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse too few rows, a constant column and, for a full Σ, columns that determine each other."""
        super().check_samples(x, names)
        if self.covariance == "full" and x.shape[1] > 1:
            centred = x - x.mean(0)
            refuse_dependent(self, centred.T @ centred / len(x), names, "Gaussian('diagonal')")

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return `loc` (d,) and `scale_tril` (d, d), the Cholesky factor of Σ.

        A diagonal Σ has `scale` (d,), the standard deviations; a low rank has `cov_factor` W and `cov_diag` D.
        """
        if self.covariance == "low_rank":
            loc, factor, diagonal = low_rank_parts(model)
            return {"loc": loc, "cov_factor": factor, "cov_diag": diagonal}
        if self.covariance == "diagonal":
            return dict(zip(("loc", "scale"), diagonal_parts(model), strict=True))
        loc, tril = loc_and_tril(model)
        return {"loc": loc, "scale_tril": tril}

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from what `parameters` returns; older files have `scale_tril` for a diagonal Σ too."""
        if self.covariance == "low_rank":
            return low_rank(parameters["loc"], parameters["cov_factor"], parameters["cov_diag"])
        if self.covariance == "diagonal" and "scale" in parameters:
            return diagonal_gaussian(parameters["loc"], parameters["scale"])
        return gaussian(parameters["loc"], parameters["scale_tril"], self.covariance)

    def rank_in(self, dim: int) -> int:
        """Return the rank, which must be below the dimension."""
        rank = self.rank or 0
        if rank >= dim:
            because = f"there are {dim} columns, and the rank must be smaller"
            raise InputError(cannot(f"use `{self}`", because, "Lower the rank, or use Gaussian('full')"))
        return rank


def gram(y: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
    """Return yᵀy; NumPy recognises that both factors are one matrix and computes half of it, which torch doesn't."""
    if y.shape[1] > _MAX_COLUMNS_FOR_NUMPY or y.device.type != "cpu" or y.requires_grad:
        return y.T @ y
    rows = y.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # `from_statistics` refuses infinite sums
        return torch.from_numpy(rows.T @ rows)


def gaussian(loc: Tensor, tril: Tensor, covariance: Covariance) -> Distribution:
    """Build the torch distribution N(m, LLᵀ)."""
    if covariance == "full":
        return multivariate_normal(loc, tril)
    return diagonal_gaussian(loc, tril.diagonal(dim1=-2, dim2=-1))


def multivariate_normal(loc: Float[Tensor, "*b d"], tril: Float[Tensor, "*b d d"]) -> MultivariateNormal:
    """Build N(m, LLᵀ) as torch's own `expand` builds it: the constructor imports sympy, which takes longer than many fits."""
    made = MultivariateNormal.__new__(MultivariateNormal)
    made.loc, made._unbroadcasted_scale_tril = loc, tril
    vars(made)["scale_tril"] = tril  # where torch keeps it: the class has a lazy property of this name
    Distribution.__init__(made, loc.shape[:-1], loc.shape[-1:], validate_args=False)
    return made


def diagonal_gaussian(loc: Tensor, scale: Tensor) -> Distribution:
    """Build the torch distribution N(m, diag s²)."""
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)


def low_rank(loc: Tensor, factor: Tensor, diagonal: Tensor) -> LowRankMultivariateNormal:
    """Build the torch distribution N(m, WWᵀ + D)."""
    return LowRankMultivariateNormal(loc, factor, diagonal, validate_args=False)


def low_rank_parts(model: Distribution) -> tuple[Tensor, Tensor, Tensor]:
    """Return m (d,), W (d, k) and D (d,) of a low-rank Gaussian model."""
    law = expect(model, LowRankMultivariateNormal, "a low-rank Gaussian", "Use a LowRankMultivariateNormal")
    return law.loc, law.cov_factor, law.cov_diag


def diagonal_parts(model: Distribution) -> tuple[Tensor, Tensor]:
    """Return m (d,) and s (d,) of a diagonal Gaussian model."""
    words = ("a diagonal Gaussian", "Use an Independent(Normal, 1)")
    law = expect(expect(model, Independent, *words).base_dist, Normal, *words)
    return law.loc, law.scale


def loc_and_tril(model: Distribution) -> tuple[Tensor, Tensor]:
    """Return (…, d) means and (…, d, d) Cholesky factors of a (batch of) Gaussian model(s)."""
    if isinstance(model, (MultivariateNormal, LowRankMultivariateNormal)):
        return model.loc, model.scale_tril
    loc, scale = diagonal_parts(model)
    return loc, torch.diag_embed(scale)


def entropy(tril: Float[Tensor, "... d d"]) -> Float[Tensor, ...]:
    """Differential entropy of N(·, LLᵀ) in nats: ½ d (1 + log 2π) + log|L|."""
    volume: Tensor = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return volume + 0.5 * tril.shape[-1] * (1 + math.log(2 * math.pi))
