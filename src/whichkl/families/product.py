"""Product: columns that are independent of each other, each with a family of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, as_int, cannot
from whichkl.families.columns import IndependentColumns
from whichkl.families.family import MomentFamily
from whichkl.families.field_checks import BITS, check_not_negative, expect, first_outside, shown
from whichkl.families.margins import MARGINS, CategoricalMargin, Margin

_MIN_SPREAD_FOR_DENSITY = 3.0
"""Smallest standard deviation at which whole numbers may get a density, which then hardly changes within a step of 1."""


@dataclass(frozen=True)
class Product(MomentFamily):
    """q(x) = ∏ᵢ qᵢ(xᵢ): every column its own margin, by maximum likelihood.

    Args:
        margins: a name per column, or one for all columns: ``"normal"``, ``"lognormal"``, ``"gamma"``, ``"beta"``,
            ``"exponential"``, ``"laplace"``, ``"poisson"``, ``"bernoulli"``, ``"categorical"``. None: `resolve` chooses them
            from the values.
        smoothing: the number of rows that are added to each category of a categorical margin.
        categories: the K of a categorical margin, per column, None for the others; without a K, every code up to the largest
            must occur. A column that has a K is categorical where no margins are named.

    Raises:
        InputError: a name isn't known.

    >>> Product(["gamma", "poisson"])
    Product(margins=('gamma', 'poisson'))
    >>> x = torch.tensor([[0.0, -1.2], [3.0, 0.3], [1.0, 0.9], [1.0, -0.1]], dtype=torch.float64)
    >>> Product().resolve(x, ["x1", "x2"])
    (Product(margins=('poisson', 'normal')), '`x1` holds whole numbers from 0: poisson; `x2` holds real numbers: normal')
    """

    label: ClassVar[str] = "independent columns"
    carried: ClassVar[bool] = False

    margins: str | tuple[str, ...] | None = None
    smoothing: float = 0.0
    categories: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.margins is not None and not isinstance(self.margins, str):
            object.__setattr__(self, "margins", _listed(self.margins, "margins", "the names of margins"))
        for name in self.named:
            if not isinstance(name, str) or name not in MARGINS:
                instead = f"Choose among {', '.join(sorted(MARGINS))}"
                raise InputError(cannot(f"use the margin {name!r}", "it isn't a known one", instead))
        if self.categories is not None:
            object.__setattr__(self, "categories", _listed(self.categories, "categories", "numbers of categories"))
            if any(k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1) for k in self.categories or ()):
                because = f"`categories={self.categories!r}` isn't a whole number of at least 1, or None, per column"
                raise InputError(cannot("use `Product`", because, "Give, say, categories=(3, None)"))
        check_not_negative(self, "smoothing")

    def __repr__(self) -> str:
        smoothing = f", smoothing={self.smoothing}" if self.smoothing else ""
        categories = f", categories={self.categories}" if self.categories else ""
        return f"Product(margins={self.margins!r}{smoothing}{categories})"

    @property
    def named(self) -> tuple[str, ...]:
        """The margins that are named: one for all columns, or one per column."""
        return (self.margins,) if isinstance(self.margins, str) else self.margins or ()

    def resolve(
        self, x: Float[Tensor, "n d"], names: Sequence[str], w: Float[Tensor, " n"] | None = None, *, whole: bool = True
    ) -> tuple[Product, str]:
        """Choose a margin per column if none is named, with reasons; count the categories of categorical margins.

        Of the margins that take all values of a column, this is the one with the best BIC,
        log likelihood − ½ · parameters · log n. Whole numbers get a density only where they spread over many steps.

        Args:
            x: rows to choose by.
            names: the columns' names.
            w: their weights.
            whole: whether these are all rows; some of the rows don't determine the number of categories.

        Returns:
            A product with named margins, and a note; ``""`` where they were named.

        Raises:
            InputError: a column is constant.

        Source: Schwarz (1978).
        """
        x = x.to(torch.float64)
        if self.margins is not None:
            return self._with_categories(x, names) if whole else self, ""
        w = torch.ones_like(x[:, 0]) if w is None else w.to(torch.float64)
        counts, share = self.categories or (None,) * len(names), w / w.sum() * len(x)
        chosen = [
            (name, *(self._best_margin(x[:, i], share, name, whole) if count is None else ("categorical", _categories(count))))
            for i, (name, count) in enumerate(zip(names, counts, strict=True))
        ]
        family = Product(tuple(margin for _, margin, _ in chosen), self.smoothing, self.categories)
        note = "; ".join(f"`{name}` holds {values}: {margin}" for name, margin, values in chosen)
        return family._with_categories(x, names) if whole else family, note

    def with_categories(self, counts: Sequence[int | None], names: Sequence[str]) -> Product:
        """Set the number of categories of each column that holds labels."""
        named = self.named * (len(counts) if isinstance(self.margins, str) else 1) or ("categorical",) * len(counts)
        if len(named) == len(counts):
            for margin, count, name in zip(named, counts, names, strict=True):
                if count is not None and margin != "categorical":
                    self.refuse(f"column `{name}` holds categories, and its margin is `{margin}`", "Name it `categorical`")
        return replace(self, categories=self.categories or tuple(counts))

    def about_median(self, dim: int) -> list[int]:
        """Return the columns whose `origin` must be their weighted median, since their sums are taken about it."""
        return [i for i, margin in enumerate(self._margins(dim)) if margin.about_median]

    def statistics(
        self, x: Tensor, w: Tensor, origin: Tensor, context: Tensor | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Return every margin's sums; each name begins with the number of the column."""
        columns = zip(self._margins(x.shape[1]), x.T, origin, strict=True)
        sums = [margin.statistics(column.contiguous(), w, at) for margin, column, at in columns]
        return {f"{i}.{name}": value for i, each in enumerate(sums) for name, value in each.items()}

    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, " d"], names: Sequence[str]) -> Distribution:
        """Return the margins of maximum likelihood."""
        margins = self._margins(len(origin))
        self.check_count(int(sums["0.rows"]), len(origin))
        columns = enumerate(zip(margins, origin, names, strict=False))
        laws = [margin.from_statistics(_of_column(sums, i), at, name) for i, (margin, at, name) in columns]
        return IndependentColumns(laws, [margin.name for margin in margins])

    def minimum_rows(self, dim: int) -> int:
        """Return 2, or 1 if all margins are of whole numbers."""
        return 1 if self.margins is not None and all(margin.values.is_whole for margin in self._margins(dim)) else 2

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse too few rows, and values that a margin doesn't take, with the first row that has one."""
        self.check_count(len(x), x.shape[1])
        if self.margins is None:
            return
        for margin, column, name in zip(self._margins(x.shape[1]), x.T, names, strict=True):
            outside = first_outside(column, margin.values)
            if outside is not None:
                row, value = outside
                because = f"column `{name}` holds {value} in row {row}, and `{margin.name}` takes {margin.values.words}"
                fitting = [other for other in MARGINS if bool(self._margin(other).values.contains(column).all())]
                instead = f"Use one of {', '.join(fitting)} there" if fitting else "Drop those rows"
                self.refuse(because, instead, row)
            if not margin.values.is_whole and bool((column == column[0]).all()):
                margin.refuse_constant(name)

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return every margin's parameters, such as ``"0.gamma.rate"``."""
        columns = expect(model, IndependentColumns, "a product")
        return {
            f"{i}.{margin}.{name}": value
            for i, (margin, law) in enumerate(zip(columns.margins, columns.laws, strict=True))
            for name, value in MARGINS[margin]().parameters(law).items()
        }

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from what `parameters` returns; the names contain the margins."""
        kinds = {int(name.split(".")[0]): name.split(".")[1] for name in parameters}
        margins = [kinds[i] for i in range(len(kinds))]
        laws = [MARGINS[margin]().law(_of_column(parameters, f"{i}.{margin}")) for i, margin in enumerate(margins)]
        return IndependentColumns(laws, margins)

    def _with_categories(self, x: Tensor, names: Sequence[str]) -> Product:
        """Set the number of categories, where it isn't known, of each categorical margin that takes the values of its column."""
        margins = self._margins(x.shape[1])
        if all(margin.name != "categorical" for margin in margins):
            return self
        known = self.categories or (None,) * len(margins)

        def count(margin: Margin, column: Tensor, name: str) -> int | None:
            is_counted = margin.name == "categorical" and bool(margin.values.contains(column).all())
            return len(margin.parameters(_fitted(margin, column, name))["probs"]) if is_counted else None

        counted = zip(known, margins, x.T, names, strict=True)
        return replace(self, categories=tuple(k if k is not None else count(*column) for k, *column in counted))

    def _margin(self, name: str, categories: int | None = None) -> Margin:
        return CategoricalMargin(categories, self.smoothing) if name == "categorical" else MARGINS[name]()

    def _margins(self, dim: int) -> list[Margin]:
        """Return the margin of each column."""
        if self.margins is None:
            because = "its margins haven't been chosen yet"
            raise InputError(cannot("use `Product()`", because, "Name them, or call `resolve(x, names)` first"))
        names = self.named * (dim if isinstance(self.margins, str) else 1)
        if len(names) != dim:
            because = f"it names {len(names)} margins, and there are {dim} columns"
            raise InputError(cannot(f"use `{self}`", because, "Give one name per column, or one name for all columns"))
        counts = self.categories or (None,) * dim
        if len(counts) != dim:
            because = f"it gives the categories of {len(counts)} columns, and there are {dim}"
            raise InputError(cannot(f"use `{self}`", because, "Give one number per column, None if it isn't categorical"))
        return [self._margin(name, count) for name, count in zip(names, counts, strict=True)]

    def _best_margin(self, x: Tensor, w: Tensor, name: str, is_all: bool) -> tuple[str, str]:
        """Return the margin with the best BIC, and the values in words; values that are all equal determine no margin."""
        is_constant, is_whole = bool((x == x[0]).all()), bool((x == x.round()).all())
        if is_all and is_constant:
            because = f"it is constant ({shown(float(x[0]))}), and the values of a constant column determine no margin"
            raise InputError(cannot(f"choose a margin for column `{name}`", because, "Drop the column, or name the margins"))
        if bool(BITS.contains(x).all()):
            return "bernoulli", "0 and 1"
        if is_constant and not (is_whole and float(x[0]) >= 0):
            MARGINS["normal"]().refuse_constant(name)
        may_have_density = not is_whole or float(x.std()) >= _MIN_SPREAD_FOR_DENSITY or float(x.min()) < 0
        scores: dict[str, float] = {}
        for margin in map(self._margin, MARGINS):
            if not bool(margin.values.contains(x).all()) or not (margin.values.is_whole or may_have_density):
                continue
            try:
                law = _fitted(margin, x, name, w)
            except InputError:  # such as a code that never occurs: not a margin for this column
                continue
            score = float(w @ law.log_prob(x)) - margin.count_parameters(x) / 2 * float(w.sum().log())
            if score == score:
                scores[margin.name] = score
        return max(scores, key=lambda one: scores[one]), _in_words(x, is_whole)


def _listed(value: Any, field: str, what: str) -> tuple[Any, ...]:
    """Return a field as a tuple; refuse what isn't a list."""
    if not isinstance(value, (list, tuple)):
        because = f"`{field}` is a `{type(value).__name__}`, not a list of {what}"
        raise InputError(cannot("use `Product`", because, f"Give a list with one entry per column as {field}="))
    return tuple(map(as_int, value))


def _fitted(margin: Margin, x: Tensor, name: str, w: Tensor | None = None) -> Distribution:
    """Fit a margin to one column."""
    origin = x.median() if margin.about_median else x[0]
    return margin.from_statistics(margin.statistics(x.contiguous(), torch.ones_like(x) if w is None else w, origin), origin, name)


def _of_column(values: Mapping[str, Tensor], column: int | str) -> dict[str, Tensor]:
    """Return the entries of one column, without its number and its margin."""
    lead = f"{column}."
    return {name.removeprefix(lead): value for name, value in values.items() if name.startswith(lead)}


def _in_words(x: Tensor, is_whole: bool) -> str:
    if is_whole:
        return "whole numbers from 0" if float(x.min()) >= 0 else "whole numbers, some below 0"
    if float(x.min()) > 0:
        return "numbers between 0 and 1" if float(x.max()) < 1 else "numbers above 0"
    return "numbers from 0" if float(x.min()) == 0 else "real numbers"


def _categories(count: int) -> str:
    return f"{count} categories" if count > 1 else "1 category"
