"""Linear Gaussian: y given x is normal about a linear function of x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from whichkl.arrays import read_context
from whichkl.families.design import as_column, check_context, column_flag, context_names, refuse_degenerate
from whichkl.families.family import MomentFamily
from whichkl.families.field_checks import check_choice, expect
from whichkl.families.gaussian import Covariance, diagonal_gaussian

_MIN_RESIDUAL = 1e-12
"""Smallest share of a variance that a regression may leave; also the least ratio of eigenvalues of the residuals."""


@dataclass(frozen=True)
class LinearGaussian(MomentFamily):
    """q(y|x) = N(y; A x + b, Σ): least squares, with the mean squared residual (division by n) for Σ.

    Args:
        covariance: of the residuals of several columns of y: ``"full"`` or ``"diagonal"``.

    Raises:
        InputError: another word for `covariance`.

    Source: Gauss (1809).

    >>> x, y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[1.0], [3.1], [4.9], [7.0]])
    >>> family, w, origin = LinearGaussian(), torch.ones(4), torch.zeros(2)
    >>> model = family.from_statistics(family.statistics(y, w, origin, x), origin, ["y", "x"])
    >>> model
    LinearGaussianModel(y of 1 column given x of 1)
    >>> [round(value, 3) for value in model(torch.tensor([[10.0]])).mean.tolist()]
    [20.83]
    """

    label: ClassVar[str] = "a linear Gaussian model"
    conditional: ClassVar[bool] = True

    covariance: Covariance = "full"

    def __post_init__(self) -> None:
        check_choice(self, "covariance", ("full", "diagonal"))

    def minimum_rows(self, dim: int) -> int:
        """Return d + 2, which is enough for one column of x; each further column needs one more row."""
        return dim + 2 if self.covariance == "full" else 3

    def statistics(
        self, x: Tensor, w: Tensor, origin: Tensor, context: Tensor | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Return Σw, and the sums of (y, x) about the origin and of their products; where it has d numbers, those of x are 0."""
        given = check_context(self, context)
        origin = _padded(origin, x.shape[1] + given.shape[1])
        y, given = x - origin[: x.shape[1]], given - origin[x.shape[1] :]
        wy, wx = w[:, None] * y, w[:, None] * given
        moments = {"y": wy.sum(0), "x": wx.sum(0), "yy": wy.T @ y, "xy": wx.T @ y, "xx": wx.T @ given}
        return {"rows": (w > 0).sum(), "weight": w.sum(), **moments}

    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, " k"], names: Sequence[str]) -> Any:
        """Return the least-squares A and b, and the covariance of the residuals; the names are those of y, then of x."""
        dim, given = len(sums["y"]), len(sums["x"])
        needed = given + 1 + (dim if self.covariance == "full" else 1)
        if int(sums["rows"]) < needed:
            columns = f"{dim} columns of y and {given} columns of x"
            because = f"it needs at least {needed} rows for {columns}, and there are {sums['rows']}"
            self.refuse(because, "Give more rows, or fewer columns of x")
        at_y, at_x = (sums[name] / sums["weight"] for name in ("y", "x"))
        y = sums["yy"] / sums["weight"] - torch.outer(at_y, at_y)
        x = sums["xx"] / sums["weight"] - torch.outer(at_x, at_x)
        xy = sums["xy"] / sums["weight"] - torch.outer(at_x, at_y)
        self.refuse_constant(y.diagonal() <= 0, names)
        refuse_degenerate(self, x, context_names(names[dim:], given))
        sd = x.diagonal().sqrt()
        weight = (torch.linalg.solve(x / torch.outer(sd, sd), xy / sd[:, None]) / sd[:, None]).T
        residual = y - weight @ xy
        scale = y.diagonal().sqrt()
        is_flat = (residual.diagonal() <= _MIN_RESIDUAL * y.diagonal()).tolist()
        if any(is_flat):
            because = f"x determines column `{names[is_flat.index(True)]}` of y exactly, so its density is unbounded"
            self.refuse(because, "Drop that column of y, or the columns of x that determine it")
        if self.covariance == "diagonal":
            tril = torch.diag(residual.diagonal().sqrt())
        else:
            residual = (residual + residual.T) / 2
            unit = torch.linalg.eigvalsh(residual / torch.outer(residual.diagonal(), residual.diagonal()).sqrt())
            if float(unit[0]) < _MIN_RESIDUAL * float(unit[-1]):
                because = "the residuals of y's columns depend on each other, so their covariance is singular"
                self.refuse(because, "Drop one of them, or use LinearGaussian('diagonal')")
            tril = scale[:, None] * torch.linalg.cholesky(residual / torch.outer(scale, scale))
        mean = _padded(origin, dim + given) + torch.cat([at_y, at_x])
        return LinearGaussianModel(weight, mean[:dim] - weight @ mean[dim:], tril)

    def parameters(self, model: Any) -> dict[str, Tensor]:
        """Return `weight` A (d, c), `bias` b (d,) and `scale_tril` (d, d), the Cholesky factor of Σ."""
        law = expect(model, LinearGaussianModel, "a linear Gaussian")
        return {"weight": law.weight, "bias": law.bias, "scale_tril": law.scale_tril, **column_flag(law.column)}

    def model(self, parameters: Mapping[str, Tensor]) -> Any:
        """Build the model from what `parameters` returns."""
        p = parameters
        return LinearGaussianModel(p["weight"], p["bias"], p["scale_tril"], "column" in p)


@dataclass(frozen=True, repr=False, eq=False)
class LinearGaussianModel:
    """x (n, c) ↦ N(A x + b, Σ), n rows: event shape () where y came as (n,), else (d,)."""

    weight: Float[Tensor, "d c"]
    bias: Float[Tensor, " d"]
    scale_tril: Float[Tensor, "d d"]
    column: bool = False
    """Whether y came as (n, 1), so that events have shape (1,)."""

    def __call__(self, x: Float[Tensor, "n c"]) -> Distribution:
        """Return the law of y for each row of x."""
        loc = read_context(x, self.weight.shape[1], self.weight) @ self.weight.T + self.bias
        if len(self.bias) == 1:
            law = Normal(loc[:, 0], self.scale_tril[0, 0].expand(len(loc)), validate_args=False)
            return as_column(law) if self.column else law
        if bool((self.scale_tril == torch.diag(self.scale_tril.diagonal())).all()):
            return diagonal_gaussian(loc, self.scale_tril.diagonal().expand_as(loc))
        return MultivariateNormal(loc, scale_tril=self.scale_tril, validate_args=False)

    def __repr__(self) -> str:
        d, c = self.weight.shape
        return f"LinearGaussianModel(y of {d} column{'s' * (d > 1)} given x of {c})"


def _padded(origin: Tensor, size: int) -> Tensor:
    return torch.cat([origin, origin.new_zeros(size - len(origin))]) if len(origin) < size else origin
