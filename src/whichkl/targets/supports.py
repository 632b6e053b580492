"""Supports: where a target has mass, the smooth bijection from ℝᵏ onto that set, and the states of a discrete target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints, transforms
from torch.distributions.constraints import Constraint
from torch.distributions.transformed_distribution import TransformedDistribution

from whichkl._checks import InputError, cannot
from whichkl.printable import shorten
from whichkl.targets.column_constraints import REALS, Support, describe_constraint, levels_of, read_support

MAX_STATES = 1 << 16
"""Largest number of states that are listed: all rows of 16 columns of 0 and 1."""


class Bijection:
    """The map from ℝᵏ onto a support in ℝᵈ (`torch.distributions.biject_to`), with its log Jacobian.

    Args:
        support: a torch constraint on every coordinate or on the whole vector, one constraint per column, a
            text as from `describe`, or None for all of ℝᵈ.
        dim: d, the number of coordinates in the support.

    >>> Bijection("positive", dim=2).forward(torch.zeros(1, 2))
    tensor([[1., 1.]])
    """

    def __init__(self, support: Support, dim: int) -> None:
        self.dim = dim
        self.constraints = read_support(support, dim)
        self.levels = levels_of(self.constraints, dim)
        self.is_real = all(isinstance(part, REALS) for part in self.constraints)
        if self.is_discrete:
            self.free_dim = dim
            return
        each = [biject_to(part) for part in self.constraints]
        self.transform: transforms.Transform = Columns(each) if len(each) > 1 else each[0]
        if len(each) == 1 and self.constraints[0].event_dim == 0:
            self.transform = transforms.IndependentTransform(each[0], 1)
        self.free_dim = int(self.transform.inverse_shape(torch.Size([dim]))[-1])

    @property
    def is_discrete(self) -> bool:
        """Whether the support is a finite set of rows of whole numbers, which has no free coordinates."""
        return self.levels is not None

    def inside(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "3 d"]:
        """Return points in the support, the first of them in its middle, or at the lower ends of a discrete one."""
        if self.levels is not None:
            low, high = (list(ends) for ends in zip(*self.levels, strict=True))
            return torch.tensor([low, high, [(a + b) // 2 for a, b in self.levels]], dtype=dtype, device=device)
        aside = torch.linspace(0.3, 0.7, self.free_dim, dtype=dtype, device=device)
        return self.forward(torch.stack([torch.zeros_like(aside), aside, -aside]))

    def forward(self, u: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        """Map free coordinates to points in the support."""
        x: Tensor = u if self.is_real or self.is_discrete else self.transform(u)
        return x

    def inverse(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Map points in the support to free coordinates."""
        u: Tensor = x if self.is_real or self.is_discrete else self.transform.inv(x)
        return u

    def log_jacobian(self, u: Float[Tensor, "n k"], x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log|∂x/∂u| per row."""
        return torch.zeros_like(u[:, 0]) if self.is_real or self.is_discrete else self.transform.log_abs_det_jacobian(u, x)

    def contains(self, x: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        """Whether each row is finite and lies in the support."""
        if self.is_real and math.isfinite(x.sum().item()):  # fast: a sum over NaN or an infinity is never finite
            return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        finite = x.isfinite().all(-1)
        if self.is_real:
            return finite
        if self.constraints[0].event_dim == 1:
            whole: Tensor = self.constraints[0].check(x)
            return finite & whole
        columns = self.constraints * self.dim if len(self.constraints) == 1 else self.constraints
        inside: Tensor = torch.stack([c.check(x[..., i]) for i, c in enumerate(columns)], -1).all(-1)
        return finite & inside

    def is_interior(self, x: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        """Whether each row lies in the support, and not at an end of an interval, which no free coordinate reaches."""
        low, high = (torch.tensor(ends, dtype=x.dtype, device=x.device) for ends in zip(*self.bounds, strict=True))
        return self.contains(x) & ((x > low) & (x < high)).all(-1)

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """The ends of each coordinate's interval; infinite without an interval, or if the constraint is on the whole vector."""
        columns = self.constraints * (self.dim if len(self.constraints) == 1 else 1)
        return [(float(getattr(c, "lower_bound", -math.inf)), float(getattr(c, "upper_bound", math.inf))) for c in columns]

    def __repr__(self) -> str:
        return f"Bijection({shorten(', '.join(map(str, self.constraints)), 200)})"

    def wrap(self, model: Distribution) -> Distribution:
        """Transform a model of free coordinates into one on the support."""
        if self.is_real or self.is_discrete:
            return model
        carried = Supported(model, [self.transform], validate_args=False)
        carried.bijection = self
        return carried

    def describe(self) -> list[str]:
        """Return the support as words that `parse_support` reads."""
        return [describe_constraint(part) for part in self.constraints]


class _NoFormula(InputError, NotImplementedError):
    """A moment without a formula, which torch's own laws report by a `NotImplementedError`."""


_CARRIED = "it is a law on the whole line, carried onto a support, and its moments have no formula"


class Supported(TransformedDistribution):
    """A model on a support, whose density is 0 outside; torch's own class has NaN there, since it assumes the whole line."""

    bijection: Bijection

    @property
    def support(self) -> Constraint:
        """Where the density isn't 0."""
        return _Inside(self.bijection)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Refused, with what to do: it has no formula."""
        raise _NoFormula(
            cannot("give the mean of this model", _CARRIED, "Use the fit's `summary()`, or the mean of its `draws()`")
        )

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Refused, with what to do: it has no formula."""
        instead = "Use the fit's `summary()`, or the variance of its `draws()`"
        raise _NoFormula(cannot("give the variance of this model", _CARRIED, instead))

    def log_prob(self, value: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
        """Return the log density: −inf outside the support, NaN at NaN."""
        within = self.bijection.contains(value)
        safe = torch.where(within[..., None], value, self.bijection.inside(value.dtype, value.device)[0])
        found: Tensor = super().log_prob(safe)
        return torch.where(within, found, torch.where(value.isnan().any(-1), math.nan, found.new_tensor(-math.inf)))

    def __repr__(self) -> str:
        """Name the model and the support."""
        return f"Supported({self.base_dist!r}, {', '.join(str(part) for part in self.bijection.constraints)})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> Supported:
        """Return the same law for a batch."""
        new = self._get_checked_instance(Supported, _instance)
        new.bijection = self.bijection
        return cast(Supported, super().expand(batch_shape, _instance=new))


class _Inside(Constraint):
    """The constraint that a row is in the support of a bijection."""

    event_dim = 1

    def __init__(self, bijection: Bijection) -> None:
        self.bijection = bijection

    def check(self, value: Float[Tensor, "... d"]) -> Bool[Tensor, ...]:
        return self.bijection.contains(value)


class Columns(transforms.Transform):
    """One transform per column; unlike torch's StackTransform, it sums the log Jacobian over the columns."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, parts: Sequence[transforms.Transform]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    def _call(self, x: Tensor) -> Tensor:
        return torch.stack([part(x[..., i]) for i, part in enumerate(self.parts)], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.stack([part.inv(y[..., i]) for i, part in enumerate(self.parts)], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum the columns' logarithms."""
        columns = [part.log_abs_det_jacobian(x[..., i], y[..., i]) for i, part in enumerate(self.parts)]
        return torch.stack(columns, -1).sum(-1)


def count_states(levels: Sequence[tuple[int, int]]) -> int:
    """Return the number of rows of whole numbers between these ends.

    >>> count_states([(0, 1), (0, 2)])
    6
    """
    return math.prod(high - low + 1 for low, high in levels)


def list_states(levels: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float64) -> Float[Tensor, "n d"]:
    """Return every row of whole numbers between these ends; the last column changes fastest.

    >>> list_states([(0, 1), (1, 2)]).tolist()
    [[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [1.0, 2.0]]
    """
    columns = [torch.arange(low, high + 1, dtype=dtype, device="cpu") for low, high in levels]
    return torch.stack(torch.meshgrid(*columns, indexing="ij"), -1).reshape(-1, len(levels))
