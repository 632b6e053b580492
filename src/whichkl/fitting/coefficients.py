"""Coefficients: those of a linear predictor of q(y|x), with standard errors by the Fisher information at the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.divergences.estimate import NORMAL
from whichkl.families.design import context_names
from whichkl.families.generalized_linear import GeneralizedLinear, GeneralizedLinearModel
from whichkl.families.linear_gaussian import LinearGaussianModel

if TYPE_CHECKING:
    from whichkl.fitting.result import Fit

_MAX_MULTIPLICATIONS = 200_000_000
"""Multiplications that standard errors may take: some tenths of a second."""
_COLUMNS = ("coef", "stderr", "low", "high")
Table = tuple[tuple[str, ...], tuple[dict[str, Any], ...], tuple[str, ...]]


def coefficients(fit: Fit) -> Table:
    """Return columns, rows and notes: a row per coefficient of a linear or generalised linear model, none for another.

    The rows of the fit are X with a column of ones. A linear Gaussian has the covariance σ² (XᵀX)⁻¹ with σ² on n − c − 1 degrees
    of freedom, as ordinary least squares has it; a generalised linear model the inverse of XᵀWX, with the variances W of y. Of K
    classes, the coefficients are those of the log odds against class 0.

    Source: Nelder & Wedderburn (1972).
    """
    model = fit.diagnostics.optima[0].model
    if not isinstance(model, (LinearGaussianModel, GeneralizedLinearModel)):
        return _COLUMNS, (), ("q(y|x) is a network, whose weights mean nothing alone: `fit.model(x)` is the law of y at rows x.",)
    weight, bias = (one.detach().to("cpu", torch.float64) for one in (model.weight, model.bias))
    is_classes = isinstance(model, GeneralizedLinearModel) and model.response == "categorical"
    table = torch.cat([bias[:, None], weight], 1)
    outputs = list(fit.names)
    if is_classes:
        table, outputs = table[1:] - table[:1], [f"class {k}" for k in range(1, len(bias))]
    errors, why = _standard_errors(fit, model, table)
    given = () if fit.target is None else fit.target.context_names
    inputs = ["intercept", *context_names(given, weight.shape[1])]
    rows = []
    for j, output in enumerate(outputs):
        for i, name in enumerate(inputs):
            coef, error = float(table[j, i]), None if errors is None else float(errors[j, i])
            ends = (None, None) if error is None else (coef - NORMAL * error, coef + NORMAL * error)
            label = name if len(outputs) == 1 else f"{output}: {name}"
            rows.append({"name": label, **dict(zip(_COLUMNS, (coef, error, *ends), strict=True))})
    notes = (
        ["2.5 % to 97.5 % is the 95 % interval by the normal approximation."] if why is None else [f"No standard errors: {why}."]
    )
    notes += ["Coefficients are of the log odds against class 0."] if is_classes else []
    notes += ["Coefficients are of y in free coordinates."] if fit.family.carried and not fit.bijection.is_real else []
    return _COLUMNS, tuple(rows), tuple(notes)


def _standard_errors(fit: Fit, model: Any, table: Float[Tensor, "k c1"]) -> tuple[Tensor | None, str | None]:
    """Return the errors in the shape of the coefficients, or why there are none."""
    target = fit.target
    if target is None or target.samples is None or target.context is None:
        return None, "the rows aren't in memory"
    if target.weights is not None or target.chains is not None or target.repeats is not None:
        return None, "rows with weights, chains or repeats aren't independent draws"
    if isinstance(fit.family, GeneralizedLinear) and fit.family.penalty > 0:
        return None, "a penalty biases the coefficients"
    n, width = len(target.samples), table.shape[1] * (len(table) if isinstance(model, GeneralizedLinearModel) else 1)
    if n * width * width > _MAX_MULTIPLICATIONS:
        return None, f"they need {n * width * width:.1e} multiplications, more than a table is worth"
    context = target.context.detach().to("cpu", torch.float64)
    x = torch.cat([torch.ones_like(context[:, :1]), context], 1)
    if isinstance(model, LinearGaussianModel):
        freedom = n - x.shape[1]
        variance = model.scale_tril.detach().to("cpu", torch.float64).square().sum(-1) * n / freedom if freedom > 0 else None
        information, scale = x.T @ x, variance
    else:
        information, scale = _information(x, x @ table.T, model.response), torch.ones(1, dtype=torch.float64, device="cpu")
    factor, failed = torch.linalg.cholesky_ex(information)
    if scale is None or bool(failed):
        return None, "the rows are too few, or the information is singular"
    spread = torch.cholesky_inverse(factor).diagonal()
    found = scale[:, None] * spread if isinstance(model, LinearGaussianModel) else spread.reshape(table.shape)
    return found.sqrt(), None


def _information(x: Float[Tensor, "n c1"], eta: Float[Tensor, "n k"], response: str) -> Tensor:
    """Return XᵀWX; of K classes that of the K − 1 log odds, whose blocks are those of diag p − p pᵀ."""
    if response == "poisson":
        return (x * eta.exp()).T @ x
    if response == "bernoulli":
        p = eta.sigmoid()
        return (x * p * (1 - p)).T @ x
    p = torch.cat([torch.zeros_like(eta[:, :1]), eta], 1).softmax(1)[:, 1:]
    blocks = [
        torch.cat([(x * (p[:, j] * (float(i == j) - p[:, i]))[:, None]).T @ x for i in range(p.shape[1])], 1)
        for j in range(p.shape[1])
    ]
    return torch.cat(blocks, 0)
