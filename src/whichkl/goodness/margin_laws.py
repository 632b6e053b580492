"""Margin laws: the exact distribution function of each column of a model, where it is known in closed form."""

from __future__ import annotations

import scipy
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    StudentT,
    TransformedDistribution,
)

from whichkl.families import student_t
from whichkl.families.columns import IndependentColumns
from whichkl.targets.supports import Columns


def margins(law: Distribution, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"] | None:
    """Return F(x) of each column's margin, exact, or None where no closed form is known or a column has atoms.

    Known are Gaussians, Student-t laws, independent columns with a `cdf`, mixtures of these, and their images under transforms of
    single columns (for a decreasing transform 1 − F, which is uniform too).

    Rows are broadcast against the law's batch; they are (..., 1) for a law of one number.

    >>> law = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> margins(law, torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """
    try:
        if len(law.event_shape) == 0:
            inner = _single(law, x[..., 0])
            return None if inner is None else inner[..., None]
        return _columns(law, x) if len(law.event_shape) == 1 else None
    except (NotImplementedError, AttributeError):  # torch's laws without a `cdf` or an inverse
        return None


def _columns(law: Distribution, x: Tensor) -> Tensor | None:
    if isinstance(law, (MultivariateNormal, LowRankMultivariateNormal)):
        below: Tensor = torch.special.ndtr((x - law.loc) / law.variance.sqrt())
        return below
    if isinstance(law, student_t.MultivariateStudentT):
        return _student(law.df[..., None], (x - law.loc) / law.scale_tril.square().sum(-1).sqrt())
    if isinstance(law, IndependentColumns):
        each = [_single(one, x[..., j]) for j, one in enumerate(law.laws)]
        known = [one for one in each if one is not None]
        return torch.stack(known, -1) if len(known) == len(each) else None
    if isinstance(law, Independent) and law.reinterpreted_batch_ndims == 1 and len(law.base_dist.event_shape) == 0:
        return _single(law.base_dist, x)
    if isinstance(law, MixtureSameFamily):
        parts = _columns(law.component_distribution, x[..., None, :])
        return None if parts is None else (parts * law.mixture_distribution.probs[..., None]).sum(-2)
    if isinstance(law, TransformedDistribution):
        for transform in reversed(law.transforms):
            if not transform.bijective or not _each_alone(transform):
                return None
            x = transform.inv(x)
        base = law.base_dist
        return _columns(base, x) if len(base.event_shape) == 1 else _single(base, x)
    return None


def _single(law: Distribution, x: Tensor) -> Tensor | None:
    """F(x) of a law of one number; None for laws with atoms."""
    if law.support is None or law.support.is_discrete:
        return None
    if isinstance(law, StudentT):
        return _student(law.df, (x - law.loc) / law.scale)
    if isinstance(law, MixtureSameFamily):
        parts = _single(law.component_distribution, x[..., None])
        return None if parts is None else (parts * law.mixture_distribution.probs).sum(-1)
    value: Tensor = law.cdf(x)
    return value


def _student(df: Tensor, t: Tensor) -> Tensor:
    return torch.from_numpy(scipy.special.stdtr(df.detach().double().cpu().numpy(), t.detach().double().cpu().numpy()))


def _each_alone(transform: torch.distributions.Transform) -> bool:
    """Whether a transform acts on every column separately."""
    if isinstance(transform, torch.distributions.IndependentTransform):
        return bool(transform.base_transform.domain.event_dim == 0)
    return bool(transform.domain.event_dim == 0) or isinstance(transform, Columns)
