"""Sample distances: numbers between two samples with no density on either side. None of them is in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, check_finite
from whichkl.arrays import or_transposed, tensor_of
from whichkl.divergences.estimate import Estimate

_NUMBERS_PER_BLOCK = 8_000_000
"""Numbers in the largest temporary: 64 MB of float64."""
_MIN_LOG_UNIT = -650.0
"""Logarithm of a unit below which, and above whose inverse, a distance in that unit leaves float64."""
_MAX_ROWS_COMPARED = 8_000
"""Largest number of rows of a sample of which all pairs are compared: a second of work."""
_SUBSAMPLES = 50
_PERMUTATIONS = 5
_MAX_ROWS_FOR_MEDIAN = 1000


def energy_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Estimate:
    """Energy distance 2 E|X − Y| − E|X − X′| − E|Y − Y′|, as an unbiased U-statistic that may fall below 0.

    It is 0 only where the laws are the same, needs finite means, and is in the unit of the columns, not in nats.
    Columns aren't rescaled: one with a larger unit counts for more. One column is sorted, in O(n log n) time. Several take
    O((n + m)² d) time and 64 MB; of more than 8,000 rows that many are compared, chosen at random, which a note states.

    Source: Székely & Rizzo (2013); standard error by Hoeffding's (1948) projection.

    >>> x = torch.tensor([0.0, 2.0])
    >>> energy_distance(x, x + 10).value
    16.0
    """
    x, y = two_samples(x, y)
    x, y, unit = _rescaled(x, y)
    if x.shape[1] == 1:
        thinned: tuple[str, ...] = ()
        value, stderr = _u_statistic(x, y, _minus_distances_on_a_line, 0.0)
    else:
        x, y, thinned = _thinned(x, y)
        value, stderr = _u_statistic(x, y, partial(_row_sums, kernel=torch.neg), 0.0)
    notes = ("in the unit of the columns, not in nats", *thinned, *_degenerate(value, stderr))
    method = "energy distance, unbiased U-statistic"
    return Estimate("energy", unit * value, unit * stderr, method=method, n=len(x) + len(y), notes=notes)


def mmd_squared(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], bandwidth: float | None = None) -> Estimate:
    """Squared maximum mean discrepancy E k(X, X′) + E k(Y, Y′) − 2 E k(X, Y), k(u, v) = exp(−|u − v|² / 2h²).

    An unbiased U-statistic that may fall below 0. It has no unit (it isn't in nats), never exceeds 2, and depends on h:
    compare only values of one bandwidth. By default h is the median distance between pooled rows, of at most 1,000. Columns
    aren't rescaled. Of more than 8,000 rows that many are compared, chosen at random, which a note states.

    Source: Gretton et al. (2012); standard error by Hoeffding's (1948) projection.

    >>> x = torch.tensor([0.0, 2.0])
    >>> round(mmd_squared(x, x + 100, bandwidth=1.0).value, 6)
    0.270671
    """
    x, y = two_samples(x, y)
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise InputError(cannot(f"use `bandwidth={bandwidth}`", "it must be positive and finite", "Leave it out for the median"))
    x, y, unit = _rescaled(x, y)
    h = _median_distance(x, y) if bandwidth is None else bandwidth / unit
    x, y, thinned = _thinned(x, y)
    kernel = partial(_row_sums, kernel=lambda distance: torch.exp(-0.5 * (distance / h).square()))
    value, stderr = _u_statistic(x, y, kernel, 1.0)
    how = "as given" if bandwidth is not None else f"the median distance of at most {_MAX_ROWS_FOR_MEDIAN} pooled rows"
    notes = (f"no unit: not in nats; Gaussian kernel of bandwidth {h * unit:.4g}, {how}", *thinned, *_degenerate(value, stderr))
    method = "MMD² with a Gaussian kernel, unbiased U-statistic"
    return Estimate("mmd", value, stderr, finite="certified", method=method, n=len(x) + len(y), notes=notes)


def sliced_wasserstein(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, power: float = 2, projections: int = 200, seed: int = 0
) -> Estimate:
    """Sliced Wasserstein distance to the power a: the mean over directions u of ∫₀¹ |F⁻¹(t) − G⁻¹(t)|ᵃ dt.

    F and G are the laws of u·X and u·Y, over `projections` random directions; one column needs only itself. The plug-in is
    biased upwards by what sampling alone leaves, which is measured by permuting the pooled rows, and reported in the notes. The
    unit is the columns' to the power a, not nats; columns aren't rescaled. The global generator isn't touched.

    Source: Bonneel et al. (2015); error by subsampling n^⅔ rows, Politis & Romano (1994), and by the spread over directions.

    >>> x = torch.linspace(0, 1, 50)
    >>> round(sliced_wasserstein(x, x + 3).value, 6)
    9.0
    """
    x, y = two_samples(x, y, least=8)
    if not 1 <= power < math.inf:
        raise InputError(cannot(f"use `power={power}`", "it must be at least 1 and finite", "Use 1 or 2"))
    if projections < 2:
        because = "the spread over directions needs two of them"
        raise InputError(cannot(f"use `projections={projections}`", because, "Use, say, 200"))
    generator = torch.Generator().manual_seed(seed)
    x, y, scale = _rescaled(x, y)
    n, d = x.shape
    if not _MIN_LOG_UNIT < power * math.log(scale) < -_MIN_LOG_UNIT:
        because = f"they lie up to {scale:.3g} apart, and distances to the power {power:g} leave float64"
        raise InputError(cannot("compare these samples", because, "Divide all columns by one number"))
    unit, count = scale**power, projections if d > 1 else 1
    directions = torch.randn(d, count, generator=generator, dtype=torch.float64, device="cpu").to(x.device)
    directions = directions / directions.norm(dim=0)
    each = _sliced(x, y, directions, power)
    stderr = _error_by_subsamples(x, y, directions, power, generator)
    stderr = math.hypot(stderr, float(each.std()) / math.sqrt(count)) if count > 1 else stderr
    pooled = torch.cat([x, y])
    # In the pooled rows both halves have one law: their distance is what sampling alone gives.
    shuffled = [pooled[torch.randperm(len(pooled), generator=generator, device="cpu")] for _ in range(_PERMUTATIONS)]
    null = sum(float(_sliced(z[:n], z[n:], directions, power).mean()) for z in shuffled) / _PERMUTATIONS
    value = float(each.mean())
    biased = null > 2 * stderr and null > 0.1 * value
    seen = f"biased upwards: permuting the pooled rows, where the truth is 0, gives {null * unit:.3g}"
    return Estimate(
        "sliced_wasserstein",
        value * unit,
        stderr * unit,
        method=f"sliced Wasserstein to the power {power:g}, {count} direction{'s' if count > 1 else ''}",
        n=len(pooled),
        reliable=not biased,
        notes=(
            f"in the unit of the columns to the power {power:g}, not in nats",
            f"{seen}, no small part of this value" if biased else seen,
        ),
    )


def two_samples(
    x: Float[Tensor, "n d"] | Float[Tensor, " n"], y: Float[Tensor, "m d"] | Float[Tensor, " m"], least: int = 2
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Return both samples as float64 matrices, (n,) read as (n, 1), or say what is wrong with them."""
    both = []
    for name, given in (("x", x), ("y", y)):
        z = tensor_of(given).detach().to(torch.float64)
        z = z[:, None] if z.ndim == 1 else z
        if z.ndim != 2 or z.shape[1] == 0:
            raise InputError(cannot(f"use `{name}`", f"its shape is {tuple(z.shape)}, not (n, d)", "Pass one row a draw"))
        if len(z) < least:
            because = f"it has {len(z)} row{'s' if len(z) != 1 else ''}, and {least} are needed"
            raise InputError(cannot(f"use `{name}`", because, f"Pass more draws{or_transposed(*z.shape)}"))
        check_finite(z, [f"column {i + 1}" for i in range(z.shape[1])], f"samples `{name}`")
        both.append(z)
    if both[0].shape[1] != both[1].shape[1]:
        because = f"`x` has {both[0].shape[1]} columns and `y` has {both[1].shape[1]}"
        raise InputError(cannot("compare these samples", because, "Pass the same columns of both"))
    return both[0], both[1]


def standardised(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], least: int) -> tuple[Float[Tensor, "n+m d"], int, int]:
    """Return the rows of both with pooled mean 0 and deviation 1, how many are of x, and how many the smaller sample has."""
    x, y = two_samples(x, y, least)
    for name, one in (("x", x), ("y", y)):
        still = (one.amax(0) == one.amin(0)).nonzero()[:, 0]
        if len(still):
            because = f"column {int(still[0]) + 1} of `{name}` is constant"
            raise InputError(cannot("learn a ratio from these samples", because, "Drop that column"))
    z = torch.cat([x, y])
    z = (z - z.mean(0)) / (z - z.mean(0)).abs().amax(0)
    return z / z.std(0), len(x), min(len(x), len(y))


def _rescaled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both samples about one centre in one common unit, and that unit: no square can overflow or vanish."""
    x, y = x - y[0], y - y[0]
    unit = max(float(x.abs().max()), float(y.abs().max())) or 1.0
    return x / unit, y / unit, unit


def _thinned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return at most `_MAX_ROWS_COMPARED` rows of each sample, chosen from a fixed seed, and a note if there were more."""
    if max(len(x), len(y)) <= _MAX_ROWS_COMPARED:
        return x, y, ()
    generator = torch.Generator().manual_seed(0)
    few = [one[torch.randperm(len(one), generator=generator, device="cpu")[:_MAX_ROWS_COMPARED].sort().values] for one in (x, y)]
    note = f"all pairs of {len(few[0]):,} and {len(few[1]):,} rows were compared, of {len(x):,} and {len(y):,}, chosen at random"
    return few[0], few[1], (note,)


def _u_statistic(x: Tensor, y: Tensor, sums: Callable[[Tensor, Tensor], Tensor], itself: float) -> tuple[float, float]:
    """E k(X, X′) + E k(Y, Y′) − 2 E k(X, Y) without the diagonals, where k is `itself`, and its standard error.

    `sums(x, y)` are Σⱼ k(xᵢ, yⱼ) for each i.
    """
    n, m = len(x), len(y)
    # A row's kernel with itself is left out: it would bias the mean by 1/n.
    among_x, among_y = (sums(x, x) - itself) / (n - 1), (sums(y, y) - itself) / (m - 1)
    from_x, from_y = sums(x, y) / m, sums(y, x) / n
    value = float(among_x.mean() + among_y.mean() - 2 * from_x.mean())
    return value, 2 * math.sqrt(float((among_x - from_x).var()) / n + float((among_y - from_y).var()) / m)


def _row_sums(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """Σⱼ k(|xᵢ − yⱼ|) for each i, by blocks of rows; distances without the expansion of squares, which cancels."""
    rows = max(1, _NUMBERS_PER_BLOCK // (4 * len(y)))
    # |x|² + |y|² − 2 x·y loses all digits where rows lie close together and far from 0.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([kernel(torch.cdist(block, y, compute_mode=mode)).sum(1) for block in x.split(rows)])


def _minus_distances_on_a_line(x: Tensor, y: Tensor) -> Tensor:
    """−Σⱼ |xᵢ − yⱼ| for each i by sorting: where the k values of y below xᵢ have the sum Sₖ, −[(2k − m) xᵢ + Sₘ − 2 Sₖ]."""
    x, y = x[:, 0], y[:, 0].sort().values
    sums = torch.cat([y.new_zeros(1), y.cumsum(0)])
    below = torch.searchsorted(y, x.contiguous())
    return -((2 * below - len(y)) * x + sums[-1] - 2 * sums[below])


def _degenerate(value: float, stderr: float) -> tuple[str, ...]:
    """Report where the first-order error doesn't describe the law of the estimate."""
    near = abs(value) < 3 * stderr
    return ("within 3 standard errors of 0: the laws may be the same, where the error isn't normal",) if near else ()


def _median_distance(x: Tensor, y: Tensor) -> float:
    """Median distance between different pooled rows; a larger pool is thinned at random from a fixed seed."""
    pooled = torch.cat([x, y])
    kept = torch.randperm(len(pooled), generator=torch.Generator().manual_seed(0), device="cpu")[:_MAX_ROWS_FOR_MEDIAN]
    median = float(torch.pdist(pooled[kept]).median())
    if median > 0:
        return median
    because = "more than half of the distances between rows are 0, and so is their median"
    raise InputError(cannot("choose a bandwidth for these samples", because, "Pass `bandwidth=`"))


def _error_by_subsamples(x: Tensor, y: Tensor, directions: Tensor, power: float, generator: torch.Generator) -> float:
    # The first-order error of a distance near 0 isn't normal, where a bootstrap fails; subsamples of n^⅔ rows still give its
    # size.
    part, values = min(len(x), len(y)) ** (-1 / 3), []
    for _ in range(_SUBSAMPLES):
        i, j = (torch.randperm(len(z), generator=generator, device="cpu")[: round(part * len(z))] for z in (x, y))
        values.append(_sliced(x[i], y[j], directions, power).mean())
    return float(torch.stack(values).std()) * math.sqrt(part / (1 - part))


def _sliced(x: Tensor, y: Tensor, directions: Tensor, power: float) -> Tensor:
    """∫ |F⁻¹ − G⁻¹|ᵃ along each direction: quantile functions are steps, so the integral is a finite sum."""
    n, m = len(x), len(y)
    if n == m:
        i = j = torch.arange(n, device=x.device)
        width = torch.full((n,), 1 / n, dtype=torch.float64, device=x.device)
    else:  # in units of 1/(n m), the steps end at whole numbers
        steps = [torch.arange(1, size + 1, device="cpu") * other for size, other in ((n, m), (m, n))]
        ends = torch.cat(steps).unique().to(x.device)
        width = ends.diff(prepend=ends.new_zeros(1)).to(torch.float64) / (n * m)
        i, j = (ends - 1) // m, (ends - 1) // n
    blocks = directions.split(max(1, _NUMBERS_PER_BLOCK // (4 * (n + m))), dim=1)
    gaps = [((x @ u).sort(0).values[i] - (y @ u).sort(0).values[j]).abs().pow(power) for u in blocks]
    return torch.cat([width @ gap for gap in gaps])
