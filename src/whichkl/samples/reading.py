"""Reading: which columns of a table are used, and how their cells become numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, quoted, require
from whichkl.samples.columns import floats, holds_numbers, matrix_of
from whichkl.samples.faults import MISSING_WORDS, SEPARATORS, Faults, grouped, kind_of

UNKNOWN = -1.0
"""Code of a label that isn't among the known ones; no model of categories has mass there."""
_MAX_OTHER_LABELS = 1_000
"""Largest number of labels of a category that are listed though they aren't known."""


@dataclass(frozen=True)
class Reading:
    """How a table is read: its columns, missing cells, separators of thousands, and categories.

    Args:
        columns: the columns that are used, in this order; None for all.
        drop: the columns that aren't used.
        missing: ``"refuse"`` tables with missing cells, or ``"drop"`` the rows that have one.
        thousands: the character between groups of three digits, such as ``","`` in 1,234.5; ``""`` for none.
        categories: the columns whose values are labels, each with its labels; a label is read as its number in that list, and
            any other label as −1. ``()`` if the labels are still to be found.
        others: gets the other labels of each category where it is given, and such a label is then read as −2, −3, …, −2 minus its
            number in that list; those after the first thousand stay −1.
    """

    columns: tuple[str, ...] | None = None
    drop: tuple[str, ...] = ()
    missing: str = "refuse"
    thousands: str = ""
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: dict[str, list[str]] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls, columns: Any = None, drop: Any = (), missing: Any = "refuse", thousands: Any = None, categories: Any = ()
    ) -> Reading:
        """Check the arguments of `Target` that say how a table is read.

        Raises:
            InputError: one of them isn't what it may be.
        """
        if missing not in ("refuse", "drop"):
            raise InputError(cannot(f"use `missing={missing!r}`", "it is 'refuse' or 'drop'", "Choose one of them"))
        if thousands is not None and thousands not in SEPARATORS:
            because = "it separates no thousands: " + ", ".join(f"{mark!r} is {words}" for mark, words in SEPARATORS.items())
            raise InputError(cannot(f"use `thousands={thousands!r}`", because, "Choose one of these"))
        labels = categories if isinstance(categories, Mapping) else dict.fromkeys(_listed(categories), ())
        labels = {str(name): tuple(str(one) for one in _listed(known)) for name, known in labels.items()}
        return cls(None if columns is None else _listed(columns), _listed(drop), missing, thousands or "", labels)

    @property
    def is_default(self) -> bool:
        """Whether all columns are numbers without separators, and none may be missing."""
        return self == Reading()

    @property
    def needs_labels(self) -> bool:
        """Whether the labels of a category are still to be found."""
        return any(not labels for labels in self.categories.values())

    def chosen(self, names: Sequence[str], what: str) -> tuple[str, ...]:
        """Return the columns that are used, of those that a table has.

        Raises:
            InputError: a column that was named isn't there, or none is left.
        """
        known = set(names)
        for wanted in (self.columns or (), self.drop, self.categories):
            if absent := [name for name in wanted if name not in known]:
                none = "is no column" if len(absent) == 1 else "are no columns"
                because = f"there {none} {quoted(absent, len(absent))}, but {quoted(names)}"
                raise InputError(cannot(f"read {what}", because, "Correct the names, or rename the columns"))
        dropped = set(self.drop)
        kept = tuple(name for name in (names if self.columns is None else self.columns) if name not in dropped)
        if len(set(kept)) < len(kept) or not kept:
            because = "no column is left" if not kept else "`columns` names a column twice"
            raise InputError(cannot(f"read {what}", because, "Correct `columns` or `drop`"))
        if unused := [name for name in self.categories if name not in kept]:
            because = f"the category `{unused[0]}` isn't among the columns that are used"
            raise InputError(cannot(f"read {what}", because, "Correct `categories`, `columns` or `drop`"))
        return kept

    def reads(self, name: str, kind: Any) -> bool:
        """Whether a column of this Arrow type can be read: numbers, labels, or text with thousands separators."""
        return holds_numbers(kind) or name in self.categories or (bool(self.thousands) and holds_text(kind))

    def matrix(self, batch: Any, names: Sequence[str]) -> Float[Tensor, "m d"]:
        """Return the chosen columns of a record batch in float64; a missing cell becomes NaN.

        Raises:
            pyarrow.ArrowInvalid: a cell isn't a number.
        """
        batch = batch if batch.schema.names == list(names) else batch.select(list(names))
        if not self.categories and set(batch.schema.types) == {require("pyarrow", "app").float64()}:
            return torch.from_numpy(batch.to_tensor(null_to_nan=True, row_major=False).to_numpy())  # one call, not one a column
        return matrix_of([self._numbers(column, name) for name, column in zip(names, batch.columns, strict=True)], len(batch))

    def with_labels(self, batches: Iterable[Any]) -> Reading:
        """Find the labels of all categories that have none, in alphabetical order; numbers are ordered as numbers."""
        found: dict[str, set[str]] = {name: set() for name, labels in self.categories.items() if not labels}
        for batch in batches:
            for name, labels in found.items():
                labels.update(one for one in texts(batch.column(name)).unique().to_pylist() if one is not None)
        ordered = {name: tuple(sorted(labels, key=in_order)) for name, labels in found.items()}
        return replace(self, categories={**self.categories, **ordered})

    def _numbers(self, column: Any, name: str) -> np.ndarray:
        arrow, compute = require("pyarrow", "app"), require("pyarrow.compute", "app")
        if name in self.categories:
            labels = texts(column)
            known = compute.index_in(labels, value_set=arrow.array(self.categories[name], arrow.string()))
            is_other = compute.and_(compute.is_valid(labels), compute.is_null(known))
            codes = compute.if_else(is_other, self._codes_of_others(labels.filter(is_other), labels, name), known)
            return floats(codes)
        if not holds_text(column.type):
            return floats(column)
        text = compute.utf8_trim_whitespace(column)
        is_grouped = compute.match_substring_regex(text, f"^{grouped(self.thousands)}$")
        plain = compute.if_else(is_grouped, compute.replace_substring(text, self.thousands, ""), text)
        plain = compute.if_else(compute.is_in(plain, value_set=arrow.array(sorted(MISSING_WORDS))), None, plain)
        return floats(plain.cast("float64"))

    def _codes_of_others(self, found: Any, labels: Any, name: str) -> Any:
        """Return the codes of labels that aren't among the known ones, `found`: −1, or places in `others`."""
        if self.others is None or not len(found):
            return int(UNKNOWN)
        listed = self.others.setdefault(name, [])
        if len(listed) < _MAX_OTHER_LABELS:
            known = set(listed)
            listed += [one for one in found.unique().to_pylist() if one not in known][: _MAX_OTHER_LABELS - len(listed)]
        arrow, compute = require("pyarrow", "app"), require("pyarrow.compute", "app")
        place = compute.index_in(labels, value_set=arrow.array(listed, arrow.string()))
        return compute.subtract(int(UNKNOWN) - 1, compute.fill_null(place, -1)).cast("int32")

    def faults_in(self, batch: Any, names: Sequence[str], faults: Faults, start: int) -> None:
        """Count the cells of a record batch that can't be used; its first row has the number `start`."""
        types = require("pyarrow", "app").types
        for name in names:
            column, is_label = batch.column(name), name in self.categories
            faults.cells[name] = faults.cells.get(name, 0) + len(column)
            if holds_numbers(column.type) and not is_label:
                with np.errstate(all="ignore"):  # a NaN that signals is counted as any other
                    values = np.array(floats(column), dtype=np.float64)
                faults.add_matrix(torch.from_numpy(values)[:, None], [name], start)
                continue
            whole = "date" if types.is_temporal(column.type) else "" if holds_text(column.type) and self.thousands else "text"
            cells = texts(column).to_pylist()
            kinds = ["missing" if cell is None else whole or kind_of(cell, self.thousands) for cell in cells]
            if whole == "text" and holds_text(column.type):  # a number that is written as text is no fault next to 1,234
                said = ["missing" if cell is None else kind_of(cell) for cell in cells]
                kinds = said if "thousands" in said else [kind or "text" for kind in said]
            for place, (kind, cell) in enumerate(zip(kinds, cells, strict=True), start):
                if kind == "missing" or (kind is not None and not is_label):
                    faults.add(name, kind, place, cell or "")


def holds_text(kind: Any) -> bool:
    """Whether an Arrow type holds text."""
    return str(kind) in ("string", "large_string", "string_view")


def texts(column: Any) -> Any:
    """Return the labels of a column as text, the same for 3 and 3.0; an empty cell is null."""
    arrow, compute = require("pyarrow", "app"), require("pyarrow.compute", "app")
    types = arrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_floating(column.type):
        column = compute.if_else(compute.is_nan(column), None, column)
    try:
        column = column.cast("string")
    except arrow.ArrowNotImplementedError:  # lists, structures, intervals
        column = arrow.array([None if one is None else str(one) for one in column.to_pylist()], arrow.string())
    text = compute.utf8_trim_whitespace(column)
    return compute.if_else(compute.equal(text, ""), None, text)


def select(x: Float[Tensor, "n d"], names: Sequence[str], kept: Sequence[str]) -> Float[Tensor, "n k"]:
    """Return some columns of a matrix, in the order of `kept`."""
    number = {name: i for i, name in enumerate(names)}
    return x if tuple(kept) == tuple(names) else x[:, [number[name] for name in kept]]


def _listed(names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, (Iterable, type(None))):
        names = [names]  # such as a column with a number as its name
    return tuple(str(name) for name in names) if names is not None else ()


def in_order(label: str) -> tuple[float, str]:
    """Return the key by which labels are ordered: numbers as numbers, before other texts."""
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label
