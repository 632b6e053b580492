"""Gaussian: one normal distribution, with a full or a diagonal covariance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from whichkl._checks import InputError, cannot
from whichkl.families.family import MomentFamily, NodeFamily

Covariance = Literal["full", "diagonal"]


@dataclass(frozen=True)
class Gaussian(MomentFamily, NodeFamily):
    """q(x) = exp(−½ (x − m)ᵀ Σ⁻¹ (x − m)) / √|2πΣ|.

    Args:
        covariance: ``"full"`` (Σ any positive definite matrix) or ``"diagonal"``.

    Raises:
        InputError: another word for `covariance`.

    >>> Gaussian("diagonal")
    Gaussian(covariance='diagonal')
    """

    covariance: Covariance = "full"

    def __post_init__(self) -> None:
        """Check the one field."""
        check_covariance(self.covariance)

    @property
    def label(self) -> str:
        """Such as ``"a full Gaussian"``."""
        return f"a {self.covariance} Gaussian"

    def statistics(
        self, x: Float[Tensor, "m d"], w: Float[Tensor, " m"], origin: Float[Tensor, " d"], context: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return Σw, Σ w (x − o) and Σ w (x − o)(x − o)ᵀ, of which a diagonal covariance needs the diagonal alone."""
        y = x - origin
        second = w @ y.square() if self.covariance == "diagonal" else (w[:, None] * y).T @ y
        return {"rows": (w > 0).sum(), "weight": w.sum(), "first": w @ y, "second": second}

    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, " d"], names: Sequence[str]) -> Distribution:
        """Return argmax Σ wᵢ log q(xᵢ): the weighted mean and covariance (division by Σw, not by one less).

        Raises:
            InputError: too few rows, a constant column, or a singular covariance.
        """
        dim = len(origin)
        self.check_count(int(sums["rows"]), dim)
        shift = sums["first"] / sums["weight"]
        second = sums["second"] / sums["weight"]
        power = second if self.covariance == "diagonal" else second.diagonal()
        self.refuse_constant((power == 0).nonzero().flatten().tolist(), names)
        if self.covariance == "diagonal":
            return gaussian(origin + shift, torch.diag((second - shift.square()).sqrt()), self.covariance)
        return gaussian(origin + shift, _cholesky(second - torch.outer(shift, shift)), self.covariance)

    def minimum_rows(self, dim: int) -> int:
        """Return d + 1 for a full covariance, 2 for a diagonal one."""
        return dim + 1 if self.covariance == "full" else 2

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse too few rows, a constant column and, where Σ is full, columns that determine each other.

        Raises:
            InputError: as said.
        """
        super().check_samples(x, names)
        if self.covariance == "diagonal" or x.shape[1] == 1:
            return
        scaled = (x - x.mean(0)) / x.std(0)
        eigenvalues, vectors = torch.linalg.eigh(scaled.T @ scaled / len(x))
        if float(eigenvalues[0]) < 1e-12 * float(eigenvalues[-1]):
            involved = (vectors[:, 0].abs() > 1e-3).nonzero().flatten().tolist()
            which = ", ".join(f"`{names[i]}`" for i in involved)
            because = f"the columns {which} are linearly dependent, so the covariance is singular"
            raise InputError(cannot(f"fit `{self}`", because, "Drop one of them, or use Gaussian('diagonal')"))

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return `loc` (d,) and `scale_tril` (d, d), the Cholesky factor of Σ."""
        loc, tril = loc_and_tril(model)
        return {"loc": loc, "scale_tril": tril}

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from `loc` and `scale_tril`."""
        return gaussian(parameters["loc"], parameters["scale_tril"], self.covariance)

    def pack(self, model: Distribution) -> Float[Tensor, " k"]:
        """Write m, log diag L and, where Σ is full, L's strict lower triangle."""
        loc, tril = loc_and_tril(model)
        return pack_gaussian(loc, tril, self.covariance)

    def unpack(self, theta: Float[Tensor, " k"], dim: int) -> Distribution:
        """Read the vector that `pack` writes."""
        return gaussian(*unpack_gaussian(theta, dim, self.covariance), self.covariance)

    def nodes(
        self, model: Distribution, z: Float[Tensor, "m d"], w: Float[Tensor, " m"]
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
        """Return m + L z with the same weights."""
        loc, tril = loc_and_tril(model)
        return loc + z @ tril.T, w

    def affine(self, model: Distribution, shift: Float[Tensor, " d"], scale: Float[Tensor, "d d"]) -> Distribution:
        """Return N(shift + scale · m, (scale · L)(scale · L)ᵀ)."""
        loc, tril = loc_and_tril(model)
        return gaussian(shift + scale @ loc, scale @ tril, self.covariance)

    def whitening(self, model: Distribution) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Return m and L."""
        return loc_and_tril(model)


def gaussian(loc: Tensor, tril: Tensor, covariance: Covariance) -> Distribution:
    """Build the torch distribution N(m, LLᵀ)."""
    if covariance == "full":
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)
    return Independent(Normal(loc, tril.diagonal(dim1=-2, dim2=-1), validate_args=False), 1, validate_args=False)


def loc_and_tril(model: Distribution) -> tuple[Tensor, Tensor]:
    """Return (…, d) means and (…, d, d) Cholesky factors of a (batch of) Gaussian model(s)."""
    if isinstance(model, MultivariateNormal):
        return model.loc, model.scale_tril
    if isinstance(model, Independent) and isinstance(model.base_dist, Normal):
        return model.base_dist.loc, torch.diag_embed(model.base_dist.scale)
    because = f"it is a `{type(model).__name__}`"
    raise InputError(cannot("read a Gaussian from this model", because, "Use a MultivariateNormal or Independent(Normal, 1)"))


def pack_gaussian(loc: Tensor, tril: Tensor, covariance: Covariance) -> Float[Tensor, " k"]:
    """Write (m, L) as one vector: m, log diag L, strict lower triangle of L."""
    parts = [loc, tril.diagonal().log()]
    if covariance == "full":
        row, column = torch.tril_indices(len(loc), len(loc), -1)
        parts.append(tril[row, column])
    return torch.cat(parts)


def unpack_gaussian(theta: Tensor, dim: int, covariance: Covariance) -> tuple[Tensor, Tensor]:
    """Read (m, L) back from the vector."""
    tril = torch.diag(theta[dim : 2 * dim].exp())
    if covariance == "full":
        row, column = torch.tril_indices(dim, dim, -1)
        tril = tril.index_put((row, column), theta[2 * dim :])
    return theta[:dim], tril


def size(dim: int, covariance: Covariance) -> int:
    """The number of free parameters of one Gaussian."""
    return 2 * dim + (dim * (dim - 1) // 2 if covariance == "full" else 0)


def entropy(tril: Float[Tensor, "... d d"]) -> Float[Tensor, ...]:
    """Differential entropy of N(·, LLᵀ) in nats: ½ d (1 + log 2π) + log|L|."""
    dim = tril.shape[-1]
    volume: Tensor = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = 0.5 * dim * (1 + math.log(2 * math.pi))
    return volume + constant


def check_covariance(word: str) -> None:
    """Refuse another word than ``full`` or ``diagonal``.

    Raises:
        InputError: as said.
    """
    if word not in ("full", "diagonal"):
        raise InputError(cannot(f"use `covariance={word!r}`", "it isn't a known shape", "Choose 'full' or 'diagonal'"))


def _cholesky(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    tril: Tensor
    tril, info = torch.linalg.cholesky_ex(covariance)
    if int(info) != 0:
        because = "the covariance of the samples is singular"
        raise InputError(cannot("fit a full Gaussian", because, "Give more samples, or use Gaussian('diagonal')"))
    return tril
