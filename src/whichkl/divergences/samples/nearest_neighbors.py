"""Nearest neighbours: KL from samples alone, or from samples and a log density, with its bias measured on twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch.distributions import MultivariateNormal, kl_divergence

from whichkl._checks import InputError, cannot, check_log_prob
from whichkl.arrays import or_transposed
from whichkl.divergences import regions
from whichkl.divergences.draws.monte_carlo import HEAVY, missed
from whichkl.divergences.estimate import NORMAL, Estimate
from whichkl.divergences.samples.bound import hidden
from whichkl.divergences.samples.entropy import blur, mean_log_density
from whichkl.divergences.samples.neighbor_calibration import (
    TWIN_ROWS,
    bias_on,
    by_shape,
    drift,
    gaussian,
    judged,
    spread,
    subsamples,
    twin_rows,
)
from whichkl.divergences.samples.neighbors import (
    MAX_ROWS_OF_FULL_CORRECTION,
    Rows,
    Variant,
    compare,
    finite,
    many_terms,
    terms_of,
    whiten,
)
from whichkl.divergences.samples.reach import BIAS_FACTOR, doubt_of_ends, largest_shape, raised_for_reach
from whichkl.importance import doubt_of_log_ratio, tail_shape
from whichkl.targets import Target

_MAX_SHARE_OF_LONELY_ROWS = 0.05
"""Share of x's rows without local neighbours in y from which the divergence may be infinite."""
_MAX_ROWS_OF_BLUR_CHECK = 2_000
_MAX_DIMENSIONS_OF_BLUR = 3
_TWINS = 10


def two_sample_kl(x: Any, y: Any, *, k: int = 5, seed: int = 0, variant: Variant = "bias_reduced") -> Estimate:
    """KL(p‖q) in nats from samples x ~ p, (n, d), and y ~ q, (m, d); consistent, for continuous laws.

    Both are whitened together first. Above 20,000 rows of x, the bias reduction is measured on a tenth of them, 10,000 at
    least. What lies beyond the ends of y raises the value, with an error of its own (`raised_for_reach`). The error of sampling
    is that of subsamples of n^(2/3) rows, scaled, or the spread on Gaussian twins of the data if that's larger. A bias is added
    in squares: that on the Gaussian twins, or, if larger, that of the shape (`by_shape`). Rounded rows are spread within their
    step.

    The answer isn't `reliable`

    - where more than 2 sampling errors and 30 % of the value lie beyond the ends of y, or x goes on where y seems to end;
    - where a bias is above two sampling errors (one for that of the shape) and a tenth, or fitting noise makes up as much of the
      twin's truth;
    - where the value comes near its `cap`, or a twentieth of x lies so far from y that the balls around them aren't local (the KL
      may be infinite);
    - where it grows with the rows by more than on the twin, or few columns alone show more than all together;
    - below 50 rows.

    x and y are whatever `Target.of` reads. More neighbours, k, lower the variance and raise the bias; for `variant` see
    `point_estimate`; the seed fixes subsamples, twins and spreading.

    Source: Wang, Kulkarni & Verdú (2009); subsampling, Politis & Romano (1994).

    >>> z = np.random.default_rng(0).normal(size=(2000, 2))
    >>> two_sample_kl(z[:1000] + [1, 0], z[1000:]).number  # the truth is 0.5
    '0.4... ± 0...'
    """
    generator = np.random.default_rng(seed)

    def estimate(*parts: Rows) -> float:
        return compare(parts[0], parts[1], min(k, len(parts[0]) - 1, len(parts[1])), variant)

    (a, b), coarse, notes, wrong = spread(_pair(x, y, k, variant), generator)
    # Balls measure best where columns have one scale and no correlation. One linear map for both leaves the KL as it is.
    white = whiten(a, b)
    p, q = twin = gaussian(white[0]), gaussian(white[1])
    most = TWIN_ROWS if max(len(a), len(b)) <= TWIN_ROWS else TWIN_ROWS // 8
    # Both laws the same: the truth is exactly 0, and no ratio of densities adds noise.
    null = bias_on(p, p, min(len(a), most), min(len(b), most), estimate, generator)
    bias = bias_on(p, q, len(a), len(b), estimate, generator)
    truth = float(kl_divergence(p, q))
    rows = f" (at {twin_rows(len(a), len(b)):,} rows)" if max(len(a), len(b)) > TWIN_ROWS else ""
    notes += [f"on Gaussians fitted to this data (truth {truth:.3g}) it gives {truth + bias.value:.3g}{rows}"]
    fewer = f", {most:,} rows" if most < min(len(a), len(b)) else ""
    notes += [f"on two samples of one Gaussian (truth 0{fewer}) it gives {null.value:.2g} ± {null.error:.1g}"]
    # Subsamples in place of a bootstrap: a bootstrap's repeated rows have distance 0 to themselves.
    few = subsamples(white, estimate, generator)
    value, terms, further = _value(white, min(k, len(a) - 1, len(b)), variant, generator)
    sampling = math.hypot(max(few.error, bias.spread), further)  # subsamples of few rows of many columns differ too little
    cap = float(scipy.special.digamma(len(b) + 1) - scipy.special.digamma(k)) if variant == "bias_reduced" else None
    wrong += _out_of_reach(terms, value, cap, len(b), k) + _fitting_noise(a, b, sampling, truth)
    wrong += drift(value, sampling, few, bias, bias_on(p, q, *few.sizes, estimate, generator, 25), a.shape)
    blur = 0.0
    if len(a) <= MAX_ROWS_OF_FULL_CORRECTION and 2 * k < min(len(a), len(b), _MAX_ROWS_OF_BLUR_CHECK) / 4:
        blur, reasons = _blurred(white, twin, k, variant, generator)
        wrong += reasons
    shape, reasons = by_shape(a, b, estimate, value, sampling, blur, seed)
    raised, unseen, further_notes, more = raised_for_reach(a, b, sampling, value)
    wrong += more + reasons + doubt_of_ends(a, b)
    shape, notes = math.hypot(shape, unseen), notes + further_notes
    # Whatever a part of the columns shows is a lower bound of the whole: above this end it contradicts the interval.
    wrong += hidden(a, b, value + raised + NORMAL * math.hypot(sampling, max(abs(bias.value), shape)), seed)
    method = f"nearest neighbours, k = {k}, two samples, {variant.replace('_', '-')}"
    raw = Estimate("forward_kl", value + raised, sampling, method=method, n=len(a), cap=cap, notes=tuple(notes))
    change = estimate(*whiten(*coarse)) - value if coarse else 0.0
    return judged(raw, bias, truth, change, min(len(a), len(b)), wrong, shape)


def _value(
    white: list[Rows], k: int, variant: Variant, generator: np.random.Generator
) -> tuple[float, Float[np.ndarray, " n"], float]:
    """The KL, the terms of its mean, and the error that a correction measured on a part of the rows adds."""
    if variant == "bias_reduced" and len(white[0]) > MAX_ROWS_OF_FULL_CORRECTION:
        terms, gap, further = many_terms(white[0], white[1], k, generator)
        return float(terms.mean()) + float(gap.mean()) + finite(*white), terms, further
    terms = terms_of(white[0], white[1], k, variant)
    return float(terms.mean()) + finite(*white), terms, 0.0


def _out_of_reach(terms: Float[np.ndarray, " n"], value: float, cap: float | None, m: int, k: int) -> list[str]:
    """Report rows of x that lie far from all m rows of y, and a value near the largest one that the rows can show."""
    wrong = []
    # A term is log of (rows of x per row of y) in a ball: this large, a ball that reaches k rows of y holds a tenth of all x.
    lonely = float((terms > math.log(max(0.1 * len(terms) / k, 15))).mean())
    if lonely > _MAX_SHARE_OF_LONELY_ROWS:
        wrong += [
            f"{lonely:.1%} of the rows of `x` have fewer than {k} of `y` in a ball with a tenth of all `x`: `y` may have no "
            "mass there, and the divergence be infinite, or far above this value"
        ]
    if cap is not None and value > 0.75 * cap:
        wrong += [f"the value is near {cap:.3g}, the most that {m:,} rows and k = {k} can show"]
    return wrong


def _fitting_noise(a: Rows, b: Rows, sampling: float, truth: float) -> list[str]:
    """Report a twin whose truth is largely the noise of fitting it on few rows."""
    # Each of the d (d + 3)/2 fitted numbers of a Gaussian adds 1/(2 n) nats on average: half of a likelihood ratio's mean.
    inflation = a.shape[1] * (a.shape[1] + 3) / 4 * (1 / len(a) + 1 / len(b))
    if inflation <= max(2 * sampling, 0.1 * truth):
        return []
    return [f"the Gaussians are fitted on few rows: about {inflation:.2g} of its {truth:.3g} is fitting noise (Wilks, 1938)"]


def one_sample_kl(x: Any, log_q: Callable[[torch.Tensor], Any], *, k: int = 5, seed: int = 0) -> Estimate:
    """KL(p‖q) in nats from samples x ~ p, (n, d), and a normalised log density of q; ∞ where a row has log q = −∞.

    mean[ψ(k) − ψ(n) − log V_d − d log ρ_k(x) − log q(x)], ρ_k the distance to the k-th other row and V_d the volume of the
    unit ball. In several columns the entropy is that of each column and of their dependence (`mean_log_density`), and the bias
    on a Gaussian fitted to the rows is subtracted; half of it, and what wide balls hide (`blur`), widen the interval. Where the
    bias is larger than the value, or log q has a heavy tail over the rows, the answer isn't `reliable`. `log_q` gets a float64
    tensor (n, d) and returns (n,), normalised, natural log; the rest is as in `two_sample_kl`, the bias that of p's entropy.

    Source: Pérez-Cruz (2008), eq. 18, with ψ(n) in place of log(n − 1).

    >>> z = np.random.default_rng(0).normal(size=(2000, 1))
    >>> one_sample_kl(z, lambda x: -((x[:, 0] - 1) ** 2) / 2 - math.log(2 * math.pi) / 2).number  # the truth is 0.5
    '0.5... ± 0.0...'
    """
    rows, generator = _samples(x, "x", k), np.random.default_rng(seed)
    method, n = f"nearest neighbours, k = {k}, one sample and a log density", len(rows)

    def estimate(*parts: Rows) -> float:
        return mean_log_density(parts[0][:, :-1], min(k, len(parts[0]) - 1)) - float(parts[0][:, -1].mean())

    def checked(part: Rows) -> Rows:
        at = torch.from_numpy(part)
        value = torch.as_tensor(log_q(at), dtype=torch.float64, device="cpu").detach()
        return np.asarray(check_log_prob(value, at, "log_q"))

    given = checked(rows)

    def with_log_q(part: Rows) -> Rows:
        value = checked(part) if part is not rows else given
        # Spreading within a step can move a row beyond the end of q's support, which the unrounded row wouldn't cross.
        value = np.where(value == -math.inf, given, value)  # a rounded row at an end of the support, spread beyond it
        # Whitening multiplies p's density by this volume (here its log); adding it to log q keeps the difference.
        volume = np.linalg.slogdet(np.atleast_2d(np.cov(part.T)))[1] / 2
        return np.column_stack([*whiten(part), value + volume])

    outside = torch.from_numpy(given == -math.inf)
    if bool(outside.any()):
        target = Target.of(x)
        note = missed(outside, lambda mark: regions.ranges(torch.from_numpy(rows), mark.double(), target.names), "rows")
        return Estimate("forward_kl", math.inf, 0.0, None, "infinite", method, n=n, notes=(note,))
    (even,), coarse, notes, wrong = spread([rows], generator)
    table = with_log_q(even)
    few, value, twin = subsamples([table], estimate, generator), estimate(table), gaussian(table[:, :-1])
    bias, shape = bias_on(twin, None, n, 0, estimate, generator), blur(table[:, :-1], k, generator)
    wrong += drift(value, few.error, few, bias, bias_on(twin, None, few.sizes[0], 0, estimate, generator, 25), rows.shape)
    # Log p doesn't rise where log q falls fast: the tail of the log ratio is that of −log q. Draws of a heavy one that happen to
    # look light give a value that is too small, hence the raised shape where p isn't Gaussian.
    if (khat := max(tail_shape(torch.from_numpy(-table[:, -1])), largest_shape(-table[:, -1], even))) >= HEAVY:
        wrong.insert(0, doubt_of_log_ratio(khat))
    change = estimate(with_log_q(coarse[0])) - value if coarse else 0.0
    notes += [f"on a Gaussian fitted to these samples it's off by {bias.value:+.2g} ± {bias.error:.1g}"]
    if rows.shape[1] > 1:  # in several columns the bias is larger than its error, and much the same for all shapes of columns
        known = bias.value * min(1.0, twin_rows(n, 0) / n) ** (1 / rows.shape[1])  # it falls with the radius of balls
        value, shape, bias = value - known, math.hypot(shape, bias.error, (BIAS_FACTOR - 1) * known), bias._replace(value=0.0)
        notes[-1] += ", which is subtracted"
        if abs(known) > max(2 * few.error, abs(value)):
            wrong += [f"the bias on a Gaussian fitted to these samples, {known:+.2g}, is larger than the value"]
    raw = Estimate("forward_kl", value, few.error, method=method, n=n, notes=tuple(notes))
    return judged(raw, bias, value, change, n, wrong, shape)


def _blurred(
    white: list[Rows], twin: tuple[MultivariateNormal, MultivariateNormal], k: int, variant: Variant, generator: Any
) -> tuple[float, list[str]]:
    """What balls wider than the shape hide, if twice as many neighbours give less than on Gaussian twins, and if that's too much.

    What is still missing is extrapolated from the radii, which go as k^(1/d), and is only what exceeds its error.
    """
    sizes = [min(len(part), _MAX_ROWS_OF_BLUR_CHECK) for part in white]
    dim = white[0].shape[1]

    def loss(x: Rows, y: Rows) -> tuple[float, float]:
        value = compare(x, y, k, variant)
        return value, value - compare(x, y, 2 * k, variant)

    chosen = [part[generator.choice(len(part), size, False)] for part, size in zip(white, sizes, strict=True)]
    value, here = loss(chosen[0], chosen[1])
    losses = []
    for _ in range(_TWINS):
        noise = [torch.from_numpy(generator.normal(size=(size, dim))) for size in sizes]
        losses.append(loss(*((law.loc + z @ law.scale_tril.T).numpy() for law, z in zip(twin, noise, strict=True)))[1])
    further, error = here - float(np.mean(losses)), float(np.std(losses, ddof=1)) * math.sqrt(1 + 1 / _TWINS)
    # The blur is proportional to the radius: k neighbours blur this share of what 2 k do, and the sum of all further halvings is
    # left / (1 − left).
    left = 0.5 ** (1 / dim)
    ahead = left / (1 - left)
    # In many dimensions the extrapolation is too long for an unclear loss.
    missing = max(0.0, further - error) * ahead if dim <= _MAX_DIMENSIONS_OF_BLUR else 0.0
    if further <= 3 * error or further * ahead <= 0.1 * abs(value):
        return missing, []
    seen = f"with {2 * k} neighbours for {k} it falls by {here:.2g}, far more than on Gaussians fitted to this data"
    return missing, [f"{seen}: the rows are too few for their shape"]


def _pair(x: Any, y: Any, k: int, variant: str) -> list[Rows]:
    """Read both samples, and move them to one row, where float64 has its digits, and into its range; KL doesn't change."""
    if variant not in ("bias_reduced", "plain"):
        raise InputError(cannot(f"use `variant={variant!r}`", "it is none of them", "Use 'bias_reduced' or 'plain'"))
    a, b = _samples(x, "x", k), _samples(y, "y", k)
    if a.shape[1] != b.shape[1]:
        because = f"`x` has {a.shape[1]} columns and `y` has {b.shape[1]}"
        raise InputError(cannot("compare these samples", because, "Give both the same columns, in the same order"))
    # Timestamps, for example, differ only in their last digits: differences from one row keep what float64 has of these.
    moved = [part - a[0] for part in (a, b)]
    extent = np.maximum(*(np.abs(part).max(0) for part in moved))
    scale = np.where((extent > 1e100) | (extent < 1e-100), extent, 1.0)
    return [part / scale for part in moved]


def _samples(values: Any, name: str, k: int) -> Rows:
    """Read and check one sample; float64, (n, d)."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(cannot(f"use `k={k}`", "it isn't a whole number from 1 on", "Use, say, 5"))
    target, do = Target.of(values), f"find neighbours in `{name}`"
    if target.samples is None or target.weights is not None:
        because = "it is weighted" if target.samples is not None else f"it has only {target.access.label}"
        raise InputError(cannot(do, because, "Give equally weighted samples"))
    x: Rows = target.samples.to("cpu", torch.float64).numpy()
    (n, dim), least = x.shape, max(k, x.shape[1]) + 2
    if n < least:
        because = f"`k={k}` in dimension {dim} needs at least {least} rows, and there are {n}"
        raise InputError(cannot(do, because, f"Give more rows, or a smaller `k`{or_transposed(n, dim)}"))
    flat = ", ".join(f"`{column}`" for column, extent in zip(target.names, np.ptp(x, 0), strict=True) if extent == 0)
    even = (x - x[0]) / (np.abs(x - x[0]).max(0) + (np.ptp(x, 0) == 0))
    # Columns that follow from each other lie on a plane, where no density in d dimensions exists and distances would still give a
    # number.
    dependent = not flat and dim > 1 and np.linalg.eigvalsh(np.corrcoef(even.T))[0] < 1e-12
    if flat or dependent:
        because = f"column {flat} is constant" if flat else "its columns are linearly dependent"
        raise InputError(cannot(do, f"{because}, so that there is no density", "Drop what follows from other columns"))
    return x
