"""Product: columns that are independent of each other, each with a family of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot
from whichkl.families.categorical import check_smoothing
from whichkl.families.columns import Columns
from whichkl.families.family import MomentFamily
from whichkl.families.margins import Margin, shown
from whichkl.families.margins_real import (
    BetaMargin,
    ExponentialMargin,
    GammaMargin,
    LaplaceMargin,
    LogNormalMargin,
    NormalMargin,
)
from whichkl.families.margins_whole import BernoulliMargin, CategoricalMargin, PoissonMargin

_KINDS: tuple[type[Margin], ...] = (
    BernoulliMargin,
    PoissonMargin,
    CategoricalMargin,
    NormalMargin,
    LaplaceMargin,
    ExponentialMargin,
    GammaMargin,
    LogNormalMargin,
    BetaMargin,
)
MARGINS: dict[str, type[Margin]] = {kind.name: kind for kind in _KINDS}
_COARSE = 3.0
"""Whole numbers that spread by so much or more are also offered densities, which then hardly change within a step of 1."""


@dataclass(frozen=True)
class Product(MomentFamily):
    """q(x) = ∏ᵢ qᵢ(xᵢ): every column its own margin, by maximum likelihood.

    Args:
        margins: a name for each column, or one for all: ``"normal"``, ``"lognormal"``, ``"gamma"``, ``"beta"``,
            ``"exponential"``, ``"laplace"``, ``"poisson"``, ``"bernoulli"``, ``"categorical"``. None: `resolve` chooses them
            from the values.
        smoothing: by how many further rows each category of a categorical margin is counted.
        categories: for each column the K of a categorical margin, else None; unless said, every code up to the largest must
            occur.

    Raises:
        InputError: a name isn't known.

    >>> Product(["gamma", "poisson"])
    Product(margins=('gamma', 'poisson'))
    >>> x = torch.tensor([[0.0, -1.2], [3.0, 0.3], [1.0, 0.9], [1.0, -0.1]], dtype=torch.float64)
    >>> Product().resolve(x, ["x1", "x2"])
    (Product(margins=('poisson', 'normal')), '`x1` holds whole numbers from 0: poisson; `x2` holds real numbers: normal')
    """

    carried: ClassVar[bool] = False

    margins: str | tuple[str, ...] | None = None
    smoothing: float = 0.0
    categories: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        """Check both fields, and keep several names as a tuple."""
        if self.margins is not None and not isinstance(self.margins, str):
            object.__setattr__(self, "margins", tuple(self.margins))
        for name in (self.margins,) if isinstance(self.margins, str) else self.margins or ():
            if name not in MARGINS:
                instead = f"Choose among {', '.join(sorted(MARGINS))}"
                raise InputError(cannot(f"use the margin {name!r}", "it isn't a known one", instead))
        if self.categories is not None:
            object.__setattr__(self, "categories", tuple(self.categories))
        check_smoothing(self.smoothing)

    def __repr__(self) -> str:
        smoothing = f", smoothing={self.smoothing}" if self.smoothing else ""
        categories = f", categories={self.categories}" if self.categories else ""
        return f"Product(margins={self.margins!r}{smoothing}{categories})"

    @property
    def label(self) -> str:
        """``"independent columns"``."""
        return "independent columns"

    def resolve(
        self, x: Float[Tensor, "n d"], names: Sequence[str], w: Float[Tensor, " n"] | None = None, *, whole: bool = True
    ) -> tuple[Product, str]:
        """Choose a margin for each column where none was said, and say why; count the categories of categorical ones.

        Of the margins that take all of a column's values, the one with the best BIC, log likelihood − ½ · parameters · log n.
        Whole numbers get a density only where they spread over many steps.

        Args:
            x: rows to choose by.
            names: the columns' names.
            w: their weights.
            whole: whether these are all rows; of some, the number of categories can't be told.

        Returns:
            A product with named margins, and a note; ``""`` where they were named.

        Raises:
            InputError: a column is constant.

        Source: Schwarz (1978).
        """
        x = x.to(torch.float64)
        if self.margins is not None:
            return self._counted(x, names) if whole else self, ""
        w = torch.ones_like(x[:, 0]) if w is None else w.to(torch.float64)
        chosen, notes = [], []
        for column, name in zip(x.T, names, strict=True):
            margin, note = self._best(column, w / w.sum() * len(x), name, whole)
            chosen.append(margin)
            notes.append(note)
        family = Product(tuple(chosen), self.smoothing)
        return family._counted(x, names) if whole else family, "; ".join(notes)

    def about_median(self, dim: int) -> list[int]:
        """Return the columns whose `origin` must be their weighted median, since their sums are taken about it."""
        return [i for i, margin in enumerate(self._each(dim)) if margin.about_median]

    def statistics(
        self,
        x: Float[Tensor, "m d"],
        w: Float[Tensor, " m"],
        origin: Float[Tensor, " d"],
        context: Tensor | None = None,
        *,
        overwrite: bool = False,
        total: Float[Tensor, " d"] | None = None,
    ) -> dict[str, Tensor]:
        """Return every margin's sums, their names led by the number of the column."""
        columns = zip(self._each(x.shape[1]), x.T, origin, strict=True)
        each = [margin.statistics(column.contiguous(), w, at) for margin, column, at in columns]
        return {f"{i}.{name}": value for i, sums in enumerate(each) for name, value in sums.items()}

    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, " d"], names: Sequence[str]) -> Distribution:
        """Return the margins of maximum likelihood.

        Raises:
            InputError: a column holds values that its margin doesn't take, or is constant.
        """
        margins = self._each(len(origin))
        self.check_count(int(sums["0.rows"]), len(origin))
        parts = [_under(sums, i) for i in range(len(origin))]
        laws = [m.from_statistics(s, at, name) for m, s, at, name in zip(margins, parts, origin, names, strict=False)]
        return Columns(laws, [margin.name for margin in margins])

    def minimum_rows(self, dim: int) -> int:
        """Return 2, or 1 where all margins are of whole numbers."""
        known = self.margins is not None
        return 1 if known and all(margin.discrete for margin in self._each(dim)) else 2

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse too few rows, and values outside a margin's support, with the first row that has one.

        Raises:
            InputError: as said.
        """
        self.check_count(len(x), x.shape[1])
        if self.margins is None:
            return
        for margin, column, name in zip(self._each(x.shape[1]), x.T, names, strict=True):
            outside = ~margin.allows(column)
            if bool(outside.any()):
                row = int(outside.nonzero()[0, 0])
                value = shown(float(column[row]))
                because = f"column `{name}` holds {value} in row {row}, and `{margin.name}` takes {margin.takes}"
                fitting = [other for other in MARGINS if bool(self._margin(other).allows(column).all())]
                instead = f"Use one of {', '.join(fitting)} there" if fitting else "Drop those rows"
                raise InputError(cannot(f"fit `{self}`", because, instead))
            if not margin.discrete and bool((column == column[0]).all()):
                margin.refuse_constant(name)

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return every margin's parameters, such as ``"0.gamma.rate"``."""
        if not isinstance(model, Columns):
            because = f"it is a `{type(model).__name__}`"
            raise InputError(cannot("read a product from this model", because, "Use a model of this family"))
        return {
            f"{i}.{margin}.{name}": value
            for i, (margin, law) in enumerate(zip(model.margins, model.laws, strict=True))
            for name, value in MARGINS[margin]().parameters(law).items()
        }

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from what `parameters` returns; its names tell the margins."""
        kinds = {int(name.split(".")[0]): name.split(".")[1] for name in parameters}
        margins = [kinds[i] for i in range(len(kinds))]
        laws = [
            MARGINS[margin]().rebuild({name.split(".")[1]: value for name, value in _under(parameters, i).items()})
            for i, margin in enumerate(margins)
        ]
        return Columns(laws, margins)

    def _counted(self, x: Tensor, names: Sequence[str]) -> Product:
        """Say the number of categories of each categorical margin that takes the values of its column."""
        margins = self._each(x.shape[1])
        if self.categories is not None or all(margin.name != "categorical" for margin in margins):
            return self
        counts: list[int | None] = []
        for margin, column, name in zip(margins, x.T, names, strict=True):
            if margin.name == "categorical" and bool(margin.allows(column).all()):
                sums = margin.statistics(column.contiguous(), torch.ones_like(column), column[0])
                counts.append(len(margin.parameters(margin.from_statistics(sums, column[0], name))["probs"]))
            else:
                counts.append(None)
        return Product(self.margins, self.smoothing, tuple(counts))

    def _margin(self, name: str, categories: int | None = None) -> Margin:
        return CategoricalMargin(categories, self.smoothing) if name == "categorical" else MARGINS[name]()

    def _each(self, dim: int) -> list[Margin]:
        """Return the margin of each column."""
        if self.margins is None:
            because = "its margins haven't been chosen yet"
            raise InputError(cannot("use `Product()`", because, "Name them, or call `resolve(x, names)` first"))
        names = (self.margins,) * dim if isinstance(self.margins, str) else self.margins
        if len(names) != dim:
            because = f"it names {len(names)} margins, and there are {dim} columns"
            raise InputError(cannot(f"use `{self}`", because, "Name one a column, or one for all"))
        counts = self.categories or (None,) * dim
        if len(counts) != dim:
            because = f"it names the categories of {len(counts)} columns, and there are {dim}"
            raise InputError(cannot(f"use `{self}`", because, "Name one a column, None where it isn't categorical"))
        return [self._margin(name, count) for name, count in zip(names, counts, strict=True)]

    def _best(self, column: Tensor, w: Tensor, name: str, is_all: bool) -> tuple[str, str]:
        """Return the margin with the best BIC, and a note; a column that is constant in all rows is for no margin to tell."""
        whole = bool((column == column.round()).all())
        if is_all and bool((column == column[0]).all()):
            because = f"it is constant ({shown(float(column[0]))}), so that no margin can be told from its values"
            raise InputError(cannot(f"choose a margin for column `{name}`", because, "Drop the column, or name the margins"))
        if whole and bool(((column == 0) | (column == 1)).all()):
            return "bernoulli", f"`{name}` holds 0 and 1: bernoulli"
        if bool((column == column[0]).all()) and not (whole and float(column[0]) >= 0):
            NormalMargin().refuse_constant(name)
        spread = float(column.std())
        scores: dict[str, float] = {}
        for other in MARGINS:
            margin = self._margin(other)
            if bool(margin.allows(column).all()) and (
                margin.discrete or not whole or spread >= _COARSE or float(column.min()) < 0
            ):
                origin = column.median() if margin.about_median else column[0]
                try:
                    law = margin.from_statistics(margin.statistics(column, w, origin), origin, name)
                except InputError:  # such as a code that never occurs: not a margin for this column
                    continue
                free = len(column.unique()) - 1 if other == "categorical" else margin.free
                score = float(w @ law.log_prob(column)) - free / 2 * float(w.sum().log())
                if score == score:
                    scores[other] = score
        best = max(scores, key=lambda one: scores[one])
        return best, f"`{name}` holds {_words(column, whole)}: {best}"


def _under(values: Mapping[str, Tensor], column: int) -> dict[str, Tensor]:
    """Return the entries of one column, without its number."""
    lead = f"{column}."
    return {name[len(lead) :]: value for name, value in values.items() if name.startswith(lead)}


def _words(column: Tensor, whole: bool) -> str:
    if whole:
        return "whole numbers from 0" if float(column.min()) >= 0 else "whole numbers, some below 0"
    if float(column.min()) > 0:
        return "numbers between 0 and 1" if float(column.max()) < 1 else "numbers above 0"
    return "numbers from 0" if float(column.min()) == 0 else "real numbers"
