"""Cross-fitted logistic regression of x against y on quadratic features: the log ratio log p/q at rows that it hasn't seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

MIN_ROWS = 20
"""Fewest rows of a sample."""
Parts = list[tuple[Tensor, Tensor, Tensor, Tensor]]
"""Per fold: which rows were held out, the features of all rows, the residuals of the others, and the fit's Cholesky factor."""
MAX_EXPONENT = 350.0
"""Largest exponent of a ratio: its square is still a float64."""
_PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6)
_COSINES = 60
_MAX_COLUMNS_OF_FINER_FEATURES = 100
_MAX_COLUMNS_OF_BENDS = 10
_COSINE_PENALTY = 10.0
"""Factor by which the ridge penalty of further features is larger."""


def cross_fit(
    z: Tensor,
    n: int,
    folds: int,
    full: bool,
    generator: torch.Generator,
    rounds: int | None = None,
    more: Tensor | None = None,
    fold: Tensor | None = None,
) -> tuple[Tensor, Parts]:
    """Fit on all folds but one and read ℓ on that one, in turn; return ℓ, NaN on folds beyond `rounds`, and the parts.

    Further features, `more`, are penalised ten times as much. The fold of each row is random by default.
    """
    extra = 0 if more is None else more.shape[1]
    i, j = (
        torch.triu_indices(z.shape[1], z.shape[1], device="cpu") if full else torch.arange(z.shape[1], device="cpu").expand(2, -1)
    )
    features = torch.cat([torch.ones_like(z[:, :1]), z, z[:, i] * z[:, j], *([] if more is None else [more])], 1)
    features[:, 1:] = (features[:, 1:] - features[:, 1:].mean(0)) / features[:, 1:].std(0).clamp(min=1e-9)
    is_x = (torch.arange(len(z), device=z.device) < n).to(z.dtype)
    if fold is None:
        fold = torch.cat([torch.randperm(count, generator=generator, device="cpu") % folds for count in (n, len(z) - n)])
    fold = fold.to(z.device)
    ratio, parts = torch.full_like(z[:, 0], math.nan), []
    for held in (fold == k for k in range(rounds or folds)):
        known, label = features[~held], is_x[~held]
        beta, ridge = fit_logistic(known, label, generator, extra)
        factor = torch.linalg.cholesky(_curvature(known, known @ beta) + ridge)
        ratio[held] = features[held] @ beta - float(torch.logit(label.mean()))
        parts.append((held, features, label - torch.sigmoid(known @ beta), factor))
    return ratio, parts


def fit_logistic(known: Tensor, label: Tensor, generator: torch.Generator, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Return β and the ridge penalty, chosen on a third of the rows; the first feature is a constant.

    The last `extra` features are penalised ten times as much. All but the constant are standardised.
    """
    inner = torch.randperm(len(known), generator=generator, device="cpu").to(known.device) % 3 == 0
    penalty, beta, curvature = _tuned(known[~inner], label[~inner], known[inner], label[inner], extra)
    ridge = _ridge(beta, penalty, extra)
    return _logistic(known, label, ridge, beta, curvature, 1e-13)[0], ridge


def cosines(z: Tensor, generator: torch.Generator, axes: int = 0) -> Tensor:
    """Cosines of many lengths in the normal scores of the columns: shapes that no quadratic has.

    The first `axes` of them run along one column each, column after column, the others in random directions.
    """
    score = normal_scores(z)
    aim = torch.randn(z.shape[1], _COSINES, generator=generator, dtype=z.dtype, device="cpu")
    aim[:, :axes] = torch.eye(z.shape[1], dtype=z.dtype, device="cpu")[:, torch.arange(axes, device="cpu") % z.shape[1]]
    length, phase = torch.rand(2, _COSINES, generator=generator, dtype=z.dtype, device="cpu")
    aim = aim / aim.norm(dim=0) * 0.7 * 8**length
    return torch.cos(score @ aim.to(z.device) + 2 * math.pi * phase.to(z.device))


def finer_features(z: Tensor, generator: torch.Generator) -> Tensor:
    """Features of tails, ends of supports, bends and bumps, of each column and of the distance from the middle.

    In the tail of rank u, the square of a normal score grows as −2 log u: such features follow the powers with which densities
    end, and absolute values the rates at which tails fall. A square of one column times another follows a bend.
    """
    dim = z.shape[1]
    if dim > _MAX_COLUMNS_OF_FINER_FEATURES:
        return cosines(z, generator)
    z = torch.where(z.pow(3).mean(0) < 0, -z, z)  # a column that is turned round has the same features
    score = normal_scores(z)
    bends = (score.square()[:, :, None] * score[:, None, :]).flatten(1)[
        :, ~torch.eye(dim, dtype=torch.bool, device=z.device).flatten()
    ]
    if dim > 1:
        root = torch.linalg.cholesky(z.T.cov() + 1e-9 * torch.eye(dim, dtype=z.dtype, device=z.device))
        distance = torch.linalg.solve_triangular(root, (z - z.mean(0)).T, upper=False).norm(dim=0)[:, None]
        z, score = torch.cat([z, distance], 1), torch.cat([score, normal_scores(distance)], 1)
    shapes = [score, score.square(), z.abs(), cosines(z, generator, _COSINES // 2)]
    return torch.cat([*shapes, bends] if dim <= _MAX_COLUMNS_OF_BENDS else shapes, 1)


def normal_scores(z: Tensor) -> Tensor:
    """Quantiles of N(0, 1) at the ranks of the rows, column by column."""
    scores: Tensor = torch.special.ndtri((z.argsort(0).argsort(0).to(z.dtype) + 0.5) / len(z))
    return scores


def _tuned(features: Tensor, label: Tensor, unseen: Tensor, theirs: Tensor, extra: int) -> tuple[float, Tensor, Tensor]:
    """The penalty with the least log loss on unseen rows, from the largest down until the loss rises; its β and curvature."""
    beta, best, least = torch.zeros_like(features[0]), _PENALTIES[0], math.inf
    curvature = _curvature(features, features @ beta)
    for penalty in _PENALTIES:
        now, matrix = _logistic(features, label, _ridge(beta, penalty, extra), beta, curvature, 1e-9)
        loss = float(binary_cross_entropy_with_logits(unseen @ now, theirs))
        if not loss < least:
            break
        best, least, beta, curvature = penalty, loss, now, matrix
    return best, beta, curvature


def _logistic(
    features: Tensor, label: Tensor, ridge: Tensor, beta: Tensor, curvature: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Minimise mean log loss + ½ βᵀ ridge β from β on by damped Newton; and the last curvature used.

    The curvature of an earlier point is used while each step leaves at most a tenth of what there was to gain: a step with it
    costs two products with a vector, a new curvature costs the square of the columns.
    """
    fit, before = features @ beta, math.inf
    value = binary_cross_entropy_with_logits(fit, label) + 0.5 * ridge.diagonal() @ beta.square()
    fresh = False
    while True:
        gradient = features.T @ (torch.sigmoid(fit) - label) / len(fit) + ridge.diagonal() * beta
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(curvature + ridge))[:, 0]
        gain = float(gradient @ step) / 2
        if gain > 0.1 * before and not fresh:
            curvature, fresh = _curvature(features, fit), True
            continue
        if gain < tolerance:
            return beta, curvature
        along, fresh = features @ step, False
        for size in (0.5**k for k in range(20)):
            moved = beta - size * step
            lower = binary_cross_entropy_with_logits(fit - size * along, label) + 0.5 * ridge.diagonal() @ moved.square()
            if bool(lower < value):
                break
        else:
            return beta, curvature
        beta, value, fit, before = moved, lower, fit - size * along, gain


def _curvature(features: Tensor, fit: Tensor) -> Tensor:
    """Second derivative of the mean log loss."""
    s = torch.sigmoid(fit)
    return (features * (s * (1 - s))[:, None]).T @ features / len(s)


def _ridge(beta: Tensor, penalty: float, extra: int) -> Tensor:
    """The penalty on the diagonal: none on the constant, more on the last `extra`."""
    ridge = torch.full_like(beta, penalty)
    ridge[0] = 1e-9  # no penalty on the constant, but a regular matrix
    ridge[len(ridge) - extra :] *= _COSINE_PENALTY
    return torch.diag(ridge)


def mean_with_error(terms: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(terms))


def median_with_error(values: list[float]) -> tuple[float, float]:
    """Return the median and its standard error, by the median deviation from it, as of normal values."""
    of_all = torch.tensor(values, dtype=torch.float64, device="cpu")
    median = of_all.median()
    # A normal law's deviation is 1.48 median deviations, and a median has 1.25 times the error of a mean.
    return float(median), 1.25 * 1.48 * float((of_all - median).abs().median()) / math.sqrt(len(values))
