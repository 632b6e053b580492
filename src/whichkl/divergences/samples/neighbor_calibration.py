"""Calibration of a neighbour estimate: its error by subsampling, its bias on a Gaussian twin, and the effect of rounding."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch.distributions import MultivariateNormal

from whichkl.divergences.estimate import Estimate
from whichkl.divergences.samples.logistic import median_with_error
from whichkl.divergences.samples.neighbors import Rows, whiten
from whichkl.divergences.samples.reach import BIAS_FACTOR, MAX_BIAS_ERRORS, distances
from whichkl.divergences.samples.shape_twins import Pooled, lower_bound

TWIN_ROWS = 8_000
_MIN_ROWS_OF_LARGE_SAMPLES = 20_000
_TWIN_ROWS_OF_LARGE_SAMPLES = 6_000
MIN_ROWS_FOR_ERROR = 50
_MAX_ROWS_OF_SHAPE = 5_000
_SHAPE_TWINS = 5


class Bias(NamedTuple):
    """The bias of the estimator on a twin, its error, and the spread of the estimates."""

    value: float
    error: float
    spread: float


@dataclass(frozen=True)
class Subsamples:
    """The estimate on subsamples: what standard error their spread gives for all rows, their mean, its error, their sizes."""

    error: float
    mean: float
    mean_error: float
    sizes: tuple[int, int]


def subsamples(parts: list[Rows], estimate: Callable[..., float], generator: np.random.Generator) -> Subsamples:
    """Subsamples of n^(2/3) rows without replacement; the error is their spread · √(f/(1 − f)), f the share of rows in each."""
    share = min(map(len, parts)) ** (-1 / 3)
    sizes = [max(2, int(len(part) * share)) for part in parts]
    # Few large subsamples or many small ones: all take about as long.
    repeats = int(np.clip(110_000 // sum(sizes), 25, 100))
    draws = [[generator.choice(len(part), size, False) for part, size in zip(parts, sizes, strict=True)] for _ in range(repeats)]

    def on(rows: list[Any]) -> float:
        return estimate(*(part[few] for part, few in zip(parts, rows, strict=True)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the queries release the interpreter
        values = list(pool.map(on, draws))
    kept = sizes[0] / len(parts[0])
    wide = float(np.std(values, ddof=1))
    # Without replacement, the estimate on a share f of the rows varies about that on all rows with (1 − f)/f times the latter's
    # variance.
    error = wide * math.sqrt(kept / (1 - kept))
    return Subsamples(error, float(np.mean(values)), math.hypot(wide / math.sqrt(repeats), error), (sizes[0], sizes[-1]))


def drift(value: float, sampling: float, few: Subsamples, bias: Bias, small: Bias, shape: tuple[int, ...]) -> list[str]:
    """Report where the estimate grows with the rows by more than it does on the twin: then it hasn't settled.

    `bias` and `small` are those on the twin at n rows and at those of the subsamples. What is still to come is extrapolated
    from n^(2/3) rows to n, and on, with a bias that falls as n^(−1/d).
    """
    rows, dim = shape
    # What the estimator gains from n^(2/3) to n rows beyond what it gains on Gaussians is the part that no twin explains.
    growth = value - few.mean - (bias.value - small.value)
    error = math.hypot(few.mean_error, bias.error, small.error)
    left = (few.sizes[0] / rows) ** (1 / dim)
    # A geometric series: from n rows on, each further step brings `left` times the last one.
    coming = math.copysign(max(0.0, abs(growth) - 2 * error), growth) * left / (1 - left)
    if abs(coming) <= max(2 * sampling, 0.1 * abs(value)):
        return []
    seen = f"from {few.sizes[0]:,} rows to {rows:,} it moves from {few.mean:.3g} to {value:.3g}"
    return [f"{seen}, by {growth:+.2g} more than on Gaussians fitted to this data: it hasn't settled"]


def twin_rows(n: int, m: int) -> int:
    """The most rows of a twin: fewer where the samples are large, so that it takes a small part of the time."""
    return TWIN_ROWS if max(n, m) <= _MIN_ROWS_OF_LARGE_SAMPLES else _TWIN_ROWS_OF_LARGE_SAMPLES


def bias_on(
    p: MultivariateNormal,
    q: MultivariateNormal | None,
    n: int,
    m: int,
    estimate: Callable[..., float],
    generator: Any,
    most: int = 8,
) -> Bias:
    """Bias of the estimator on draws of p and q, or of p and its log density.

    3 to `most` repeats. The mean log ratio at the draws is used for the truth: it has the same mean, and most of the noise
    cancels. The spread is 0 where there are too few rows or repeats to measure it.
    """
    full, gaps, values = max(n, m) <= TWIN_ROWS, [], []
    most_rows = twin_rows(n, m)
    n, m = min(n, most_rows), min(m, most_rows)
    for _ in range(int(np.clip(2 * TWIN_ROWS // (n + m), 3, most))):
        noise = torch.from_numpy(generator.normal(size=(n + m, len(p.loc))))
        x = p.loc + noise[:n] @ p.scale_tril.T
        log_p = p.log_prob(x)
        if q is None:
            value, truth = estimate(np.column_stack([x.numpy(), log_p.numpy()])), 0.0
        else:
            y = q.loc + noise[n:] @ q.scale_tril.T
            value, truth = estimate(x.numpy(), y.numpy()), float((log_p - q.log_prob(x)).mean())
        values.append(value)
        gaps.append(value - truth)
    # A spread on fewer rows than the data's would be too wide, and one of fewer than eight values is too uncertain.
    spread_of = float(np.std(values, ddof=1)) if full and len(values) >= 8 else 0.0
    return Bias(float(np.mean(gaps)), float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps)), spread_of)


def gaussian(x: Rows) -> MultivariateNormal:
    """The Gaussian with the mean and covariance of these rows."""
    return MultivariateNormal(torch.from_numpy(x.mean(0)), torch.from_numpy(np.atleast_2d(np.cov(x.T))))


def spread(parts: list[Rows], generator: np.random.Generator) -> tuple[list[Rows], list[Rows], list[str], list[str]]:
    """Spread rounded values evenly within their step if over 1 % of the rows repeat.

    The KL between the spread laws is that between the rounded ones, a bit below the truth; rounding twice as coarsely
    shows how much. Returns the samples, the coarser ones (none if nothing was spread), notes, and reasons for distrust.
    """
    whole = np.concatenate(parts)
    # One column without repeats rules repeated rows out; sorting a column is much cheaper than sorting rows.
    few = any(len(np.unique(column)) >= 0.99 * len(column) for column in whole.T)  # then whole rows can't repeat more often
    doubled = 0.0 if few else 1 - len(np.unique(whole, axis=0)) / len(whole)
    step = np.array([step_of(column) for column in whole.T]) if doubled > 0.01 else np.zeros(whole.shape[1])
    if not step.any():
        copies = f"{doubled:.1%} of the rows repeat, on no even grid: copies aren't independent draws"
        return parts, [], [], [copies] if doubled > 0.01 else []
    # A rounded value stands for its interval: uniform noise within a step gives the law a density again.
    fine = [part + generator.uniform(-0.5, 0.5, part.shape) * step for part in parts]
    wide = np.where(step > 0, 2 * step, 1.0)
    coarse = [np.where(step > 0, (np.floor(part / wide) + generator.uniform(size=part.shape)) * wide, part) for part in fine]
    steps = ", ".join(f"{one:.3g}" for one in step)
    return fine, coarse, [f"{doubled:.1%} of the rows repeat: values were spread evenly within their steps, {steps}"], []


def by_shape(
    x: Rows, y: Rows, estimate: Callable[..., float], value: float, sampling: float, blur: float, seed: int
) -> tuple[float, list[str]]:
    """How far the shape of the data may bias the estimate of KL(p‖q), and why that is too much for an error to contain.

    A classifier is fitted to up to 5,000 rows of each. Rows labelled by it have a known log ratio and the shape of the
    data, so that the estimate on them shows its bias; what the classifier shows on held-out rows is a lower bound. `blur` is what
    wide balls hide.
    """
    if min(len(x), len(y)) < MIN_ROWS_FOR_ERROR:
        return 0.0, []
    generator = torch.Generator().manual_seed(seed)
    few = [
        torch.from_numpy(part)[torch.randperm(len(part), generator=generator, device="cpu")[:_MAX_ROWS_OF_SHAPE]]
        for part in (x, y)
    ]
    sample = Pooled.of(few[0], few[1], 5, generator)
    ratio = sample.better_fit()[0]
    gaps = []
    for _ in range(_SHAPE_TWINS):
        twin, known = sample.relabelled(ratio)
        rows = twin.z.numpy()
        gaps.append(estimate(*whiten(rows[: twin.n], rows[twin.n :])) - float(known[: twin.n].mean()))
    bias, error = median_with_error(gaps)
    found = {
        "balls of fewer neighbours would show {:.2g} more, by how the value falls for twice as many": blur,
        "on these rows, labelled by a classifier, its bias is {:.2g}": math.sqrt(max(0.0, bias**2 - error**2)),
        "a classifier shows {:.2g} more on rows it hasn't seen": lower_bound(ratio, sample.n) - value,
    }
    if x.shape[1] > 1:  # a ball reaches far around the middle: the distance from it alone shows how p's tail leaves q's behind
        of_x, of_y = (one[:, None] for one in distances(x, y))
        found["the distance from the middle alone has {:.2g} more"] = estimate(of_x, of_y) - sampling - value
    most = max(MAX_BIAS_ERRORS * sampling, 0.1 * abs(value))
    return BIAS_FACTOR * max(0.0, *found.values()), [note.format(size) for note, size in found.items() if size > most]


def judged(raw: Estimate, bias: Bias, truth: float, change: float, rows: int, wrong: list[str], shape: float = 0.0) -> Estimate:
    """Add the bias, on the twin or by shape, to the error, and report why the answer shouldn't be trusted, if it shouldn't.

    The noise of the bias is subtracted; for large samples the twin's noise is as large as their own, and is added.
    """
    large = rows > _MIN_ROWS_OF_LARGE_SAMPLES
    excess = math.hypot(bias.value, bias.error) if large else math.sqrt(max(0.0, bias.value**2 - bias.error**2))
    excess = max(excess, shape)
    if rows < MIN_ROWS_FOR_ERROR:
        wrong = [*wrong, f"error bars need {MIN_ROWS_FOR_ERROR} rows, and there are {rows}"]
    if abs(bias.value) > max(2 * math.hypot(raw.stderr, bias.error), 0.1 * abs(truth)):
        seen = f"the bias on Gaussians fitted to this data, {bias.value:+.2g},"
        wrong = [*wrong, f"{seen} is beyond two sampling errors and a tenth of the truth"]
    if abs(change) > max(2 * raw.stderr, 0.1 * abs(raw.value)):
        wrong = [*wrong, f"steps twice as wide change the value by {change:+.2g}: the rounding matters"]
    notes = (*wrong, *raw.notes, f"the error is {raw.stderr:.2g} by subsampling and {excess:.2g} for bias")
    return replace(raw, stderr=math.hypot(raw.stderr, excess), reliable=not wrong, notes=notes)


def step_of(column: Float[np.ndarray, " n"]) -> float:
    """The step of the even grid that a column's values lie on, 0 where there is none."""
    gaps = np.diff(np.unique(column))
    gaps = gaps[gaps > 1e-9 * np.ptp(column)]
    counts = gaps / gaps.min()
    # A grid has only whole multiples of its step as gaps; a hundredth allows for decimal fractions in binary.
    return float(gaps.min()) if np.abs(counts - counts.round()).max() < 0.01 else 0.0
