"""Ratio: divergences from two samples alone, by a classifier that learns log p/q and is scored on rows it hasn't seen."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import logsigmoid

from whichkl._checks import InputError, cannot
from whichkl.divergences.estimate import NORMAL, Estimate
from whichkl.divergences.kinds import (
    KINDS,
    ChiSquared,
    IntegralDivergence,
    JensenShannonDivergence,
    RenyiDivergence,
    TotalVariation,
    WeightedKLs,
    divergence_named,
)
from whichkl.divergences.samples.bound import hidden
from whichkl.divergences.samples.entangled import doubt_of_curves
from whichkl.divergences.samples.logistic import MAX_EXPONENT, MIN_ROWS, Parts, mean_with_error, median_with_error
from whichkl.divergences.samples.neighbor_calibration import MIN_ROWS_FOR_ERROR
from whichkl.divergences.samples.neighbors import Neighbors, Rows
from whichkl.divergences.samples.reach import (
    BIAS_FACTOR,
    MAX_ERRORS_BEYOND_REACH,
    MAX_SHARE_BEYOND_REACH,
    beyond_reach,
    doubt_of_ends,
    looks_gaussian,
)
from whichkl.divergences.samples.shape_twins import BetterFit, Pooled
from whichkl.importance import khat_limit, pareto_smooth

_LARGE_SHARE = 0.1
"""Share of the divergence from which a bias or a gain matters."""
_MAX_SHARE_OF_SUBTRACTED_BIAS = 1.0
"""Share of the divergence up to which a bias may be subtracted: more, and held-out rows show nothing of it."""
_MAX_MEAN_RATIO = 20.0
"""Mean of p/q over rows of q above which ℓ is wrong: the true ratio's mean exceeds it with a chance of at most 1/20 (Markov)."""
_MAX_SHARE_OF_FINER_FEATURES = 1 / 3
"""Share of the value that finer features may add where products are left out, which other shapes may need as much."""
_MAX_ROWS_OF_FINER_FEATURES = 15_000
"""Largest number of rows of each sample to which finer features are fitted."""
_SHARE_OF_WHAT_FINER_FEATURES_ADD = 0.5
"""Share of what finer features add in several columns by which the interval is wider at both ends."""
_UNNOTICED_GAIN = 4.0
"""Nats of log loss, over all rows, of a feature that may go unnoticed: one of 2.8 standard errors. What rejected finer features
lost on held-out rows is added: one of them that gains as much is hidden by what fitting the others costs."""
_WAVES = 100
_NEIGHBORS = (5, 20, 60)
_MAX_ROWS_OF_NEIGHBORS = 10_000
_MAX_KHAT_OF_LIGHT_TAIL = 0.4
_MAX_ROWS_OF_TWINS = 40_000
_Levels = tuple[float, float]


def classifier_divergence(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], kind: str | IntegralDivergence, *, folds: int = 5, seed: int = 0
) -> Estimate:
    """Any divergence of p from q, in nats, from draws alone: a classifier's held-out logit − log(n/m) is ℓ = log p/q.

    It is ridge logistic regression on the columns, their squares and (from 5 d(d + 3) rows a sample) products, and, unless
    that raises the held-out log loss, on `finer_features`. Forward KL is E_p ℓ − E_q[eˡ − 1]. The last term is 0 where ℓ is right
    and makes the error of ℓ count in squares only (it is left out where eˡ has a tail, k̂ ≥ 0.4); reverse KL is the same from q's
    side, Jeffreys their weighted sum, χ² E_p eˡ − 1, Rényi's integral for a > 1 E_p e^{(a−1)ℓ}; any other ∫ h(p, q) is
    E_p ∂h/∂p + E_q ∂h/∂q at ℓ, lower for a wrong ℓ. Sampling can push each below 0. O((n + m) k² folds) time for k terms.

    Misfit and shrinkage bias it. The bias is measured on the pooled rows, dealt out again at random (truth 0), and on twins:
    Gaussians like x and y (truth by their densities) for a quadratic ℓ, otherwise the rows with labels drawn by ℓ
    (`shape_twins`), whose bias is subtracted, with its error. The bias on the twins widens the interval at both ends. So does
    half of what finer features add in several columns, since such shapes may go on beyond them, what lies beyond the ends of a
    sample (`beyond_reach`; a quadratic ℓ reaches further where the rows look Gaussian), and what this many rows leave unnoticed.
    The global generator isn't touched. The answer isn't `reliable` if

    - a bias exceeds 2 standard errors and 10 %, or with finer features the value itself;
    - E_q[p/q] or E_p[q/p] isn't 1, or ℓ doesn't fit (`_misfit`);
    - more than 2 errors and 30 % lie beyond reach, or one sample goes on where the other ends (`doubt_of_ends`);
    - finer features add more than a third where products are left out;
    - the terms have a heavy tail, one side has fewer than 50 rows, or rows lie near a curve (`doubt_of_curves`).

    Source: Qin (1998); Sugiyama, Suzuki & Kanamori (2012); cross-fitting: Chernozhukov et al. (2018).

    >>> x, y = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    >>> estimate = classifier_divergence(x + 1, y, "forward_kl")
    >>> abs(estimate.value - 0.5) < 3 * estimate.stderr, estimate.reliable
    (True, True)
    """
    kind = divergence_named(kind, KINDS) if isinstance(kind, str) else kind
    if not 2 <= folds <= MIN_ROWS:
        raise InputError(cannot(f"use `folds={folds}`", f"it must be 2 to {MIN_ROWS}", "Use 5"))
    sample = Pooled.of(x, y, folds, torch.Generator().manual_seed(seed))
    some = sample.at_most(_MAX_ROWS_OF_FINER_FEATURES)
    fit = some.better_fit()
    if fit.coarse is not None and some is not sample:
        found = _with_error(kind, some, fit, seed)
        return replace(found, notes=(*found.notes, f"finer features are fitted to {len(some.z):,} rows, chosen at random"))
    return _with_error(kind, sample, fit if some is sample else BetterFit(*sample.fit(sample.z), None, fit.lost), seed)


def _with_error(kind: IntegralDivergence, sample: Pooled, fit: BetterFit, seed: int) -> Estimate:
    """The divergence at held-out ℓ, with its bias and error."""
    z, n, (log_ratio, parts, coarse, lost) = sample.z, sample.n, fit
    fine = coarse is not None
    # The same levels for the twins as for the data: their bias must be that of one and the same estimator.
    levels = _levels(log_ratio, n)
    value, stderr, *terms = _score(kind, n, log_ratio, parts, levels)
    # Rows dealt out at random belong to one law, so that whatever the classifier shows on them is its bias.
    dealt = z[torch.randperm(len(z), generator=sample.generator, device="cpu")]
    bias, bias_error, as_gaussian = _on_twins(kind, sample, log_ratio if fine else None, dealt, levels)
    biases = _score(kind, n, *sample.fit(dealt, fine=fine), levels)[:2], (bias, bias_error)
    # A quadratic ℓ can be extrapolated where the rows look like those of Gaussians.
    unseen = max(0.0, _unseen(kind, sample) - as_gaussian * all(looks_gaussian(one.cpu().numpy()) for one in (z[:n], z[n:])))
    unshown = math.hypot(unseen, _unnoticed(kind, n, log_ratio, _UNNOTICED_GAIN + lost))
    # In several columns, where these features show much that no quadratic has, others may show more.
    added = 0.0 if coarse is None or z.shape[1] == 1 else abs(value - _score(kind, n, coarse, [], levels)[0])
    value -= bias if fine else 0.0
    sides = [mean_with_error(torch.exp(one.clamp(max=MAX_EXPONENT))) for one in (log_ratio[n:], -log_ratio[:n])]
    # A bias that is subtracted may be a larger share: only what the twins get wrong of it remains.
    share = _MAX_SHARE_OF_SUBTRACTED_BIAS if fine else _LARGE_SHARE
    large = [not abs(one) <= max(2 * stderr, 2 * error, share * abs(value)) for one, error in biases]
    # The measured bias contains its own noise, whose mean square is subtracted.
    excess = math.sqrt(max(0.0, bias**2 - bias_error**2))
    ends = [doubt for _, *pair in _directions(kind, sample) for doubt in doubt_of_ends(*pair)]
    wrong = _misfit(sample, log_ratio) + _out_of_reach(unseen, stderr, value) + ends + doubt_of_curves(z[:n], z[n:])
    if added > _MAX_SHARE_OF_FINER_FEATURES * abs(value) and not sample.full:
        wrong.append(f"without products, finer features add {added:.2g} to a quadratic ℓ, and others may add more")
    khat = max(_khat(one) for one in terms) if not kind.bounded else None
    # The tail of a KL's ℓ is what lies beyond reach, which `_unseen` and twins of the shape measure better than k̂.
    wrong += [] if fine and isinstance(kind, WeightedKLs) else _tail(terms, khat, min(n, len(z) - n))
    if min(n, len(z) - n) < MIN_ROWS_FOR_ERROR:
        wrong.append(f"error bars need {MIN_ROWS_FOR_ERROR} rows, and there are {min(n, len(z) - n)}")
    # E_q[p/q] = E_p[q/p] = 1 for the true ratio: two checks that need no other estimate.
    off = any(not abs(mean - 1) <= max(3 * error, _LARGE_SHARE) or mean > _MAX_MEAN_RATIO for mean, error in sides)
    because = [": no small part of this value" if one else "" for one in large]
    shape = "has finer features too" if fine else "is taken to be quadratic in the columns"
    twins = "these rows, with labels drawn by the classifier," if fine else "draws of Gaussians like `x` and `y`"
    notes = [
        f"the classifier's log ratio {shape}{'' if sample.full else ', without products'}",
        "on held-out rows E_q[p/q] = {:.3g} ± {:.2g} and E_p[q/p] = {:.3g} ± {:.2g}, ".format(*sides[0], *sides[1])
        + ("one too far from 1" if off else "near 1 as they must be"),
        f"on the pooled rows, dealt out again at random, it gives {biases[0][0]:.3g} ± {biases[0][1]:.2g}, truth 0{because[0]}",
        f"on {twins} its bias is {bias:+.2g} ± {bias_error:.1g}{', which is subtracted' if fine else ''}{because[1]}",
        f"the error is {stderr:.2g} by sampling, {excess:.2g} for bias, {unshown:.2g} for what isn't seen",
    ]
    shape = ("" if sample.full else "diagonal ") + ("finer" if fine else "quadratic")
    method = f"cross-fitted classifier ({shape} logistic, {sample.folds} folds)"
    # The interval shifts by the bias: it covers 95 to 97.5 % if the twins have it right. A smoothed ℓ shows less of it.
    reach, subtracted = (BIAS_FACTOR * excess, bias_error) if fine else (excess, 0.0)
    error = math.hypot(stderr, unshown, subtracted) + (reach + _SHARE_OF_WHAT_FINER_FEATURES_ADD * added) / NORMAL
    wrong += _doubts_by_columns(kind.name, z, n, value + NORMAL * error, seed)
    good = not (any(large) or off or wrong)
    return Estimate(kind.name, value, error, method=method, n=len(z), khat=khat, reliable=good, notes=(*wrong, *notes))


def _tail(terms: list[Tensor], khat: float | None, rows: int) -> list[str]:
    """Report terms with a heavy tail; k̂ of nearly constant terms means nothing, and a tail harms where they differ by a nat."""
    if khat is None or khat < min(0.5, khat_limit(rows)) or all(float(one.max() - one.min()) <= 1 for one in terms):
        return []
    return [f"the terms have a heavy tail, or too few rows to judge it (k̂ = {khat:.2f})"]


def _unseen(kind: IntegralDivergence, sample: Pooled) -> float:
    """What of the divergence may lie beyond the ends of a sample; 0 for bounded ones, which no tail can raise by much."""
    return sum(weight * beyond_reach(*pair) for weight, *pair in _directions(kind, sample))


def _directions(kind: IntegralDivergence, sample: Pooled) -> list[tuple[float, Rows, Rows]]:
    """The rows that go on and the rows that they may leave, with the weight of this KL; none for bounded divergences."""
    x, y = (part.cpu().numpy() for part in (sample.z[: sample.n], sample.z[sample.n :]))
    forward, reverse = kind.kl_weights if isinstance(kind, WeightedKLs) else (float(not kind.bounded), 0.0)
    return [(weight, *pair) for weight, pair in ((forward, (x, y)), (reverse, (y, x))) if weight]


def _out_of_reach(unseen: float, stderr: float, value: float) -> list[str]:
    if unseen <= max(MAX_ERRORS_BEYOND_REACH * stderr, MAX_SHARE_BEYOND_REACH * abs(value)):
        return []
    return [f"about {unseen:.2g} nats lie beyond the outermost rows of a sample, where its density can't be seen"]


def _unnoticed(kind: IntegralDivergence, n: int, ratio: Tensor, gain: float) -> float:
    """What a feature adds to the divergence whose log loss gains only these nats on all rows.

    A ridge that finds no better penalty shrinks ℓ to nothing, and its standard error with it.
    """
    # Two atoms with ℓ = ±δ: the gain in all is δ² n m / (2 (n + m)), the variance of ℓ times that of the labels, halved.
    delta = math.sqrt(2 * gain * len(ratio) / (n * (len(ratio) - n)))
    if isinstance(kind, TotalVariation):  # only a feature that turns the sign of ℓ adds to it
        return sum(float((delta - part.abs()).clamp(min=0).mean()) for part in (ratio[:n], ratio[n:])) / 4
    log_p = logsigmoid(torch.tensor([delta, -delta], dtype=torch.float64, device="cpu"))
    return float(kind.of_integral(float(kind.integrand(log_p, log_p.flip(0)).sum())))


def _misfit(sample: Pooled, log_ratio: Tensor) -> list[str]:
    """Report what the rows show beyond ℓ: waves distinguish x from reweighted y, or the errors of neighbouring rows correlate."""
    z, n, generator = sample.z, sample.n, sample.generator
    size = abs(_score(JensenShannonDivergence(), n, log_ratio, [])[0])
    seen = {
        "waves in the rows still distinguish `x` from `y`": _gap_of_waves(z, n, log_ratio, size, generator),
        "the errors of neighbouring rows correlate": _correlation_of_neighbors(z, n, log_ratio, size, generator),
    }
    return [f"ℓ doesn't fit: {text} (z = {score:.1f})" for text, score in seen.items() if score]


def _gap_of_waves(z: Tensor, n: int, ratio: Tensor, size: float, generator: torch.Generator) -> float | None:
    """Standardised gap of the wave g that best distinguishes x from y beyond ℓ, or None where no gap is large.

    E_p[g σ(−ℓ)] = E_q[g σ(ℓ)] where ℓ is right. `size` is the Jensen–Shannon divergence by ℓ.
    """
    aim = torch.randn(z.shape[1], _WAVES, generator=generator, dtype=z.dtype, device="cpu")
    axes = torch.arange(_WAVES // 2, device="cpu")  # half of the waves run along a column, one column after another
    aim[:, axes] = torch.eye(z.shape[1], dtype=z.dtype, device="cpu")[:, axes % z.shape[1]]
    phase, length = torch.rand(2, _WAVES, generator=generator, dtype=z.dtype, device="cpu")
    # 0.5 to 3 radians per standard deviation: wavelengths of 2 to 13 standard deviations.
    wave = torch.cos(z @ (aim / aim.norm(dim=0) * (0.5 + 2.5 * length)).to(z.device) + 2 * math.pi * phase.to(z.device))
    s = torch.sigmoid(ratio)[:, None]
    over_p, over_q, spread = wave[:n] * (1 - s[:n]), wave[n:] * s[n:], (s * (1 - s)).clamp(min=1e-300) * wave.square()
    gap = (over_p.mean(0) - over_q.mean(0)).abs()
    score = gap / (over_p.var(0) / n + over_q.var(0) / len(over_q)).sqrt()
    gain = gap.square() / (4 * (spread[:n].mean(0) + spread[n:].mean(0)))
    # The largest of a hundred waves is above 4.5 by chance about once in fifteen hundred samples.
    seen = (score > 4.5) & (gain > _LARGE_SHARE * size)
    return float(score[seen].max()) if bool(seen.any()) else None


def _correlation_of_neighbors(z: Tensor, n: int, ratio: Tensor, size: float, generator: torch.Generator) -> float | None:
    """Standardised Σ rᵢ rⱼ over neighbours, r = label − σ(ℓ), or None; where ℓ is right, r are independent with mean 0.

    Source: Moran (1950), with the variance that the probabilities give.
    """
    share = torch.logit(torch.tensor(n / len(z), dtype=z.dtype, device="cpu"))
    some = torch.randperm(len(z), generator=generator, device="cpu")[:_MAX_ROWS_OF_NEIGHBORS]
    rows, s = z[some].cpu().numpy(), torch.sigmoid(ratio[some] + share).cpu()
    index = Neighbors(rows)
    r, spread = (some < n).to(z.dtype) - s, (s * (1 - s)).clamp(min=1e-300)
    seen: list[float] = []
    for k in (min(most, len(rows) // 10) for most in _NEIGHBORS):
        near = torch.from_numpy(index.nearest(rows, k + 1))
        link = (near != torch.arange(len(rows), device="cpu")[:, None]).to(z.dtype)
        around = (link * r[near]).sum(1) / k
        total = float((r * around).sum())
        # a pair counts twice where each is the other's neighbour, which is so for most: 2 bounds the variance
        deviation = math.sqrt(2 * float((spread * (link * spread[near]).sum(1)).sum())) / k
        # noise in what's around makes the gain come out several times too small
        gain = total**2 / (2 * len(rows) * float((spread * around.square()).sum()))
        if total > 3.2 * deviation and gain > _LARGE_SHARE / 8 * size:
            seen.append(total / deviation)
    return max(seen, default=None)


def _score(
    kind: IntegralDivergence, n: int, ratio: Tensor, parts: Parts, levels: _Levels = (0.0, 0.0)
) -> tuple[float, float, Tensor, Tensor]:
    """The divergence at held-out ℓ, its error (of the means, and of the fits by the delta method), and its terms."""
    ratio = ratio.clone().requires_grad_(True)
    over_p, over_q = (terms[part] for terms, part in zip(_terms(kind, ratio, levels), (slice(n), slice(n, None)), strict=True))
    # The slope of the value in each ℓ: the delta method carries errors of the fits, by their rows, into the error of the value.
    (pull,) = torch.autograd.grad(over_p.mean() + over_q.mean(), ratio)
    over_p, over_q = over_p.detach(), over_q.detach()
    share, total = torch.cat([over_p / n, over_q / len(over_q)]), float(over_p.mean() + over_q.mean())
    for held, features, residual, factor in parts:
        # Infinitesimal jackknife: the curvature's inverse tells how each fitted row moves β, and so the held-out ℓ.
        along = torch.cholesky_solve((features[held].T @ pull[held])[:, None], factor)[:, 0]
        share[~held] += (features[~held] @ along) * residual / len(residual)
    stderr = math.sqrt(sum(len(one) * float(one.var()) for one in (share[:n], share[n:])))
    return kind.of_integral(total), kind.error_of_integral(stderr, total), over_p, over_q


def _terms(kind: IntegralDivergence, ratio: Tensor, levels: _Levels) -> tuple[Tensor, Tensor]:
    """Return the terms to average over p and over q, at every ℓ."""
    if isinstance(kind, WeightedKLs):
        forward, reverse = kind.kl_weights
        up, down = (level * torch.exp(one.clamp(max=MAX_EXPONENT)) for level, one in zip(levels, (ratio, -ratio), strict=True))
        return forward * ratio + reverse * (levels[1] - down), forward * (levels[0] - up) - reverse * ratio
    # χ² is ∫ p²/q − 1: the power 1 of the ratio. Its mean under p needs no term under q.
    power = kind.order - 1 if isinstance(kind, RenyiDivergence) else float(isinstance(kind, ChiSquared))
    if power > 0:
        return torch.exp((power * ratio).clamp(max=MAX_EXPONENT)) - float(isinstance(kind, ChiSquared)), 0 * ratio
    ratio = ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    log_p, log_q = logsigmoid(ratio), logsigmoid(-ratio)
    # The tangent of a convex h lies below it: on average a wrong ℓ makes the value too low, never too high.
    slopes = torch.autograd.grad(kind.integrand(log_p, log_q).sum(), (log_p, log_q), create_graph=True)
    return slopes[0] * torch.exp(-log_p), slopes[1] * torch.exp(-log_q)


def _on_twins(
    kind: IntegralDivergence, sample: Pooled, ratio: Tensor | None, dealt: Tensor, levels: _Levels
) -> tuple[float, float, float]:
    """Bias and its error on 3 to 8 twins, Gaussians or the rows with labels drawn by ℓ; what lies beyond reach of Gaussians."""
    gaps, unseen = [], []
    repeats = max(3, min(8 if ratio is None else 5, _MAX_ROWS_OF_TWINS // len(sample.z)))
    for _ in range(repeats):
        twin, known = _gaussian_twin(sample, dealt) if ratio is None else sample.relabelled(ratio)
        found = _score(kind, twin.n, *twin.fit(twin.z, fine=ratio is not None), levels)[0]
        gaps.append(found - _score(kind, twin.n, known, [], levels)[0])
        unseen.append(_unseen(kind, twin) if ratio is None else 0.0)
    # The median, with its error by the median deviation: on few twins, an exponential of ℓ can be of any size.
    bias, error = median_with_error(gaps)
    return bias, error, statistics.fmean(unseen) + 2 * statistics.stdev(unseen)


def _gaussian_twin(sample: Pooled, dealt: Tensor) -> tuple[Pooled, Tensor]:
    """Draws of Gaussians like x and y, with true ℓ, their distance reduced by what sampling alone gives (as on dealt rows)."""
    z, n = sample.z, sample.n
    pairs = _gaussians(dealt, n, 1.0), _gaussians(z, n, 1.0)
    by_chance, seen = (float(kl_divergence(a, b) + kl_divergence(b, a)) for a, b in pairs)
    # Sampling alone sets two samples of one law apart. Without this correction the twins would lie too far from each other.
    laws = _gaussians(z, n, math.sqrt(max(0.0, 1 - by_chance / max(seen, 1e-300))))
    noise = torch.randn(z.shape, generator=sample.generator, dtype=z.dtype, device="cpu").to(z.device)
    twin = torch.cat([law.loc + part @ law.scale_tril.T for law, part in zip(laws, (noise[:n], noise[n:]), strict=True)])
    return replace(sample, z=twin), laws[0].log_prob(twin) - laws[1].log_prob(twin)


def _gaussians(z: Tensor, n: int, apart: float) -> list[MultivariateNormal]:
    d, both = z.shape[1], (z[:n], z[n:])
    means, covariances = torch.stack([one.mean(0) for one in both]), torch.stack([one.T.cov().reshape(d, d) for one in both])
    means, covariances = (torch.lerp(m.mean(0, keepdim=True), m, apart) for m in (means, covariances))
    roots = torch.linalg.cholesky(covariances + 1e-9 * torch.eye(d, dtype=z.dtype, device=z.device))
    return [MultivariateNormal(mean, scale_tril=root, validate_args=False) for mean, root in zip(means, roots, strict=True)]


def _doubts_by_columns(name: str, z: Tensor, n: int, upper: float, seed: int) -> list[str]:
    """Report few columns that alone show more than a KL of all."""
    x, y = z[:n].cpu().numpy(), z[n:].cpu().numpy()
    if name == "forward_kl":
        return hidden(x, y, upper, seed)
    return hidden(y, x, upper, seed) if name == "reverse_kl" else []


def _khat(terms: Tensor) -> float:
    sides = (terms - terms.amin(), terms.amax() - terms)
    return max(pareto_smooth(one.clamp(min=1e-300).log())[1] for one in sides) if bool(sides[0].any()) else -math.inf


def _levels(log_ratio: Tensor, n: int) -> _Levels:
    """Return 1 for the correction terms 1 − eˡ under q and 1 − e⁻ˡ under p whose exponential has a light tail, 0 for others."""

    def level(log_terms: Tensor) -> float:
        is_equal = float(log_terms.max() - log_terms.min()) <= 1e-9
        return float(is_equal or pareto_smooth(log_terms)[1] < _MAX_KHAT_OF_LIGHT_TAIL)

    return level(log_ratio[n:]), level(-log_ratio[:n])
