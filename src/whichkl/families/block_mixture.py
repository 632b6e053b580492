"""Block mixture: blocks of columns that are independent of each other, each with a mixture; modes of blocks multiply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution, constraints

from whichkl._checks import InputError, as_int, cannot
from whichkl.families.family import Family
from whichkl.families.field_checks import check_choice, check_whole, expect
from whichkl.families.mixture import mixture, mixture_parts

SHAPES = ("full", "diagonal")
_DEGREES = 3
"""Number of polynomials of a column whose correlations show that columns depend on each other."""


@dataclass(frozen=True)
class BlockMixture(Family):
    """q(x) = ∏_b Σₖ π_bk N(x_b; m_bk, Σ_bk): a mixture of K Gaussians for each block of columns.

    B blocks of K components have Kᴮ modes, with parameters for B K of them.

    Args:
        components: K ≥ 1, of every block.
        blocks: ``"auto"``: columns that depend on each other share a block, by the log density where there is one, else by the
            samples; a whole number: the size of blocks of neighbouring columns; or the number of its block for each column.
        covariance: of a component within its block, ``"full"`` or ``"diagonal"``.

    Raises:
        InputError: a field isn't one of these.

    >>> BlockMixture(2, blocks=(0, 0, 1))
    BlockMixture(components=2, blocks=(0, 0, 1), covariance='full')
    """

    components: int = 2
    blocks: str | int | tuple[int, ...] = "auto"
    covariance: str = "full"

    def __post_init__(self) -> None:
        check_whole(self, "components", "Give, say, components=2")
        check_choice(self, "covariance", SHAPES)
        if isinstance(self.blocks, str):
            check_choice(self, "blocks", ("auto",))
        elif isinstance(self.blocks, (tuple, list)):
            numbers = tuple(map(as_int, self.blocks))
            object.__setattr__(self, "blocks", numbers)
            is_whole = all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)
            if not numbers or not is_whole or {*numbers} != {*range(len({*numbers}))}:
                because = f"`blocks={numbers!r}` doesn't number the block of each column from 0 on"
                raise InputError(cannot("use `BlockMixture`", because, "Give, say, blocks=(0, 0, 1)"))
        else:
            check_whole(self, "blocks", "Give, say, blocks=2, or blocks='auto'")

    @property
    def label(self) -> str:
        """Such as ``"independent blocks, each a mixture of 2 full Gaussians"``."""
        many = "" if self.components == 1 else "s"
        return f"independent blocks, each a mixture of {self.components} {self.covariance} Gaussian{many}"

    def columns(self, dim: int) -> list[list[int]]:
        """Return the numbers of each block's columns; all in one block where the blocks aren't known yet.

        Raises:
            InputError: the family gives the blocks of another number of columns.
        """
        if isinstance(self.blocks, str):
            return [[*range(dim)]]
        if isinstance(self.blocks, int):
            return [[*range(first, min(dim, first + self.blocks))] for first in range(0, dim, self.blocks)]
        if len(self.blocks) != dim:
            because = f"it gives the blocks of {len(self.blocks)} columns, and there are {dim}"
            self.refuse(because, "Give one number per column, or blocks='auto'")
        return [[i for i, one in enumerate(self.blocks) if one == number] for number in range(len({*self.blocks}))]

    def with_blocks(self, is_linked: Bool[Tensor, "d d"]) -> BlockMixture:
        """Put columns that are linked, directly or through others, into one block."""
        reach = is_linked | is_linked.T | torch.eye(len(is_linked), dtype=torch.bool, device="cpu")
        for _ in range(max(1, math.ceil(math.log2(len(reach))))):  # paths of 2, 4, 8, … links
            reach = (reach.double() @ reach.double()) > 0
        first = reach.int().argmax(1)
        return replace(self, blocks=tuple(first.unique(return_inverse=True)[1].tolist()))

    def with_blocks_of(self, x: Float[Tensor, "n d"], w: Float[Tensor, " n"]) -> tuple[BlockMixture, str]:
        """Choose the blocks by weighted rows, where they are ``"auto"``; return the family, and a note.

        Two columns are linked if the correlations of the first three Hermite polynomials of their normal scores have a better
        BIC than none: n ‖R‖² > 9 log n, n the effective number of rows.

        Source: Lancaster (1958) for the polynomials; Schwarz (1978).
        """
        if self.blocks != "auto":
            return self, ""
        chosen = self.with_blocks(_linked(x, w / w.sum()))
        return chosen, f"{len(chosen.columns(x.shape[1]))} independent blocks of columns were found by the rows"

    def minimum_rows(self, dim: int) -> int:
        """Return K times the rows of one component of the largest block."""
        largest = 1 if isinstance(self.blocks, str) else max(map(len, self.columns(dim)))
        return self.components * (2 if self.covariance == "diagonal" else largest + 1)

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return the parameters of each block's mixture, such as ``"0.loc"``."""
        laws = expect(model, IndependentBlocks, "independent blocks").laws
        named = [dict(zip(("probs", "loc", "scale_tril"), mixture_parts(law)[:3], strict=True)) for law in laws]
        return {f"{b}.{name}": value for b, each in enumerate(named) for name, value in each.items()}

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from what `parameters` returns."""
        count = len({name.partition(".")[0] for name in parameters})
        parts = [[parameters[f"{b}.{name}"] for name in ("probs", "loc", "scale_tril")] for b in range(count)]
        laws = [mixture(probs, loc, tril, self.covariance) for probs, loc, tril in parts]
        return IndependentBlocks(laws, self.columns(sum(part[1].shape[-1] for part in parts)))


class IndependentBlocks(Distribution):
    """log q(x) = Σ_b log q_b(x_b); batch shape (), event shape (d,).

    Args:
        laws: the law of each block.
        columns: the numbers of its columns.

    >>> from torch.distributions import MultivariateNormal
    >>> law = MultivariateNormal(torch.zeros(1), torch.eye(1))
    >>> IndependentBlocks([law, law], [[1], [0]]).log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.real, 1)

    def __init__(self, laws: Sequence[Distribution], columns: Sequence[Sequence[int]]) -> None:
        self.laws, self.columns = tuple(laws), tuple(map(tuple, columns))
        self._order = torch.tensor([i for block in self.columns for i in block], dtype=torch.int64, device="cpu").argsort()
        super().__init__(torch.Size(), torch.Size((len(self._order),)), validate_args=False)

    def __repr__(self) -> str:
        return f"IndependentBlocks({len(self.laws)} blocks, {len(self._order)} columns)"

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The columns' means."""
        return self._joined([law.mean for law in self.laws])

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """The columns' variances."""
        return self._joined([law.variance for law in self.laws])

    def log_prob(self, value: Float[Tensor, "... d"]) -> Float[Tensor, ...]:
        """Return the sum of the blocks' log densities.

        Raises:
            ValueError: the last axis isn't d long.
        """
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"the last axis has length {value.shape[-1] if value.ndim else 0}, not {len(self._order)}")
        terms = [law.log_prob(value[..., list(block)]) for law, block in zip(self.laws, self.columns, strict=True)]
        total: Tensor = torch.stack(terms).sum(0)
        return total

    def sample(self, sample_shape: Any = ()) -> Float[Tensor, "... d"]:
        """Draw every block independently."""
        return self._joined([law.sample(torch.Size(sample_shape)) for law in self.laws])

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the blocks' columns into their order."""
        return torch.cat([*parts], -1)[..., self._order.to(parts[0].device)]


def _linked(x: Float[Tensor, "n d"], w: Float[Tensor, " n"]) -> Bool[Tensor, "d d"]:
    """Return which columns depend on each other."""
    n, dim = x.shape
    order = x.argsort(0)
    below = torch.empty_like(x).scatter_(0, order, w[order].cumsum(0) - w[order] / 2)
    z = torch.special.ndtri(below.clamp(1e-12, 1 - 1e-12))
    features = torch.stack([z, z.square(), z.pow(3) - 3 * z], -1).reshape(n, -1)
    features = features - w @ features
    features = features / (w @ features.square()).sqrt().clamp(min=1e-300)
    correlations = ((w[:, None] * features).T @ features).reshape(dim, _DEGREES, dim, _DEGREES)
    effective = float(1 / w.square().sum())
    return effective * correlations.square().sum((1, 3)) > _DEGREES**2 * math.log(effective)
