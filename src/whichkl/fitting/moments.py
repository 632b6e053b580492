"""Moments: mean, standard deviation and 95 % interval of each coordinate of a law, by closed forms where they are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from whichkl.diagnostics.result import draws_in
from whichkl.divergences.estimate import NORMAL
from whichkl.families.columns import IndependentColumns
from whichkl.families.mixture import mixture_parts
from whichkl.families.network_family import NetworkModel
from whichkl.families.student_t import MultivariateStudentT
from whichkl.goodness.draws import drawn
from whichkl.goodness.margin_laws import margins
from whichkl.targets.supports import Supported

_LEVELS = (0.025, 0.975)
_DRAWS_FOR_ENDS = 1_000
"""Number of draws between whose extremes both quantiles lie, except with a chance of 10⁻¹¹ per coordinate."""
_HALVINGS = 80
"""Halvings of the range of these draws; 64 reach the precision of float64."""
_GRID_POINTS = 2_001
_MAX_DEVIATION = 9.0
"""Standard deviations to either side of the grid; beyond, a normal has 2·10⁻¹⁹ of its mass."""


@dataclass(frozen=True)
class Moments:
    """Per coordinate: mean, standard deviation, ends of the equal-tailed 95 % interval, Monte Carlo error of the mean."""

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mcse: tuple[float, ...]
    """Zeros where the mean has a closed form."""

    @classmethod
    def of(cls, *columns: Tensor) -> Moments:
        """Make the moments of five tensors (d,)."""
        return cls(*(tuple(one.detach().to("cpu", torch.float64).flatten().tolist()) for one in columns))


def moments_of(law: Distribution, dim: int, seed: int) -> Moments:
    """Return the moments of a law of d coordinates; what has no closed form is that of up to 10,000 draws with a fixed seed.

    Raises:
        Unable: the law can't be sampled, or its draws aren't finite.
    """
    law = law.law if isinstance(law, NetworkModel) else law
    with torch.no_grad():
        exact, ends = _mean_and_sd(law), _interval(law, dim, seed)
        if exact is None or bool(ends.isnan().any()):
            x = drawn(law, (draws_in(dim),), dim, seed)
            levels = torch.tensor(_LEVELS, dtype=x.dtype, device="cpu")
            ends = torch.where(ends.isnan(), x.quantile(levels, 0, interpolation="nearest"), ends)
            if exact is None:
                mean, sd = _with_infinite_means(law, x.mean(0), x.std(0))
                exact = mean, sd, torch.where(mean.isfinite(), sd / math.sqrt(len(x)), 0.0)
    return Moments.of(exact[0], exact[1], *ends, exact[2])


def weighted_moments(x: Float[Tensor, "n d"], log_weights: Float[Tensor, " n"]) -> Moments:
    """Return the moments of weighted points; the error is √Σ W² (x − mean)², with weights W that sum to 1."""
    x, w = x.detach().to("cpu", torch.float64), log_weights.exp()
    mean = w @ x
    squares = (x - mean).square()
    order = x.T.argsort(1)
    below = w[order].cumsum(1)
    levels = torch.tensor(_LEVELS, dtype=x.dtype, device="cpu").expand(x.shape[1], 2) * below[:, -1:]
    at = torch.searchsorted(below, levels.contiguous()).clamp(max=len(x) - 1)
    low, high = x.T.gather(1, order.gather(1, at)).T
    return Moments.of(mean, (w @ squares).sqrt(), low, high, (w.square() @ squares).sqrt())


def _mean_and_sd(law: Distribution) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the mean, the standard deviation and zeros; None where there is no closed form."""
    if isinstance(law, Supported):
        found = _carried(law)
    elif isinstance(law, IndependentColumns):
        each = [one for one in map(_known, law.laws) if one is not None]
        found = None
        if len(each) == len(law.laws):
            found = torch.stack([mean.double() for mean, _ in each]), torch.stack([variance.double() for _, variance in each])
    else:
        found = _known(law)
    if found is None:
        return None
    mean, variance = (one.to("cpu", torch.float64) for one in found)
    return mean, variance.sqrt(), torch.zeros_like(mean)


def _known(law: Any) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the variance that a law has as properties; categories count as the numbers 0 … K−1."""
    inner = law.base_dist if isinstance(law, Independent) else law
    if isinstance(inner, Categorical):
        codes = torch.arange(inner.probs.shape[-1], dtype=inner.probs.dtype, device=inner.probs.device)
        mean = inner.probs @ codes
        return mean, inner.probs @ codes.square() - mean.square()
    try:
        return law.mean, law.variance
    except (NotImplementedError, AttributeError):
        return None


def _carried(law: Supported) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of a Gaussian, or a mixture of Gaussians, that is carried column by column into a support.

    Behind an exponential they are those of a log-normal, and behind a sigmoid sums on a grid.
    """
    bijection, parts = law.bijection, _gaussian_parts(law.base_dist)
    if parts is None or bijection.constraints[0].event_dim > 0:
        return None
    w, loc, sd = parts
    first, second = torch.zeros_like(loc[0]), torch.zeros_like(loc[0])
    z = torch.linspace(-_MAX_DEVIATION, _MAX_DEVIATION, _GRID_POINTS, dtype=torch.float64, device="cpu")
    mass = (-z.square() / 2).softmax(0)
    low, high = torch.tensor(bijection.bounds, dtype=torch.float64, device="cpu").T
    has_low, has_high = low.isfinite(), high.isfinite()
    one_sided, free = has_low ^ has_high, ~(has_low | has_high)
    end, sign = torch.where(has_low, low, high), 2 * has_low.to(torch.float64) - 1
    for share, m, s in zip(w, loc, sd, strict=True):
        x = bijection.forward(m + z[:, None] * s).to(torch.float64)
        size = (m + s.square() / 2).exp()
        mean = torch.where(free, m, torch.where(one_sided, end + sign * size, mass @ x))
        spread = torch.where(one_sided, size.square() * torch.expm1(s.square()), mass @ (x - mean).square())
        first = first + share * mean
        second = second + share * (torch.where(free, s.square(), spread) + mean.square())
    # of one component, without the rounding of a difference of squares
    return (mean, torch.where(free, s.square(), spread)) if len(w) == 1 else (first, (second - first.square()).clamp(min=0))


def _gaussian_parts(law: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return shares (K,), means (K, d) and standard deviations (K, d) of the Gaussians that a law consists of."""
    if _is_gaussian(law):
        w, loc, sd = torch.ones_like(law.mean[:1]), law.mean[None], law.variance[None].sqrt()
    elif isinstance(law, MixtureSameFamily) and not isinstance(law.component_distribution, MultivariateStudentT):
        w, loc, tril, _ = mixture_parts(law)
        sd = tril.square().sum(-1).sqrt()
    else:
        return None
    return w.to("cpu", torch.float64), loc.to("cpu", torch.float64), sd.to("cpu", torch.float64)


def _is_gaussian(law: Any) -> bool:
    return isinstance(law, (MultivariateNormal, LowRankMultivariateNormal)) or (
        isinstance(law, Independent) and isinstance(law.base_dist, Normal)
    )


def _with_infinite_means(law: Any, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Set what is infinite: exp of a Student-t law has no finite mean, whatever its degrees of freedom are."""
    base = law.base_dist if isinstance(law, Supported) else None
    base = base.component_distribution if isinstance(base, MixtureSameFamily) else base
    if not isinstance(base, MultivariateStudentT) or law.bijection.constraints[0].event_dim > 0:
        return mean, sd
    df = float(base.df.min())
    for i, (low, high) in enumerate(law.bijection.bounds):
        if math.isfinite(low) != math.isfinite(high):
            mean[i], sd[i] = (math.inf if math.isfinite(low) else -math.inf), math.inf
        elif not math.isfinite(low):
            mean[i], sd[i] = mean[i] if df > 1 else math.nan, sd[i] if df > 2 else math.inf
    return mean, sd


def _interval(law: Distribution, dim: int, seed: int) -> Float[Tensor, "2 d"]:
    """Return the 2.5 % and the 97.5 % quantiles; NaN where a distribution function isn't known."""
    if _is_gaussian(law):
        mean, variance = (one.to("cpu", torch.float64) for one in (law.mean, law.variance))
        return torch.stack([mean - NORMAL * variance.sqrt(), mean + NORMAL * variance.sqrt()])
    x = drawn(law, (_DRAWS_FOR_ENDS,), dim, seed)
    found, known, part = torch.full((2, dim), math.nan, dtype=torch.float64, device="cpu"), list(range(dim)), law
    if isinstance(law, IndependentColumns):
        each = [IndependentColumns([one], [margin]) for one, margin in zip(law.laws, law.margins, strict=True)]
        known = [j for j, one in enumerate(each) if margins(one, x[:1, j : j + 1]) is not None]
        part = IndependentColumns([law.laws[j] for j in known], [law.margins[j] for j in known])
    try:
        ends = _by_bisection(lambda at: margins(part, at), *x[:, known].aminmax(dim=0)) if known else None
    except (RuntimeError, ValueError):  # a point between two draws can leave the support by rounding
        ends = None
    if ends is not None:
        found[:, known] = ends.double()
    return found


def _by_bisection(function: Callable[[Tensor], Tensor | None], low: Tensor, high: Tensor) -> Tensor | None:
    """Return where a function of each coordinate, from `low` to `high`, takes both levels; None where it isn't known."""
    levels = torch.tensor(_LEVELS, dtype=torch.float64, device="cpu")[:, None]
    low, high = low.expand(2, -1), high.expand(2, -1)
    first, last = function(low), function(high)
    if first is None or last is None or not bool(first.isfinite().all() & last.isfinite().all()):
        return None
    falls = last < first  # where a column is transformed by a decreasing function
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = function(middle)
        if below is None:
            return None
        is_left = torch.where(falls, 1 - below, below) < levels
        low, high = torch.where(is_left, middle, low), torch.where(is_left, high, middle)
    return (low + high) / 2
