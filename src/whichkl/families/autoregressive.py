"""Autoregressive: a masked network for columns of categories, each given those before it, with exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from whichkl.families.field_checks import check_widths
from whichkl.families.layers import Shape, Standardised, Summary, masked_perceptron
from whichkl.families.network_family import MAX_CATEGORIES, NetworkFamily


@dataclass(frozen=True)
class Autoregressive(NetworkFamily):
    """q(x) = Πⱼ q(xⱼ | x₁ … xⱼ₋₁), or q(y|x) in the same way, for columns of whole numbers 0 … Kⱼ − 1; exact log q.

    Kⱼ is one more than the largest value in the data, including held-out rows. Other values have probability 0.

    Args:
        hidden: widths of the masked layers.

    Raises:
        InputError: they aren't whole numbers of at least 1.

    Source: Germain, Gregor, Murray & Larochelle (2015).

    >>> Autoregressive(hidden=(32,)).label
    'an autoregressive network'
    """

    label: ClassVar[str] = "an autoregressive network"
    carried: ClassVar[bool] = False
    conditional: ClassVar[bool] = True
    optional_context: ClassVar[bool] = True

    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        check_widths(self)

    @property
    def max_value(self) -> int:
        """The largest category."""
        return MAX_CATEGORIES - 1

    def with_categories(self, counts: Sequence[int | None], names: Sequence[str]) -> Autoregressive:
        """Take categories as they are; a column without them holds whole numbers."""
        return self

    def shape(self, summary: Summary, scalar: bool) -> Shape:
        """Count the categories of each column."""
        return Shape(len(summary.mean), len(summary.context_mean), scalar, summary.categories)

    def network(self, shape: Shape) -> nn.Module:
        """Build the masked network."""
        return _Network(shape, self.hidden)


class _Network(Standardised):
    """One-hot columns in, logits of each column's categories out."""

    def __init__(self, shape: Shape, hidden: Sequence[int]) -> None:
        super().__init__(shape, scales_y=False)
        self.categories = shape.categories
        counts = torch.tensor(self.categories, dtype=torch.int64, device="cpu")
        column = torch.arange(self.dim, device="cpu").repeat_interleave(counts)
        takes = torch.cat([torch.full((shape.context,), -1, dtype=torch.int64, device="cpu"), column])
        self.net = masked_perceptron(takes, column, hidden, self.dim)

    def forward(self, x: Tensor | None = None) -> Distribution:
        """Return the law of y, given x where there are contexts."""
        return MaskedColumns(self, None if x is None else self.standard_context(x))

    def logits(self, y: Tensor, given: Tensor | None) -> list[Tensor]:
        """Return log q of every category of every column, given the columns before it: (…, Kⱼ) for each j."""
        every = [torch.arange(count, device=y.device) for count in self.categories]  # one_hot can't be mapped by vmap
        inputs = torch.cat([one[..., None] == k for one, k in zip(y.unbind(-1), every, strict=True)], -1).to(self.mean)
        if given is not None:
            inputs = torch.cat([given.expand(*inputs.shape[:-1], -1), inputs], -1)
        outputs, count = self.net(inputs), self.categories[0]
        if all(one == count for one in self.categories):  # all columns in one call
            return list(outputs.unflatten(-1, (-1, count)).log_softmax(-1).unbind(-2))
        return [one.log_softmax(-1) for one in outputs.split(self.categories, -1)]


class MaskedColumns(Distribution):
    """The law of columns of categories, each given those before it; drawn column by column."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, network: _Network, given: Tensor | None) -> None:
        self.network, self.given = network, given
        event = () if network.is_scalar and network.dim == 1 else (network.dim,)
        super().__init__(Size(()) if given is None else given.shape[:-1], Size(event), validate_args=False)

    @property
    def support(self) -> Any:
        """Whole numbers from 0 to the largest number of categories."""
        whole = constraints.integer_interval(0, max(self.network.categories) - 1)
        return constraints.independent(whole, 1) if self.event_shape else whole

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q of rows; −∞ where a value isn't one of a column's categories."""
        return self.columns(value if self.event_shape else value[..., None]).sum(-1)

    def columns(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Return log q of each column given those before it."""
        most = torch.tensor(self.network.categories, device=rows.device, dtype=torch.int64)
        rows = rows.long() if rows.dtype == torch.bool else rows
        known = (rows >= 0) & (rows < most) & (rows == rows.floor())
        whole = torch.where(known, rows, torch.zeros_like(rows)).long()
        found = self.network.logits(whole, self.given)
        each = torch.stack([one.gather(-1, whole[..., j, None])[..., 0] for j, one in enumerate(found)], -1)
        return torch.where(known, each, torch.full_like(each, -math.inf))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw column by column."""
        size = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            y = torch.zeros(*size, self.network.dim, dtype=torch.long, device=self.network.mean.device)
            for j in range(self.network.dim):
                chance = self.network.logits(y, self.given)[j].exp()
                y[..., j] = torch.multinomial(chance.reshape(-1, chance.shape[-1]), 1).reshape(size)
        drawn = y.to(self.network.mean)
        return drawn if self.event_shape else drawn[..., 0]
