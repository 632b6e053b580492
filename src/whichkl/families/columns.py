"""Columns: laws of whole numbers with log probability −∞ wherever they have no mass, and the law of independent columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Poisson, biject_to, constraints, transforms
from torch.distributions.constraints import Constraint


class Codes(Categorical):
    """Categories 0 … K−1; torch's own raises for other values, and gives a category of probability 0 the log of 2e-16.

    >>> law = Codes(logits=torch.tensor([0.25, 0.75, 0.0]).log(), validate_args=False)
    >>> law.log_prob(torch.tensor([2.0, 3.0, 0.5])).tolist()
    [-inf, -inf, -inf]
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of each value."""
        value = _numbers(value)
        inside = (value >= 0) & (value < self._num_events) & (value == value.round())
        return torch.where(inside, super().log_prob(torch.where(inside, value, 0)), -math.inf)


class Coin(Bernoulli):
    """0 or 1; exact where the probability is 0 or 1, which torch's own clamps.

    >>> Coin(probs=torch.tensor(0.0), validate_args=False).log_prob(torch.tensor([0.0, 1.0])).tolist()
    [0.0, -inf]
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of each value."""
        if "logits" in self.__dict__:
            zero, one = -torch.nn.functional.softplus(self.logits), -torch.nn.functional.softplus(-self.logits)
        else:
            zero, one = torch.log1p(0 - self.probs), self.probs.log()
        return torch.where(value == 0, zero, torch.where(value == 1, one, -math.inf))


class Counts(Poisson):
    """Whole numbers from 0; torch's own gives a number for fractions too.

    >>> Counts(torch.tensor(2.0), validate_args=False).log_prob(torch.tensor([0.0, 0.5, -1.0])).tolist()
    [-2.0, -inf, -inf]
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of each value."""
        value = _numbers(value)
        inside = (value >= 0) & (value == value.round())
        return torch.where(inside, super().log_prob(torch.where(inside, value, 0)), -math.inf)


def _numbers(value: Tensor) -> Tensor:
    """Return True and False as 1 and 0."""
    return value.long() if value.dtype == torch.bool else value


def codes(probs: Tensor) -> Codes:
    """Build the law of categories with these probabilities; some may be 0."""
    return Codes(logits=probs.log(), validate_args=False)


class ColumnsSupport(Constraint):
    """Rows whose columns all lie in the supports of their laws; one truth value per row, unlike `constraints.stack`."""

    event_dim = 1

    def __init__(self, columns: Sequence[Constraint]) -> None:
        self.columns = tuple(columns)
        self.is_discrete = any(one.is_discrete for one in self.columns)

    def check(self, value: Tensor) -> Tensor:
        """Return which rows lie inside."""
        return torch.stack([one.check(value[..., i]) for i, one in enumerate(self.columns)], -1).all(-1)


def _bijection(support: ColumnsSupport) -> transforms.Transform:
    """Carry each column of ℝᵈ into its own support."""
    each = [transforms.IndependentTransform(biject_to(one), 1) for one in support.columns]
    return transforms.CatTransform(each, dim=-1, lengths=[1] * len(each))


biject_to.register(ColumnsSupport, _bijection)


class IndependentColumns(Distribution):
    """log q(x) = Σᵢ log qᵢ(xᵢ), −∞ outside the support; batch shape (), event shape (d,).

    Args:
        laws: d distributions of one number.
        margins: the names of their families.

    >>> from torch.distributions import Exponential, Normal
    >>> model = IndependentColumns([Normal(0.0, 1.0), Exponential(torch.tensor(2.0))], ["normal", "exponential"])
    >>> model.log_prob(torch.tensor([[0.0, 0.0], [0.0, -1.0]])).tolist()
    [-0.2257..., -inf]
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, laws: Sequence[Distribution], margins: Sequence[str]) -> None:
        self.laws, self.margins = tuple(laws), tuple(margins)
        super().__init__(torch.Size(), torch.Size((len(self.laws),)), validate_args=False)

    def __repr__(self) -> str:
        return f"IndependentColumns({', '.join(self.margins)})"

    @constraints.dependent_property(event_dim=1)
    def support(self) -> Constraint:
        """The product of the columns' supports."""
        supports = [law.support for law in self.laws]
        return ColumnsSupport([constraints.real if one is None else one for one in supports])

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether every law has `rsample`."""
        return all(law.has_rsample for law in self.laws)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The columns' means; NaN where a column holds categories."""
        return self._stack(lambda law: law.mean)

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """The columns' variances; NaN where a column holds categories."""
        return self._stack(lambda law: law.variance)

    def log_prob(self, value: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
        """Return the sum of the columns' log densities (or probabilities).

        Raises:
            ValueError: the last axis isn't d long.
        """
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"the last axis has length {value.shape[-1] if value.ndim else 0}, not {len(self.laws)}")
        terms = []
        for i, law in enumerate(self.laws):
            x, support = value[..., i], law.support
            inside = x.isfinite() if support is None else support.check(x) & x.isfinite()
            if bool(inside.all()):
                terms.append(law.log_prob(x))
            else:
                some = torch.full_like(x, -math.inf)
                terms.append(some.masked_scatter(inside, law.log_prob(x[inside]).to(x.dtype)))
        total: Tensor = torch.stack(terms).sum(0)
        return total

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "... d"]:
        """Draw every column independently."""
        return self._stack(lambda law: law.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "... d"]:
        """Draw every column independently, differentiably in the parameters."""
        return self._stack(lambda law: law.rsample(torch.Size(sample_shape)))

    def _stack(self, of: Callable[[Distribution], Tensor]) -> Tensor:
        values = [of(law) for law in self.laws]
        kind = next((value.dtype for value in values if value.is_floating_point()), torch.float64)
        return torch.stack([value.to(kind) for value in values], -1)
