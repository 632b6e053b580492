"""StudentT: one multivariate Student-t distribution, a Gaussian whose scale is itself random; it tolerates outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Chi2, Distribution, constraints

from whichkl.families.family import Family
from whichkl.families.field_checks import check_choice, expect

SHAPES = ("full", "diagonal")


@dataclass(frozen=True)
class StudentT(Family):
    """q(x) ∝ |Σ|^(−½) (1 + (x − m)ᵀ Σ⁻¹ (x − m) / ν)^(−(ν + d)/2), ν > 0 is fitted too.

    Args:
        covariance: the shape of Σ: ``"full"``, or ``"diagonal"`` (columns uncorrelated, yet large together).

    Raises:
        InputError: another word for `covariance`.

    >>> StudentT()
    StudentT(covariance='full')
    """

    covariance: str = "full"

    def __post_init__(self) -> None:
        check_choice(self, "covariance", SHAPES)

    @property
    def label(self) -> str:
        """Such as ``"a full Student-t"``."""
        return f"a {self.covariance} Student-t"

    def minimum_rows(self, dim: int) -> int:
        """Return one row more than a Gaussian of that covariance, for ν."""
        return (dim + 1 if self.covariance == "full" else 2) + 1

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return `df` (), `loc` (d,) and `scale_tril` (d, d)."""
        law = expect(model, MultivariateStudentT, "a Student-t", "Use a MultivariateStudentT")
        return {"df": law.df, "loc": law.loc, "scale_tril": law.scale_tril}

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from `df`, `loc` and `scale_tril`."""
        return MultivariateStudentT(parameters["df"], parameters["loc"], parameters["scale_tril"], validate_args=False)


class MultivariateStudentT(Distribution):
    """The d-variate Student-t law of m + L z √(ν/g), z ~ N(0, I), g ~ χ²(ν).

    Args:
        df: ν, (…).
        loc: m, (…, d).
        scale_tril: L, (…, d, d), the Cholesky factor of the scale matrix Σ; the covariance is Σ ν/(ν − 2) where ν > 2.
        validate_args: as in torch.

    >>> law = MultivariateStudentT(torch.tensor(5.0), torch.zeros(2), torch.eye(2))
    >>> law.log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, df: Tensor, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        # torch's own function of this name loads SymPy, a third of a second
        batch = torch.Size(np.broadcast_shapes(df.shape, loc.shape[:-1], scale_tril.shape[:-2]))
        dim = loc.shape[-1]
        self.df, self.loc = df.expand(batch), loc.expand(*batch, dim)
        self.scale_tril = scale_tril.expand(*batch, dim, dim)
        super().__init__(batch, torch.Size([dim]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultivariateStudentT:
        """Return the same law with a larger batch."""
        shape = torch.Size(batch_shape)
        dim = self.loc.shape[-1]
        parts = (self.df.expand(shape), self.loc.expand(*shape, dim), self.scale_tril.expand(*shape, dim, dim))
        return MultivariateStudentT(*parts, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The location m where ν > 1; NaN elsewhere, where there is no mean."""
        return torch.where(self.df[..., None] > 1, self.loc, math.nan)

    @property
    def variance(self) -> Tensor:
        """The diagonal of the covariance; ∞ where ν ≤ 2."""
        spread = self.scale_tril.square().sum(-1)
        return torch.where(self.df[..., None] > 2, spread * (self.df / (self.df - 2))[..., None], math.inf)

    @property
    def covariance_matrix(self) -> Tensor:
        """Σ ν/(ν − 2); ∞ where ν ≤ 2."""
        scale = self.scale_tril @ self.scale_tril.mT
        return torch.where(self.df[..., None, None] > 2, scale * (self.df / (self.df - 2))[..., None, None], math.inf)

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "... d"]:
        """Draw with a gradient in all parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        z = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        g = Chi2(self.df, validate_args=False).rsample(torch.Size(sample_shape))
        return self.loc + (self.scale_tril @ z[..., None])[..., 0] * (self.df / g).sqrt()[..., None]

    def log_prob(self, value: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
        """Natural log of the density, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        dim = self.loc.shape[-1]
        apart = (value - self.loc)[..., None]
        white = torch.linalg.solve_triangular(self.scale_tril, apart, upper=False)[..., 0]
        volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = torch.lgamma((self.df + dim) / 2) - torch.lgamma(self.df / 2) - 0.5 * dim * (self.df * math.pi).log()
        inside: Tensor = constant - volume - (self.df + dim) / 2 * torch.log1p(white.square().sum(-1) / self.df)
        return inside
