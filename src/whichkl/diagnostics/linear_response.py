"""Linear response: the covariance that a mean-field fit implies by how its means respond to a tilt of the target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, TargetError, as_int, cannot
from whichkl.diagnostics.result import Diagnostics
from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import diagonal_parts
from whichkl.objectives import Objective, ReverseKL
from whichkl.solvers.nodes.mean_field import diagonal_average
from whichkl.solvers.nodes.vector_elbo import DiagonalAverage
from whichkl.targets import Target

_STEP = 1e-4
"""Step of central differences of gradients, in units of the metric."""
_MAX_RESIDUAL = 1e-9
_COLUMNS_PER_GROUP = 64
"""Number of columns that are solved for together."""
_MAX_DIM_OF_HESSIAN = 1_000
_EXPECTED_STEPS = 20
"""Steps of conjugate gradients per column by which their cost is compared with that of the whole Hessian."""
_MAX_DIM_AFTER_FIT = 200
"""Largest dimension in which the spreads of all columns are compared after every fit."""
_MIN_NODES = 64
_MAX_BEND_RATIO = 3.0
"""Largest ratio of −s² E[∂² log p] to its value 1 at the fit of a smooth density, either way."""
_MAX_ROWS_OF_COVARIANCE = 500
_DO = "take the linear response of this fit"
_KINKS = cannot(
    _DO,
    "the second derivatives of log p contradict the scales of q: it has kinks, where derivatives say nothing",
    "Smooth them, or use Gaussian('full')",
)
_BENT = cannot(
    _DO, "−ELBO has negative curvature there, so the fit isn't a minimum of it", "Fit with other seeds, or a richer family"
)


def linear_response(
    target: Target | None,
    family: Family,
    objective: Objective,
    diagnostics: Diagnostics,
    columns: Sequence[int | str] | None,
    seed: int,
) -> Float[Tensor, "k d"]:
    """Return rows of Σ = ∂E_q[x] / ∂t, where log p is tilted by tᵀx: the block of the means in the inverse Hessian of −ELBO.

    At the minimum of F(m, log s) on the nodes, Σ = [∇²F]⁻¹ in the rows and columns of m: −∂²F/∂m² is E_q[∇² log p], whose
    inverse has the correlations that q lacks, and the scales respond too. On a Gaussian target it is the exact covariance with
    any number of nodes. In coordinates where q is N(0, I), second derivatives are central differences of gradients:
    the whole Hessian for many columns of few dimensions, 4 d evaluations of all nodes; else conjugate gradients, two
    evaluations a step and column, in memory linear in d.

    Raises:
        InputError: it isn't a mean-field fit by reverse KL, a column isn't known, or there are too many columns.
        TargetError: there is no target, the fit isn't a minimum, log p has kinks, or nine digits can't be reached.

    Source: Giordano, Broderick & Jordan (2018), "Covariances, robustness, and variational Bayes"; Giordano, Ingram &
    Broderick (2024).
    """
    if not (isinstance(objective, ReverseKL) and isinstance(family, Gaussian) and family.covariance == "diagonal"):
        because = f"it minimised {objective.name} over {family}, and only mean field's means answer for its spreads"
        raise InputError(cannot(_DO, because, 'Use `fit(target, Gaussian("diagonal"), objective="reverse_kl")`'))
    if target is None:
        raise TargetError(cannot(_DO, "a loaded fit has no log density", "Pass `target=`, what was fitted"))
    free, model = target.unconstrained(), diagnostics.optima[0].model
    if tuple(model.event_shape) != (free.dim,):
        because = f"the target has {free.dim} free coordinates, and the fit {model.event_shape[0]}"
        raise InputError(cannot(_DO, because, "Pass the target that was fitted"))
    rows = _numbers(columns, free)
    average, theta, dim = diagonal_average(free, diagnostics.nodes or _MIN_NODES, seed), _parameters(model), free.dim
    unit = average.metric(theta[None])[0]
    if dim <= _MAX_DIM_OF_HESSIAN and 2 * dim <= _EXPECTED_STEPS * len(rows):
        hessian = _hessian(average, theta, unit)
        if _has_kinks(hessian.diagonal()[:dim]):
            raise TargetError(_KINKS)
        inverse = _inverse(hessian)
        if inverse is None:
            raise TargetError(_BENT)
        return (unit[:dim, None] * inverse[:dim, :dim] * unit[:dim])[rows]
    groups = torch.tensor(rows, dtype=torch.int64, device="cpu").split(_COLUMNS_PER_GROUP)
    return torch.cat([_solved(average, theta, unit, group) for group in groups])


def _numbers(columns: Sequence[int | str] | int | str | None, free: Target) -> list[int]:
    """Return the numbers of columns that are named or numbered; None is all of them."""
    if columns is None and free.dim > _MAX_ROWS_OF_COVARIANCE:
        because = f"all of it would be {free.dim:,} × {free.dim:,} numbers"
        raise InputError(cannot(_DO, because, f"Name up to {_MAX_ROWS_OF_COVARIANCE} `columns=`"))
    found = []
    columns = as_int(columns)
    is_list = hasattr(columns, "__len__") and getattr(columns, "ndim", 1) == 1
    if not is_list and not isinstance(columns, (str, int, type(None))):
        because = f"a `{type(columns).__name__}` names no columns"
        raise InputError(cannot("take the linear response there", because, f"Give names, or numbers below {free.dim}"))
    for column in [columns] if isinstance(columns, (str, int)) else range(free.dim) if columns is None else map(as_int, columns):
        if isinstance(column, str) and column in free.names:
            found.append(free.names.index(column))
        elif isinstance(column, int) and not isinstance(column, bool) and -free.dim <= column < free.dim:
            found.append(column % free.dim)
        else:
            because = f"there is no column {column!r} among {', '.join(free.names[:5])}{', …' if free.dim > 5 else ''}"
            raise InputError(cannot("take the linear response there", because, f"Give names, or numbers below {free.dim}"))
    if not found:
        raise InputError(cannot(_DO, "no column is named", "Name one, or leave `columns=` out"))
    return found


def _parameters(model: Distribution) -> Float[Tensor, " p"]:
    """Return the means and the logarithms of the scales."""
    loc, scale = (part.to(torch.float64) for part in diagonal_parts(model))
    return torch.cat([loc, scale.log()])


def _solved(average: DiagonalAverage, theta: Tensor, unit: Tensor, rows: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
    """Run conjugate gradients for several right-hand sides together, each until it is solved."""
    dim = len(theta) // 2
    every = torch.arange(len(rows), device="cpu")
    left = theta.new_zeros(len(rows), 2 * dim)
    left[every, rows.to(left.device)] = 1.0
    answer, along, squared = torch.zeros_like(left), left.clone(), torch.ones_like(left[:, 0])
    running = every
    for _ in range(max(100, 4 * dim)):
        bent = _bent(average, theta, unit, along[running])
        bend = (along[running] * bent).sum(-1)
        if running is every and _has_kinks(bend):
            raise TargetError(_KINKS)
        if not bool((bend > 0).all()):
            raise TargetError(_BENT)
        rate = (squared[running] / bend)[:, None]
        answer[running] += rate * along[running]
        left[running] -= rate * bent
        after = left[running].square().sum(-1)
        along[running] = left[running] + (after / squared[running])[:, None] * along[running]
        squared[running] = after
        running = running[(after > _MAX_RESIDUAL**2).cpu()]
        if len(running) == 0:
            covariance: Tensor = unit[rows, None] * answer[:, :dim] * unit[:dim]
            return covariance
    because = f"conjugate gradients reached {float(squared.max().sqrt()):.1e} of the right-hand side, not {_MAX_RESIDUAL:.0e}"
    instead = "Scale the coordinates of the target alike, smooth its kinks, or use Gaussian('full')"
    raise TargetError(cannot(_DO, because, instead))


def _bent(average: DiagonalAverage, theta: Tensor, unit: Tensor, along: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
    """Hessian of −ELBO times directions, in units of the metric, by central differences of gradients."""
    size = _STEP * math.sqrt(len(theta)) / torch.linalg.vector_norm(along, dim=-1, keepdim=True).clamp(min=1e-300)
    step = size * unit * along
    (_, ahead), (_, behind) = average(theta + step), average(theta - step)
    bent: Tensor = unit * (ahead - behind) / (2 * size)
    return bent


def spread_ratios(target: Target, model: Distribution, seed: int) -> Float[Tensor, " d"] | None:
    """Return the ratio of each column's standard deviation by linear response to q's; None above 200 dimensions or off a minimum.

    The whole Hessian on few nodes, 4 d evaluations of them.
    """
    if not 1 < target.dim <= _MAX_DIM_AFTER_FIT:
        return None
    dim, theta = target.dim, _parameters(model)
    # four nodes per dimension, as a power of 2
    average = diagonal_average(target, max(_MIN_NODES, 1 << (4 * dim - 1).bit_length()) if dim <= 32 else _MIN_NODES, seed)
    hessian = _hessian(average, theta, average.metric(theta[None])[0])
    inverse = None if _has_kinks(hessian.diagonal()[:dim]) else _inverse(hessian)
    return None if inverse is None else inverse.diagonal()[:dim].sqrt()


def _hessian(average: DiagonalAverage, theta: Float[Tensor, " p"], unit: Float[Tensor, " p"]) -> Float[Tensor, "p p"]:
    """The whole Hessian in units of the metric."""
    eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    hessian = torch.cat([_bent(average, theta, unit, rows) for rows in eye.split(_COLUMNS_PER_GROUP)])
    return (hessian + hessian.T) / 2


def _inverse(hessian: Float[Tensor, "p p"]) -> Float[Tensor, "p p"] | None:
    """Return the inverse; None where the Hessian isn't positive definite."""
    tril, failed = torch.linalg.cholesky_ex(hessian)
    return None if int(failed) or not bool(tril.isfinite().all()) else torch.cholesky_inverse(tril)


def _has_kinks(bends: Float[Tensor, " k"]) -> bool:
    """Whether −s² E[∂² log p] is far from 1, its value at the fit of a smooth density (Price's theorem), up to the nodes."""
    return not bool(((bends > 1 / _MAX_BEND_RATIO) & (bends < _MAX_BEND_RATIO)).all())
