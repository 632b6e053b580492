"""Free laws: torch's laws in the free coordinates u of their support, without the rounding that x = T(u) has near its ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    ContinuousBernoulli,
    Dirichlet,
    Distribution,
    Exponential,
    FisherSnedecor,
    Gamma,
    GeneralizedPareto,
    HalfCauchy,
    HalfNormal,
    Independent,
    Kumaraswamy,
    MixtureSameFamily,
    Pareto,
    RelaxedOneHotCategorical,
    TransformedDistribution,
    Uniform,
    VonMises,
    constraints,
    transforms,
)
from torch.nn.functional import logsigmoid, softplus

from whichkl.arrays import tensor_of
from whichkl.distributions import log_von_mises
from whichkl.targets.supports import Supported

_MIN_STIRLING = 16.0
"""Argument from which four terms of Stirling's series have all digits of float64."""


class FreeLaw(NamedTuple):
    """A law of u: its log density, which broadcasts over batches, and a sampler of a sample shape."""

    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[torch.Size], Tensor]

    def moved(self, into: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], log_slope: Tensor | float) -> FreeLaw:
        """Return the law of v = into(u), where u = back(v) and log|du/dv| is constant."""
        return FreeLaw(lambda v: self.log_prob(back(v)) + log_slope, lambda shape: into(self.sample(shape)))


def free_law(p: Distribution) -> FreeLaw | None:
    """Return a law on an interval, a half-line or a simplex in the free coordinates of `Bijection`; None where it isn't known.

    On (a, b) u = log(x − a) − log(b − x), on (a, ∞) u = log(x − a), on (−∞, b) u = log(b − x); on a simplex the coordinates of
    `StickBreakingTransform`. Near 1 float64 has no x between 1 − 10⁻¹⁶ and 1, where Beta(½, ½) has 10⁻⁸ of its mass and
    Beta(0.1, 0.1) one percent; u has no such gap.

    >>> law = free_law(Beta(torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)))
    >>> law.log_prob(torch.tensor([0.0, 1000.0], dtype=torch.float64))
    tensor([  -1.8379, -501.1447], dtype=torch.float64)
    """
    if isinstance(p, Independent):
        inner, axes = free_law(p.base_dist), p.reinterpreted_batch_ndims
        if inner is None or p.base_dist.event_shape != () or axes != 1:
            return None
        return FreeLaw(lambda u: inner.log_prob(u).sum(-1), inner.sample)
    if isinstance(p, Supported):
        return FreeLaw(p.base_dist.log_prob, p.base_dist.sample)
    if isinstance(p, MixtureSameFamily):
        return _mixture(p)
    known = next((make for kind, make in _LAWS.items() if isinstance(p, kind)), None)
    if known is not None:
        return known(p)
    return _transformed(p) if isinstance(p, TransformedDistribution) else None


def _bounded(p: Distribution) -> FreeLaw:
    """Return a law whose density is finite at both ends, where rounding of x does no harm."""
    low, high = (-math.pi, math.pi) if isinstance(p, VonMises) else (0.0, 1.0)

    def log_prob(u: Tensor) -> Any:
        x = low + (high - low) * torch.sigmoid(u)
        log_p = log_von_mises(p, x) if isinstance(p, VonMises) else p.log_prob(x)
        return log_p + math.log(high - low) + logsigmoid(u) + logsigmoid(-u)

    return FreeLaw(log_prob, lambda shape: torch.logit((p.sample(shape) - low) / (high - low), eps=1e-16))


def _excess(a: Tensor) -> Tensor:
    """Log Γ(a) − a log a + a, by Stirling's series where the three cancel."""
    large = a.clamp(min=_MIN_STIRLING)
    tail = 1 / (12 * large) - 1 / (360 * large**3) + 1 / (1260 * large**5) - 1 / (1680 * large**7)
    return torch.where(a > _MIN_STIRLING, (2 * math.pi / large).log() / 2 + tail, torch.lgamma(a) - torch.xlogy(a, a) + a)


def _log_gamma_draws(a: Tensor, shape: torch.Size) -> Tensor:
    """Logs of draws of Gamma(a, 1), which underflow for small a: X_a = X_{a+1} U^(1/a). Source: Marsaglia & Tsang (2000)."""
    whole = torch._standard_gamma((a + 1).expand(shape + a.shape)).log()
    return whole - torch.empty_like(whole).exponential_() / a


def _gamma(p: Any) -> FreeLaw:
    a, rate = torch.broadcast_tensors(p.concentration, p.rate)
    middle, constant = (a / rate).log(), -_excess(a)

    def log_prob(u: Tensor) -> Any:
        t = u - middle  # around the mode: terms of the size of a log a would cancel
        return constant - a * (torch.expm1(t) - t)

    return FreeLaw(log_prob, lambda shape: _log_gamma_draws(a, shape) - rate.log())


def _beta(p: Any) -> FreeLaw:
    a, b = torch.broadcast_tensors(p.concentration1, p.concentration0)
    middle, constant = a.log() - b.log(), _excess(a + b) - _excess(a) - _excess(b)

    def log_prob(u: Tensor) -> Any:
        t = u - middle
        # Each form on the side where its exponential doesn't overflow.
        left = a * t - (a + b) * torch.log1p(a / (a + b) * torch.expm1(t.clamp(max=0)))
        right = -b * t - (a + b) * torch.log1p(b / (a + b) * torch.expm1(-t.clamp(min=0)))
        return constant + torch.where(t < 0, left, right)

    return FreeLaw(log_prob, lambda shape: _log_gamma_draws(a, shape) - _log_gamma_draws(b, shape))


def _fisher(p: FisherSnedecor) -> FreeLaw:
    """F(d₁, d₂): d₁ x / d₂ is the odds of a draw of Beta(d₁/2, d₂/2)."""
    shift = (p.df1 / p.df2).log()
    return _beta(Beta(p.df1 / 2, p.df2 / 2)).moved(lambda u: u - shift, lambda v: v + shift, 0.0)


def _exponential(p: Exponential) -> FreeLaw:
    return _gamma(Gamma(torch.ones_like(p.rate), p.rate))


def _half_normal(p: HalfNormal) -> FreeLaw:
    """(x / scale)² is a draw of χ² with one degree of freedom."""
    return _rooted(_gamma(Gamma(torch.full_like(p.scale, 0.5), 0.5)), p.scale)


def _half_cauchy(p: HalfCauchy) -> FreeLaw:
    """(x / scale)² is the odds of a draw of Beta(½, ½)."""
    half = torch.full_like(p.scale, 0.5)
    return _rooted(_beta(Beta(half, half)), p.scale)


def _rooted(law: FreeLaw, scale: Tensor) -> FreeLaw:
    """The law of scale √x."""
    return law.moved(lambda u: u / 2 + scale.log(), lambda v: 2 * (v - scale.log()), math.log(2))


def _generalized_pareto(p: GeneralizedPareto) -> FreeLaw | None:
    """Its part of shape c > 0 is Pareto's, less its scale; c = 0 is exponential, and c < 0 a Beta law up to the upper end."""
    c, scale = p.concentration.to(torch.float64), p.scale.to(torch.float64)  # it's the one law that isn't widened
    if bool((c > 0).all()):
        shift = (scale / c).log()
        return _pareto(Pareto(torch.ones_like(c), 1 / c)).moved(lambda u: u + shift, lambda v: v - shift, 0.0)
    if bool((c < 0).all()):
        return _beta(Beta(torch.ones_like(c), -1 / c))
    return _gamma(Gamma(torch.ones_like(c), 1 / scale)) if bool((c == 0).all()) else None


def _kumaraswamy(p: Kumaraswamy) -> FreeLaw:
    a, b = torch.broadcast_tensors(p.concentration1, p.concentration0)

    def log_prob(u: Tensor) -> Any:
        power = a * logsigmoid(u)  # log xᵃ
        # 1 − xᵃ is a (1 − x) where xᵃ rounds to 1.
        left = torch.where(power > -1e-17, a.log() - u, _log1mexp(power.clamp(max=-1e-17)))
        return (a * b).log() + power + (b - 1) * left + logsigmoid(-u)

    def sample(shape: torch.Size) -> Any:
        log_x = _log1mexp(-torch.empty(shape + a.shape, dtype=a.dtype, device=a.device).exponential_() / b) / a
        return log_x - _log1mexp(log_x)

    return FreeLaw(log_prob, sample)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x ≤ 0. Source: Mächler (2012)."""
    near = x > -math.log(2)
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, x).exp()))


def _pareto(p: Pareto) -> FreeLaw:
    alpha, log_scale = torch.broadcast_tensors(p.alpha, p.scale.log())

    def log_prob(u: Tensor) -> Any:
        w = u - log_scale
        return alpha.log() + w - (alpha + 1) * softplus(w, threshold=40)

    def sample(shape: torch.Size) -> Any:
        gain = torch.empty(shape + alpha.shape, dtype=alpha.dtype, device=alpha.device).exponential_() / alpha  # log(x / scale)
        return log_scale + gain + _log1mexp(-gain)

    return FreeLaw(log_prob, sample)


def _uniform(p: Uniform) -> FreeLaw:
    def sample(shape: torch.Size) -> Any:
        one = torch.empty((2, *shape, *p.batch_shape), dtype=p.low.dtype, device=p.low.device).exponential_().log()
        return one[0] - one[1]

    return FreeLaw(lambda u: (logsigmoid(u) + logsigmoid(-u)).expand(np.broadcast_shapes(u.shape, p.batch_shape)), sample)


def _mixture(p: MixtureSameFamily) -> FreeLaw | None:
    parts, logits = p.component_distribution, p.mixture_distribution.logits.log_softmax(-1)
    inner = parts.base_dist if isinstance(parts, Independent) else parts
    bounds = [getattr(inner.support, name, 0.0) for name in ("lower_bound", "upper_bound")]
    each = free_law(parts) if not any(isinstance(one, Tensor) for one in bounds) else None  # all on one support
    if each is None or p.batch_shape != ():
        return None
    axis = -1 - len(p.event_shape)

    def sample(shape: torch.Size) -> Any:
        draws = each.sample(shape)
        which = p.mixture_distribution.sample(shape).reshape(*shape, 1, *(1 for _ in p.event_shape))
        return draws.take_along_dim(which, axis).squeeze(axis)

    return FreeLaw(lambda u: torch.logsumexp(logits + each.log_prob(u.unsqueeze(axis)), -1), sample)


def _transformed(p: TransformedDistribution) -> FreeLaw | None:
    """Carry the base through the transforms; every step is a shift or a scale of free coordinates."""
    if isinstance(p, RelaxedOneHotCategorical):
        return _relaxed(p)
    base: Any = p.base_dist
    steps = transforms.ComposeTransform(p.transforms)
    while type(base) is TransformedDistribution:
        base, steps = base.base_dist, transforms.ComposeTransform([*base.transforms, *steps.parts])
    if isinstance(p.transforms[-1], transforms.StickBreakingTransform):
        return FreeLaw(base.log_prob, base.sample) if len(steps.parts) == 1 else None
    if p.event_shape != () or base.event_shape != ():
        return None
    support = base.component_distribution.support if isinstance(base, MixtureSameFamily) else base.support
    is_real = isinstance(support, type(constraints.real))
    law: FreeLaw | None = FreeLaw(base.log_prob, base.sample) if is_real else free_law(base)
    is_interval, from_zero = hasattr(support, "upper_bound"), getattr(support, "lower_bound", None) == 0
    for step in _flat(steps):
        law = None if law is None else _stepped(law, step, is_real, is_interval, from_zero)
        if isinstance(step, transforms.AffineTransform):
            from_zero = from_zero and bool((tensor_of(step.loc) == 0).all() and (tensor_of(step.scale) > 0).all())
        else:
            is_interval = is_interval or isinstance(step, (transforms.SigmoidTransform, transforms.TanhTransform))
            is_real, from_zero = False, True
    return None if is_real else law


def _flat(step: transforms.Transform) -> list[transforms.Transform]:
    return [one for part in step.parts for one in _flat(part)] if isinstance(step, transforms.ComposeTransform) else [step]


def _stepped(law: FreeLaw, step: Any, is_real: bool, is_interval: bool, from_zero: bool) -> FreeLaw | None:
    """Return the law after a transform of x, None where that isn't linear in free coordinates."""
    if isinstance(step, transforms.AffineTransform):
        loc, scale = tensor_of(step.loc), tensor_of(step.scale)
        size = scale.abs().log()
        if is_real:
            return law.moved(lambda u: loc + scale * u, lambda v: (v - loc) / scale, -size)
        if is_interval:
            return law.moved(lambda u: scale.sign() * u, lambda v: scale.sign() * v, 0.0)
        return law.moved(lambda u: u + size, lambda v: v - size, 0.0)
    if is_real and isinstance(step, (transforms.ExpTransform, transforms.SigmoidTransform)):
        return law  # the free coordinate of eˣ and of 1/(1 + e⁻ˣ) is x
    if is_real and isinstance(step, transforms.TanhTransform):
        return law.moved(lambda u: 2 * u, lambda v: v / 2, -math.log(2))
    if from_zero and not is_interval and not is_real and isinstance(step, transforms.PowerTransform):
        power = tensor_of(step.exponent)
        return law.moved(lambda u: power * u, lambda v: v / power, -power.abs().log())
    return None


def _logs(u: Tensor) -> tuple[Tensor, Tensor]:
    """Logs of the K coordinates on the simplex at u, (…, K), and log|∂x/∂u|, (…)."""
    offset = torch.arange(u.shape[-1], 0, -1, dtype=u.dtype, device=u.device).log()
    taken, left = logsigmoid(u - offset), logsigmoid(offset - u)
    before = torch.cat([torch.zeros_like(left[..., :1]), left.cumsum(-1)], -1)
    return torch.cat([taken + before[..., :-1], before[..., -1:]], -1), (taken + left + before[..., :-1]).sum(-1)


def _from_logs(log_x: Tensor) -> Tensor:
    """U at points of the simplex that are given by the logs of their coordinates, up to a constant."""
    rest = log_x.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    offset = torch.arange(rest.shape[-1], 0, -1, dtype=rest.dtype, device=rest.device).log()
    return log_x[..., :-1] - rest + offset


def _dirichlet(p: Dirichlet) -> FreeLaw:
    a = p.concentration
    total = a.sum(-1, keepdim=True)
    constant = _excess(total[..., 0]) - _excess(a).sum(-1)

    def log_prob(u: Tensor) -> Any:
        log_x, log_volume = _logs(u)
        # log (x/m) around the mean m: terms of the size of a log a would cancel.
        return constant + (a * (log_x - (a / total).log())).sum(-1) - log_x.sum(-1) + log_volume

    return FreeLaw(log_prob, lambda shape: _from_logs(_log_gamma_draws(a, shape)))


def _relaxed(p: RelaxedOneHotCategorical) -> FreeLaw:
    def log_prob(u: Tensor) -> Any:
        log_x, log_volume = _logs(u)
        return p.base_dist.log_prob(log_x) - log_x.sum(-1) + log_volume

    return FreeLaw(log_prob, lambda shape: _from_logs(p.base_dist.sample(shape)))


_LAWS: dict[type[Distribution], Callable[[Any], FreeLaw | None]] = {
    Beta: _beta,
    Exponential: _exponential,
    Gamma: _gamma,
    GeneralizedPareto: _generalized_pareto,
    HalfCauchy: _half_cauchy,
    HalfNormal: _half_normal,
    FisherSnedecor: _fisher,
    Kumaraswamy: _kumaraswamy,
    Pareto: _pareto,
    Uniform: _uniform,
    ContinuousBernoulli: _bounded,
    VonMises: _bounded,
    Dirichlet: _dirichlet,
}
