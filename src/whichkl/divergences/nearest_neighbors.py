"""Nearest neighbours: KL from samples alone, or from samples and a log density, with its bias measured on Gaussian twins.

The floor is two kd-trees and one k-nearest query a row in each; the bias-reduced variant counts once a row besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch.distributions import MultivariateNormal, kl_divergence

from whichkl._checks import InputError, cannot, check_log_prob
from whichkl.divergences.estimate import Estimate
from whichkl.targets import Target

Samples = Float[np.ndarray, "n d"]
Variant = Literal["bias_reduced", "plain"]

_TWIN_ROWS = 10_000
_FEW = 50


def two_sample_kl(
    x: Any, y: Any, *, k: int = 5, quantity: str = "forward_kl", seed: int = 0, variant: Variant = "bias_reduced"
) -> Estimate:
    """KL(p‖q) in nats from samples x ~ p, (n, d), and y ~ q, (m, d); consistent, for continuous laws.

    Both are whitened together first. The error is that of subsamples of n^(2/3) rows, scaled, with the bias found on a
    Gaussian twin of the data added in squares. It's unreliable where that bias is above two sampling errors and a tenth
    of the twin's truth, where fitting noise makes up as much of that truth, where the value comes near its `cap`, or
    below 50 rows. Rounded rows are spread within their step.

    Args:
        x: samples of the law that the mean is taken under; whatever `Target.of` reads, (n,) as (n, 1).
        y: samples of the other law.
        k: which neighbour; more of them lower the variance and raise the bias.
        quantity: what to call it; for KL(q‖p) give q's samples first.
        seed: for subsamples, twins and spreading.
        variant: see `point_estimate`.

    Raises:
        InputError: a sample is empty, not finite, weighted, short of max(k, d) + 2 rows, or has constant or dependent
            columns; the dimensions differ; or `k` or `variant` isn't one.

    Source: Wang, Kulkarni & Verdú (2009); subsampling, Politis & Romano (1994).

    >>> z = np.random.default_rng(0).normal(size=(2000, 2))
    >>> two_sample_kl(z[:1000] + [1, 0], z[1000:]).number  # the truth is 0.5
    '0.4... ± 0.0...'
    """
    a, b = _samples(x, "x", k), _samples(y, "y", k)
    if a.shape[1] != b.shape[1]:
        because = f"`x` has {a.shape[1]} columns and `y` has {b.shape[1]}"
        raise InputError(cannot("compare these samples", because, "Give both the same columns, in the same order"))
    if variant not in ("bias_reduced", "plain"):
        raise InputError(cannot(f"use `variant={variant!r}`", "it is none of them", "Use 'bias_reduced' or 'plain'"))
    generator = np.random.default_rng(seed)

    def estimate(*parts: Samples) -> float:
        return _compare(parts[0], parts[1], min(k, len(parts[0]) - 1, len(parts[1])), variant)

    (a, b), coarse, notes, wrong = _spread([a, b], generator)
    white = _whiten(a, b)
    p, q = (_gaussian(part) for part in white)
    null, bias = (_bias_on(p, other, len(a), len(b), estimate, generator) for other in (p, q))
    truth = float(kl_divergence(p, q))
    rows = f" (at {_TWIN_ROWS:,} rows, so that its bias is overstated)" if max(len(a), len(b)) > _TWIN_ROWS else ""
    notes += [f"on a Gaussian twin of this data (truth {truth:.3g}) it gives {truth + bias[0]:.3g}{rows}"]
    notes += [f"on two samples of one Gaussian (truth 0) it gives {null[0]:.2g} ± {null[1]:.1g}"]
    value, sampling = estimate(*white), _subsampling_error(white, estimate, generator)
    cap = float(digamma(len(b) + 1) - digamma(k)) if variant == "bias_reduced" else None
    if cap is not None and value > 0.75 * cap:
        wrong += [f"the value is near {cap:.3g}, the most that {len(b):,} rows and k = {k} can show"]
    inflation = a.shape[1] * (a.shape[1] + 3) / 4 * (1 / len(a) + 1 / len(b))
    if inflation > max(2 * sampling, 0.1 * truth):
        wrong += [f"the twin is fitted on few rows: about {inflation:.2g} of its {truth:.3g} is fitting noise (Wilks, 1938)"]
    method = f"nearest neighbours, k = {k}, two samples, {variant.replace('_', '-')}"
    raw = Estimate(quantity, value, sampling, method=method, n=len(a), cap=cap, notes=tuple(notes))
    return _judged(raw, bias, truth, estimate(*_whiten(*coarse)) - value if coarse else 0.0, min(len(a), len(b)), wrong)


def one_sample_kl(x: Any, log_q: Callable[[torch.Tensor], Any], *, k: int = 5, seed: int = 0) -> Estimate:
    """KL(p‖q) in nats from samples x ~ p, (n, d), and a normalised log density of q; ∞ where a row has log q = −∞.

    mean[ψ(k) − ψ(n) − log V_d − d log ρ_k(x) − log q(x)], ρ_k the distance to the k-th other row and V_d the volume of the
    unit ball. `log_q` gets a float64 tensor (n, d) and returns (n,), normalised, natural log; the rest is as in
    `two_sample_kl`, the bias that of p's entropy.

    Raises:
        InputError: the samples or `k` are bad, as in `two_sample_kl`.
        TargetError: `log_q` returned another shape, NaN or +∞.

    Source: Pérez-Cruz (2008), eq. 18, with ψ(n) in place of log(n − 1).

    >>> z = np.random.default_rng(0).normal(size=(2000, 1))
    >>> one_sample_kl(z, lambda x: -((x[:, 0] - 1) ** 2) / 2 - math.log(2 * math.pi) / 2).number  # the truth is 0.5
    '0.5... ± 0.0...'
    """
    rows, generator = _samples(x, "x", k), np.random.default_rng(seed)
    method, n = f"nearest neighbours, k = {k}, one sample and a log density", len(rows)

    def estimate(*parts: Samples) -> float:
        return _entropy_term(parts[0][:, :-1], min(k, len(parts[0]) - 1)) - float(parts[0][:, -1].mean())

    def with_log_q(part: Samples) -> Samples:
        at = torch.from_numpy(part)
        value = check_log_prob(torch.as_tensor(log_q(at), dtype=torch.float64).detach(), at, "log_q")
        volume = np.linalg.slogdet(np.atleast_2d(np.cov(part.T)))[1] / 2
        return np.column_stack([*_whiten(part), value.numpy() + volume])

    (rows,), coarse, notes, wrong = _spread([rows], generator)
    table = with_log_q(rows)
    outside = int((table[:, -1] == -math.inf).sum())
    if outside:
        note = f"{outside} of {n} rows ({outside / n:.1%}) fell where q is zero"
        return Estimate("forward_kl", math.inf, 0.0, None, "infinite", method, n=n, notes=(note,))
    value, sampling = estimate(table), _subsampling_error([table], estimate, generator)
    bias = _bias_on(_gaussian(table[:, :-1]), None, n, 0, estimate, generator)
    notes += [f"on a Gaussian twin of these samples it's off by {bias[0]:+.2g} ± {bias[1]:.1g}"]
    raw = Estimate("forward_kl", value, sampling, method=method, n=n, notes=tuple(notes))
    return _judged(raw, bias, value, estimate(with_log_q(coarse[0])) - value if coarse else 0.0, n, wrong)


def point_estimate(x: Samples, y: Samples, k: int = 5, variant: Variant = "bias_reduced") -> float:
    """The value of `two_sample_kl` alone: no checks, no spreading, no error.

    ``"plain"``: mean d log(ν_k/ρ_k) + ψ(m + 1) − ψ(n), with ρ_k, ν_k the distances to the k-th other x and the k-th y.
    ``"bias_reduced"``: both counts in the ball of radius max(ρ_k, ν_k), mean ψ(l + 1) − ψ(k) + ψ(m + 1) − ψ(n), l the rows
    of x inside where ν_k is the larger, and ψ(k) − ψ(l + 1), l those of y, where ρ_k is. That's eq. 29 of the paper with
    its last distances averaged out, E[d log(ε/ρ_l)] = 1/l: the row on the boundary counts in its own sample only. It's
    unbiased where both densities are constant in the ball (ψ(l) − ψ(k), both boundaries counted, is off by up to 0.07),
    and had the smaller bias in 29 of 46 Gaussian cells of 1–10 dimensions (at k = 5), by no more than noise in some of them.

    Source: Wang, Kulkarni & Verdú (2009), eq. 5 and 29.

    >>> z = np.random.default_rng(0).normal(size=(2000, 1))
    >>> round(point_estimate(z[:1000] + 1, z[1000:]), 1)  # the truth is 0.5
    0.5
    """
    white = _whiten(x, y)
    return _compare(white[0], white[1], k, variant)


def _compare(x: Samples, y: Samples, k: int, variant: Variant) -> float:
    of_x, of_y, workers = cKDTree(x), cKDTree(y), _workers(x)
    rho = of_x.query(x, [k + 1], workers=workers)[0][:, 0]
    nu = of_y.query(x, [k], workers=workers)[0][:, 0]
    finite = float(digamma(len(y) + 1) - digamma(len(x)))
    if variant == "plain":
        least = _least(np.concatenate([rho, nu]))
        return float(x.shape[1] * np.log(np.maximum(nu, least) / np.maximum(rho, least)).mean()) + finite
    wider, count = nu > rho, {"return_length": True, "workers": workers}
    in_x = of_x.query_ball_point(x[wider], nu[wider], **count) - 1
    in_y = of_y.query_ball_point(x[~wider], rho[~wider], **count)
    total = digamma(in_x + 1).sum() - digamma(in_y + 1).sum() + (len(in_y) - len(in_x)) * digamma(k)
    return float(total) / len(x) + finite


def _entropy_term(x: Samples, k: int) -> float:
    """E_p[log p] by neighbours. Source: Kozachenko & Leonenko (1987)."""
    n, dim = x.shape
    rho = cKDTree(x).query(x, [k + 1], workers=_workers(x))[0][:, 0]
    ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    return float(digamma(k) - digamma(n) - ball - dim * np.log(np.maximum(rho, _least(rho))).mean())


def _workers(x: Samples) -> int:
    return -1 if len(x) > 2000 else 1


def _least(radii: Float[np.ndarray, " n"]) -> float:
    """The smallest positive radius: what the 0 of a row with k equals counts as."""
    return float(radii[radii > 0].min(initial=1.0))


def _whiten(*parts: Samples) -> list[Samples]:
    """One affine map for all, which makes their mean covariance the identity; KL doesn't change."""
    covariance = sum(np.atleast_2d(np.cov(part.T)) for part in parts) / len(parts)
    scale = np.sqrt(np.diag(covariance))
    root = np.linalg.cholesky(covariance / np.outer(scale, scale))
    return [np.linalg.solve(root, ((part - parts[0].mean(0)) / scale).T).T.copy() for part in parts]


def _subsampling_error(parts: list[Samples], estimate: Callable[..., float], generator: np.random.Generator) -> float:
    """Standard error from subsamples without replacement: their spread · √(f/(1 − f)), f the share of rows in each."""
    share = min(map(len, parts)) ** (-1 / 3)
    sizes = [max(2, int(len(part) * share)) for part in parts]
    repeats = int(np.clip(200_000 // sum(sizes), 30, 100))
    values = []
    for _ in range(repeats):
        few = (part[generator.choice(len(part), size, False)] for part, size in zip(parts, sizes, strict=True))
        values.append(estimate(*few))
    kept = sizes[0] / len(parts[0])
    return float(np.std(values, ddof=1)) * math.sqrt(kept / (1 - kept))


def _gaussian(x: Samples) -> MultivariateNormal:
    return MultivariateNormal(torch.from_numpy(x.mean(0)), torch.from_numpy(np.atleast_2d(np.cov(x.T))))


def _bias_on(
    p: MultivariateNormal, q: MultivariateNormal | None, n: int, m: int, estimate: Callable[..., float], generator: Any
) -> tuple[float, float]:
    """Bias of the estimator on draws of p and q (or of p and its log density), and the error of that, over 3 to 8 repeats.

    The mean log ratio at the draws stands in for the truth: it has the same mean, and most of the noise cancels.
    """
    n, m, gaps = min(n, _TWIN_ROWS), min(m, _TWIN_ROWS), []
    for _ in range(int(np.clip(2 * _TWIN_ROWS // (n + m), 3, 8))):
        noise = torch.from_numpy(generator.normal(size=(n + m, len(p.loc))))
        x = p.loc + noise[:n] @ p.scale_tril.T
        log_p = p.log_prob(x)
        if q is None:
            gaps.append(estimate(np.column_stack([x.numpy(), log_p.numpy()])))
        else:
            y = q.loc + noise[n:] @ q.scale_tril.T
            gaps.append(estimate(x.numpy(), y.numpy()) - float((log_p - q.log_prob(x)).mean()))
    return float(np.mean(gaps)), float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps))


def _judged(raw: Estimate, bias: tuple[float, float], truth: float, change: float, rows: int, wrong: list[str]) -> Estimate:
    """Add the bias (less what is noise in it) to the error, and say why the answer shouldn't be trusted, if it shouldn't."""
    excess = math.sqrt(max(0.0, bias[0] ** 2 - bias[1] ** 2))
    if rows < _FEW:
        wrong = [*wrong, f"error bars need {_FEW} rows, and there are {rows}"]
    if abs(bias[0]) > max(2 * math.hypot(raw.stderr, bias[1]), 0.1 * abs(truth)):
        wrong = [*wrong, f"the bias on the Gaussian twin, {bias[0]:+.2g}, is beyond two sampling errors and a tenth of the truth"]
    if abs(change) > max(2 * raw.stderr, 0.1 * abs(raw.value)):
        wrong = [*wrong, f"steps twice as wide change the value by {change:+.2g}: the rounding matters"]
    notes = (*wrong, *raw.notes, f"the error is {raw.stderr:.2g} by subsampling and {excess:.2g} for bias")
    return replace(raw, stderr=math.hypot(raw.stderr, excess), reliable=not wrong, notes=notes)


def _samples(values: Any, name: str, k: int) -> Samples:
    """Read and check one sample; float64, (n, d)."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(cannot(f"use `k={k}`", "it isn't a whole number from 1 on", "Use, say, 5"))
    target, do = Target.of(values), f"find neighbours in `{name}`"
    if target.samples is None or target.weights is not None:
        because = "it is weighted" if target.samples is not None else f"it has only {target.access.label}"
        raise InputError(cannot(do, because, "Give equally weighted samples"))
    x: Samples = target.samples.to("cpu", torch.float64).numpy()
    (n, dim), least = x.shape, max(k, x.shape[1]) + 2
    if n < least:
        because = f"`k={k}` in dimension {dim} needs at least {least} rows, and there are {n}"
        raise InputError(cannot(do, because, "Give more rows, or a smaller `k`"))
    flat = ", ".join(f"`{column}`" for column, extent in zip(target.names, np.ptp(x, 0), strict=True) if extent == 0)
    dependent = not flat and dim > 1 and np.linalg.eigvalsh(np.corrcoef(x.T))[0] < 1e-12
    if flat or dependent:
        because = f"column {flat} is constant" if flat else "its columns are linearly dependent"
        raise InputError(cannot(do, f"{because}, so that there is no density", "Drop what follows from other columns"))
    return x


def _spread(parts: list[Samples], generator: np.random.Generator) -> tuple[list[Samples], list[Samples], list[str], list[str]]:
    """Spread rounded values evenly within their step if over 1 % of the rows repeat.

    The KL between the spread laws is that between the rounded ones, a bit below the truth; rounding twice as coarsely
    shows how much. Returns the samples, the coarser ones (none if nothing was spread), notes, and reasons for distrust.
    """
    whole = np.concatenate(parts)
    doubled = 1 - len(np.unique(whole, axis=0)) / len(whole)
    step = np.array([_step(column) for column in whole.T]) if doubled > 0.01 else np.zeros(whole.shape[1])
    if not step.any():
        copies = f"{doubled:.1%} of the rows repeat, on no even grid: copies aren't independent draws"
        return parts, [], [], [copies] if doubled > 0.01 else []
    fine = [part + generator.uniform(-0.5, 0.5, part.shape) * step for part in parts]
    wide = np.where(step > 0, 2 * step, 1.0)
    coarse = [np.where(step > 0, (np.floor(part / wide) + generator.uniform(size=part.shape)) * wide, part) for part in fine]
    steps = ", ".join(f"{one:.3g}" for one in step)
    return fine, coarse, [f"{doubled:.1%} of the rows repeat: values were spread evenly within their steps, {steps}"], []


def _step(column: Float[np.ndarray, " n"]) -> float:
    """The step of the even grid that a column's values lie on, 0 where there is none."""
    gaps = np.diff(np.unique(column))
    gaps = gaps[gaps > 1e-9 * np.ptp(column)]
    counts = gaps / gaps.min()
    return float(gaps.min()) if np.abs(counts - counts.round()).max() < 0.01 else 0.0
