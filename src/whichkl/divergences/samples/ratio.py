"""Ratio: divergences from two samples alone, by a classifier that learns log p/q and is scored on rows it hasn't seen."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits as _log_loss
from torch.nn.functional import logsigmoid

from whichkl._checks import InputError, cannot
from whichkl.divergences.estimate import NORMAL, Estimate
from whichkl.divergences.kinds import KINDS, ChiSquared, IntegralDivergence, JensenShannon, Renyi, WeightedKLs
from whichkl.divergences.samples.margins import hidden
from whichkl.divergences.samples.neighbors import Neighbors
from whichkl.divergences.samples.sample_distances import standardised
from whichkl.importance import khat_limit, pareto_smooth

LEAST_ROWS = 20
_PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6)
_WAVES, _SMALL, EXPONENT = 100, 0.1, 350.0
_RIPPLES, _STIFF = 60, 10.0
_LIGHT, _TWIN_ROWS, _NEAR, _NEAR_ROWS = 0.4, 40_000, (5, 20, 60), 10_000
_Levels = tuple[float, float]
_Parts = list[tuple[Tensor, Tensor, Tensor, Tensor]]


def classifier_divergence(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], kind: str | IntegralDivergence, *, folds: int = 5, seed: int = 0
) -> Estimate:
    """Any divergence of p from q, in nats, from draws alone: a classifier's held-out logit − log(n/m) is ℓ = log p/q.

    It is ridge logistic regression on the columns, their squares and (from 5 d(d + 3) rows a sample) products. Forward KL is
    E_p ℓ − E_q[eˡ − 1], whose last term is 0 where ℓ is right and makes the error of ℓ count in squares only (it's left out
    where eˡ has a tail, k̂ ≥ 0.4); reverse KL is the same from q's side, Jeffreys their sum, χ² E_p eˡ − 1, Rényi's integral
    for a > 1 E_p e^{(a−1)ℓ}; any other ∫ h(p, q) is E_p ∂h/∂p + E_q ∂h/∂q at ℓ, lower for a wrong ℓ. Sampling can push each
    below 0. O((n + m) k² folds) time, k ≤ 500 terms.

    Misfit and shrinkage bias it: measured on pooled rows dealt out anew (truth 0), on Gaussians like x and y (truth by their
    densities), by E_q[p/q] = E_p[q/p] = 1, by waves in the rows, which mustn't tell x from reweighted y, and by neighbouring
    rows, whose errors mustn't be alike. The bias on the
    Gaussians widens the interval at both ends. It isn't `reliable` where a bias exceeds 2 standard errors and 10 %, where an
    identity fails, or where the terms have a heavy tail.

    Args:
        x: draws of p, (n, d) or (n,), at least 20.
        y: draws of q, (m, d) or (m,), at least 20.
        kind: a name in `kinds.KINDS`, or a `IntegralDivergence`.
        folds: parts of the cross-fit, 2 to 20.
        seed: of folds and calibrations; the global generator isn't touched.

    Raises:
        InputError: a sample is too short, has a constant column or a cell that isn't finite; or another argument is bad.

    Source: Qin (1998); Sugiyama, Suzuki & Kanamori (2012); cross-fitting: Chernozhukov et al. (2018).

    >>> x, y = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    >>> estimate = classifier_divergence(x + 1, y, "forward_kl")
    >>> abs(estimate.value - 0.5) < 3 * estimate.stderr, estimate.reliable
    (True, True)
    """
    if isinstance(kind, str) and kind not in KINDS:
        raise InputError(cannot(f"compute `{kind}`", "there is no such kind", f"Use one of {', '.join(KINDS)}"))
    if not 2 <= folds <= LEAST_ROWS:
        raise InputError(cannot(f"use `folds={folds}`", f"it must be 2 to {LEAST_ROWS}", "Use 5"))
    kind = KINDS[kind]() if isinstance(kind, str) else kind
    z, n, rows = standardised(x, y, LEAST_ROWS)
    generator, full = torch.Generator().manual_seed(seed), z.shape[1] * (z.shape[1] + 3) // 2 <= min(rows // 10, 500)
    log_ratio, parts = cross_fit(z, n, folds, full, generator)
    light = [_upper_khat(one) < _LIGHT for one in (log_ratio[n:], -log_ratio[:n])]
    levels = (float(light[0]), float(light[1]))
    value, stderr, *terms = _score(kind, n, log_ratio, parts, levels)
    dealt = z[torch.randperm(len(z), generator=generator, device="cpu")]
    null, null_error, *_ = _score(kind, n, *cross_fit(dealt, n, folds, full, generator), levels)
    bias, bias_error = _bias(kind, z, dealt, n, folds, full, generator, levels)
    sides = [mean(torch.exp(one.clamp(max=EXPONENT))) for one in (log_ratio[n:], -log_ratio[:n])]
    off = any(not abs(mean - 1) <= max(3 * error, _SMALL) for mean, error in sides)
    wave, local = _misfit(z, n, log_ratio, generator), _clustered(z, n, log_ratio, generator)
    finer = _finer(z, n, log_ratio, cross_fit(z, n, folds, full, generator, more=ripples(z, generator))[0])
    khat = max(_khat(one) for one in terms) if not kind.bounded else None
    heavy = khat is not None and khat >= min(0.5, khat_limit(rows)) and any(float(one.max() - one.min()) > 1 for one in terms)
    biases = ((null, null_error), (bias, bias_error))
    large = [not abs(one) <= max(2 * stderr, 2 * error, _SMALL * abs(value)) for one, error in biases]
    excess = math.sqrt(max(0.0, bias**2 - bias_error**2))
    because = [": no small part of this value" if one else "" for one in large]
    notes = [
        f"ℓ is taken to be quadratic in the columns{'' if full else ', without products'}"
        + (f", and isn't: waves in the rows still tell x from y (z = {wave:.1f})" if wave else "")
        + (f", and isn't: neighbouring rows err alike (z = {local:.1f})" if local else "")
        + (f", and isn't: finer shapes tell x from y better on held-out rows (z = {finer:.1f})" if finer else ""),
        "on held-out rows E_q[p/q] = {:.3g} ± {:.2g} and E_p[q/p] = {:.3g} ± {:.2g}, ".format(*sides[0], *sides[1])
        + ("one too far from 1" if off else "near 1 as they must be"),
        f"on the pooled rows dealt out anew it gives {null:.3g} ± {null_error:.2g}, truth 0{because[0]}",
        f"on draws of Gaussians like x and y its bias is {bias:+.2g} ± {bias_error:.1g}{because[1]}",
        f"the error is {stderr:.2g} by sampling and {excess:.2g} for bias",
    ]
    notes += [f"the terms have a heavy tail, or too few rows to judge it (k̂ = {khat:.2f})"] if heavy else []
    method = f"cross-fitted classifier ({'' if full else 'diagonal '}quadratic logistic, {folds} folds)"
    error = stderr + excess / NORMAL  # the interval shifts by the bias: it covers 95 to 97.5 % if the twins have it right
    notes += (doubts := _margins(kind.name, z, n, value + NORMAL * error, seed))
    good = not (any(large) or off or wave or local or finer or heavy or doubts)
    return Estimate(kind.name, value, error, method=method, n=len(z), khat=khat, reliable=good, notes=tuple(notes))


def cross_fit(
    z: Tensor,
    n: int,
    folds: int,
    full: bool,
    generator: torch.Generator,
    rounds: int | None = None,
    more: Tensor | None = None,
    fold: Tensor | None = None,
) -> tuple[Tensor, _Parts]:
    """Fit on all folds but one and read ℓ there, in turn; ℓ is NaN on folds beyond `rounds`. With it, what `_score` needs.

    Further features, `more`, are penalised ten times as much. The fold of each row is drawn at random unless given.
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
        inner = torch.randperm(len(known), generator=generator, device="cpu").to(z.device) % 3 == 0
        penalty, beta, curvature = _tuned(known[~inner], label[~inner], known[inner], label[inner], extra)
        ridge = _ridge(beta, penalty, extra)
        beta, _ = _logistic(known, label, ridge, beta, curvature, 1e-13)
        factor = torch.linalg.cholesky(_curvature(known, known @ beta) + ridge)
        ratio[held] = features[held] @ beta - float(torch.logit(label.mean()))
        parts.append((held, features, label - torch.sigmoid(known @ beta), factor))
    return ratio, parts


def ripples(z: Tensor, generator: torch.Generator) -> Tensor:
    """Cosines along random directions, of many lengths, in the normal scores of the columns: shapes that no quadratic has."""
    score = torch.special.ndtri((z.argsort(0).argsort(0).to(z.dtype) + 0.5) / len(z))
    aim = torch.randn(z.shape[1], _RIPPLES, generator=generator, dtype=z.dtype, device="cpu")
    length, phase = torch.rand(2, _RIPPLES, generator=generator, dtype=z.dtype, device="cpu")
    aim = aim / aim.norm(dim=0) * 0.7 * 8**length
    return torch.cos(score @ aim.to(z.device) + 2 * math.pi * phase.to(z.device))


def _tuned(features: Tensor, label: Tensor, unseen: Tensor, theirs: Tensor, extra: int) -> tuple[float, Tensor, Tensor]:
    """The penalty with the least log loss on unseen rows, from the largest down until the loss rises; its β and curvature."""
    beta, best, least = torch.zeros_like(features[0]), _PENALTIES[0], math.inf
    curvature = _curvature(features, features @ beta)
    for penalty in _PENALTIES:
        now, matrix = _logistic(features, label, _ridge(beta, penalty, extra), beta, curvature, 1e-9)
        loss = float(_log_loss(unseen @ now, theirs))
        if not loss < least:
            break
        best, least, beta, curvature = penalty, loss, now, matrix
    return best, beta, curvature


def _logistic(
    features: Tensor, label: Tensor, ridge: Tensor, beta: Tensor, curvature: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Minimise mean log loss + ½ βᵀ ridge β from β on by damped Newton; and the last curvature used.

    The curvature of an earlier point serves while each step leaves a tenth of what there was to gain: a step with it costs two
    products with a vector, a new one the square of the columns.
    """
    fit, before = features @ beta, math.inf
    value = _log_loss(fit, label) + 0.5 * ridge.diagonal() @ beta.square()
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
            lower = _log_loss(fit - size * along, label) + 0.5 * ridge.diagonal() @ moved.square()
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
    ridge[0] = 1e-9
    ridge[len(ridge) - extra :] *= _STIFF
    return torch.diag(ridge)


def _score(
    kind: IntegralDivergence, n: int, ratio: Tensor, parts: _Parts, levels: _Levels = (0.0, 0.0)
) -> tuple[float, float, Tensor, Tensor]:
    """The divergence at held-out ℓ, its error (of the means, and of the fits by the delta method), and its terms."""
    ratio = ratio.clone().requires_grad_(True)
    over_p, over_q = (terms[part] for terms, part in zip(_terms(kind, ratio, levels), (slice(n), slice(n, None)), strict=True))
    (pull,) = torch.autograd.grad(over_p.mean() + over_q.mean(), ratio)
    over_p, over_q = over_p.detach(), over_q.detach()
    share, total = torch.cat([over_p / n, over_q / len(over_q)]), float(over_p.mean() + over_q.mean())
    for held, features, residual, factor in parts:
        along = torch.cholesky_solve((features[held].T @ pull[held])[:, None], factor)[:, 0]
        share[~held] += (features[~held] @ along) * residual / len(residual)
    stderr = math.sqrt(sum(len(one) * float(one.var()) for one in (share[:n], share[n:])))
    return kind.of_integral(total), kind.error_of_integral(stderr, total), over_p, over_q


def _terms(kind: IntegralDivergence, ratio: Tensor, levels: _Levels) -> tuple[Tensor, Tensor]:
    """What to average over p and over q, at every ℓ."""
    if isinstance(kind, WeightedKLs):
        forward, reverse = kind.kl_weights
        up, down = (level * torch.exp(one.clamp(max=EXPONENT)) for level, one in zip(levels, (ratio, -ratio), strict=True))
        return forward * ratio + reverse * (levels[1] - down), forward * (levels[0] - up) - reverse * ratio
    power = kind.order - 1 if isinstance(kind, Renyi) else float(isinstance(kind, ChiSquared))
    if power > 0:
        return torch.exp((power * ratio).clamp(max=EXPONENT)) - float(isinstance(kind, ChiSquared)), 0 * ratio
    ratio = ratio.clamp(-EXPONENT, EXPONENT)
    log_p, log_q = logsigmoid(ratio), logsigmoid(-ratio)
    slopes = torch.autograd.grad(kind.integrand(log_p, log_q).sum(), (log_p, log_q), create_graph=True)
    return slopes[0] * torch.exp(-log_p), slopes[1] * torch.exp(-log_q)


def _bias(
    kind: IntegralDivergence,
    z: Tensor,
    dealt: Tensor,
    n: int,
    folds: int,
    full: bool,
    generator: torch.Generator,
    levels: _Levels,
) -> tuple[float, float]:
    """Bias, and its error, on 3 to 8 pairs of samples of Gaussians like x and y, by whose densities the truth is known."""
    gaps = []
    for _ in range(max(3, min(8, _TWIN_ROWS // len(z)))):
        twin, ratio = _twin(z, dealt, n, generator)
        found = _score(kind, n, *cross_fit(twin, n, folds, full, generator), levels)[0]
        gaps.append(found - _score(kind, n, ratio, [], levels)[0])
    of_all = torch.tensor(gaps, dtype=torch.float64, device="cpu")
    return float(of_all.mean()), float(of_all.std()) / math.sqrt(len(gaps))


def _twin(z: Tensor, dealt: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws of Gaussians fitted to x and y, drawn together by what sampling alone (as on dealt rows) sets apart; true ℓ."""
    pairs = _gaussians(dealt, n, 1.0), _gaussians(z, n, 1.0)
    by_chance, seen = (float(kl_divergence(a, b) + kl_divergence(b, a)) for a, b in pairs)
    laws = _gaussians(z, n, math.sqrt(max(0.0, 1 - by_chance / max(seen, 1e-300))))
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device="cpu").to(z.device)
    twin = torch.cat([law.loc + part @ law.scale_tril.T for law, part in zip(laws, (noise[:n], noise[n:]), strict=True)])
    return twin, laws[0].log_prob(twin) - laws[1].log_prob(twin)


def _gaussians(z: Tensor, n: int, apart: float) -> list[MultivariateNormal]:
    d, both = z.shape[1], (z[:n], z[n:])
    means, covariances = torch.stack([one.mean(0) for one in both]), torch.stack([one.T.cov().reshape(d, d) for one in both])
    means, covariances = (torch.lerp(m.mean(0, keepdim=True), m, apart) for m in (means, covariances))
    roots = torch.linalg.cholesky(covariances + 1e-9 * torch.eye(d, dtype=z.dtype, device=z.device))
    return [MultivariateNormal(mean, scale_tril=root, validate_args=False) for mean, root in zip(means, roots, strict=True)]


def _misfit(z: Tensor, n: int, ratio: Tensor, generator: torch.Generator) -> float | None:
    """Standardised gap of the wave g that best tells x from y beyond ℓ, or None; E_p[g σ(−ℓ)] = E_q[g σ(ℓ)] where ℓ is right."""
    aim, axes = (
        torch.randn(z.shape[1], _WAVES, generator=generator, dtype=z.dtype, device="cpu"),
        torch.arange(_WAVES // 2, device="cpu"),
    )
    aim[:, axes] = torch.eye(z.shape[1], dtype=z.dtype, device="cpu")[:, axes % z.shape[1]]
    phase, length = torch.rand(2, _WAVES, generator=generator, dtype=z.dtype, device="cpu")
    wave = torch.cos(z @ (aim / aim.norm(dim=0) * (0.5 + 2.5 * length)).to(z.device) + 2 * math.pi * phase.to(z.device))
    s = torch.sigmoid(ratio)[:, None]
    over_p, over_q, spread = wave[:n] * (1 - s[:n]), wave[n:] * s[n:], (s * (1 - s)).clamp(min=1e-300) * wave.square()
    gap = (over_p.mean(0) - over_q.mean(0)).abs()
    score = gap / (over_p.var(0) / n + over_q.var(0) / len(over_q)).sqrt()
    gain = gap.square() / (4 * (spread[:n].mean(0) + spread[n:].mean(0)))
    seen = (score > 4.5) & (gain > _SMALL * abs(_score(JensenShannon(), n, ratio, [])[0]))
    return float(score[seen].max()) if bool(seen.any()) else None


def _margins(name: str, z: Tensor, n: int, upper: float, seed: int) -> list[str]:
    """What few columns alone say against a KL."""
    if name not in ("forward_kl", "reverse_kl"):
        return []
    x, y = z[:n].cpu().numpy(), z[n:].cpu().numpy()
    return hidden(x, y, upper, seed) if name == "forward_kl" else hidden(y, x, upper, seed)


def _clustered(z: Tensor, n: int, ratio: Tensor, generator: torch.Generator) -> float | None:
    """Standardised Σ rᵢ rⱼ over neighbours, r = label − σ(ℓ), or None: where ℓ is right they're independent, and its mean is 0.

    Source: Moran (1950), with the variance that the probabilities give.
    """
    share = torch.logit(torch.tensor(n / len(z), dtype=z.dtype, device="cpu"))
    some = torch.randperm(len(z), generator=generator, device="cpu")[:_NEAR_ROWS]
    rows, s = z[some].cpu().numpy(), torch.sigmoid(ratio[some] + share).cpu()
    index = Neighbors(rows)
    r, spread = (some < n).to(z.dtype) - s, (s * (1 - s)).clamp(min=1e-300)
    here, seen = abs(_score(JensenShannon(), n, ratio, [])[0]), []
    for k in (min(most, len(rows) // 10) for most in _NEAR):
        near = torch.from_numpy(index.nearest(rows, k + 1))
        link = (near != torch.arange(len(rows), device="cpu")[:, None]).to(z.dtype)
        around = (link * r[near]).sum(1) / k
        total = float((r * around).sum())
        # a pair counts twice where each is the other's neighbour, which is so for most: 2 bounds the variance
        deviation = math.sqrt(2 * float((spread * (link * spread[near]).sum(1)).sum())) / k
        # noise in what's around makes the gain come out several times too small
        gain = total**2 / (2 * len(rows) * float((spread * around.square()).sum()))
        if total > 3.2 * deviation and gain > _SMALL / 8 * here:
            seen.append(total / deviation)
    return max(seen, default=None)


def _finer(z: Tensor, n: int, ratio: Tensor, other: Tensor) -> float | None:
    """Standardised gain in held-out log loss of another ℓ, or None where it's no clear and no small part of what there is."""
    label = (torch.arange(len(z), device=z.device) < n).to(z.dtype)
    share = math.log(n / (len(z) - n))
    gain = torch.stack([_log_loss(one + share, label, reduction="none") for one in (ratio, other)])
    value, error = mean(gain[0] - gain[1])
    here = abs(_score(JensenShannon(), n, ratio, [])[0])
    return value / error if value > 2.5 * error and value > _SMALL / 2 * here else None


def _khat(terms: Tensor) -> float:
    sides = (terms - terms.amin(), terms.amax() - terms)
    return max(pareto_smooth(one.clamp(min=1e-300).log())[1] for one in sides) if bool(sides[0].any()) else -math.inf


def _upper_khat(log_terms: Tensor) -> float:
    return pareto_smooth(log_terms)[1] if float(log_terms.max() - log_terms.min()) > 1e-9 else -math.inf


def mean(terms: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(terms))
