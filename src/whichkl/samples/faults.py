"""Faults: every cell of a table that isn't a number is counted per column, and one error names them all with what to do."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.printable import one_line

MISSING_WORDS = frozenset(
    "#N/A;#N/A N/A;#NA;-1.#IND;-1.#QNAN;-NaN;-nan;1.#IND;1.#QNAN;N/A;NA;NULL;NaN;n/a;nan;null".split(";")
) | {""}
"""Texts that stand for a missing cell: those that pyarrow reads as null in a column of numbers."""
TRUTH_WORDS = frozenset({"true", "false", "True", "False", "TRUE", "FALSE"})
SEPARATORS = {",": "a comma", "'": "an apostrophe", "_": "an underscore", " ": "a space", "\u00a0": "a no-break space"}
"""Characters that may separate thousands. A dot is the decimal point."""
_DATE = re.compile(r"(\d{4}([-/.])\d{1,2}\2\d{1,2}|\d{1,2}([-/.])\d{1,2}\3\d{2,4})([T ]\d.*)?|\d{1,2}:\d{2}(:\d{2}(\.\d*)?)?")
_COMPLEX = re.compile(r"\([^\s()]+[+-][^\s()]+j\)")
_MAX_PLACES = 3
"""Largest number of places that a message names per column."""
_MAX_FAULTS_SHOWN = 40
"""Largest number of columns, each with one kind of fault, that a message describes."""
_MAX_LABELS = 50
"""A column of text with more distinct labels is more likely a name or a comment than a category."""
_WORDS = {
    "missing": "is missing or NaN",
    "infinite": "is infinite",
    "text": "holds text",
    "date": "holds dates or times",
    "complex": "holds complex numbers",
    "thousands": "has thousands separators",
    "decimal comma": "has decimal commas",
}
"""What is wrong with a column, by the kind of its cells."""


class TableError(InputError):
    """A table has cells that can't be used."""

    do = because = otherwise = ""
    """What can't be done, why, and what can be done other than to pass `keywords`."""
    keywords: Mapping[str, Any] = MappingProxyType({})
    """The arguments of `Target` with which the table can be read."""

    @classmethod
    def of(
        cls, do: str, because: str, keywords: Mapping[str, Any], otherwise: str, call: str = "Target(samples=…, {})"
    ) -> TableError:
        """Write the message, with the keywords in a call."""
        said = call.format(", ".join(f"{name}={value!r}" for name, value in keywords.items())) if keywords else ""
        instead = ", or ".join(one for one in (f"Pass `{said}`" if said else "", otherwise) if one)
        head = cannot(do, because, "Z").removesuffix("Z.")  # `cannot` would shorten a long call, which is to be typed
        error = cls(one_line(f"{head}{instead[0].upper()}{instead[1:]}."))
        error.do, error.because, error.keywords, error.otherwise = do, because, keywords, otherwise
        return error


@dataclass
class _Fault:
    """The cells of one kind in one column."""

    count: int = 0
    places: list[int] = field(default_factory=list)
    example: str = ""
    labels: Counter[str] = field(default_factory=Counter)


class Faults:
    """The cells of a table that can't be used, by column and kind.

    Args:
        unit: what its places count: ``"line"`` for text, ``"row"`` for anything else.
        may_miss: whether a missing cell is no fault, since its row is left out.

    >>> faults = Faults("line")
    >>> faults.add("city", "text", 2, "Rome")
    >>> faults.add("age", "missing", 3)
    >>> print(faults.error("`x.csv`"))
    Cannot read `x.csv`: column `city` holds text in 1 cell (line 2, `Rome`); column `age` is missing or NaN in 1 cell (line 3).
    Pass `Target(samples=…, drop=['city'], missing='drop')`.
    """

    def __init__(self, unit: str, may_miss: bool = False) -> None:
        self.unit, self.may_miss, self.marks = unit, may_miss, Counter[str]()
        self._found: dict[tuple[str, str], _Fault] = {}
        self.cells: dict[str, int] = {}
        """How many cells of a column with faults were seen, where that is known."""
        self.reach = ""
        """How much of the table was looked at, if not all of it."""

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, column: str, kind: str, place: int, cell: str = "") -> None:
        """Count a cell of one kind."""
        if kind == "missing" and self.may_miss:
            return
        fault = self._found.setdefault((column, kind), _Fault())
        fault.count += 1
        if len(fault.places) < _MAX_PLACES:
            fault.places.append(place)
            fault.example = fault.example or cell
        if kind == "text" and (len(fault.labels) <= _MAX_LABELS or cell in fault.labels):
            fault.labels[cell] += 1
        if kind == "thousands":
            self.marks[next(mark for mark in SEPARATORS if mark in cell)] += 1

    def add_matrix(self, x: Float[Tensor, "m d"], names: Sequence[str], start: int = 0) -> None:
        """Count the cells of a matrix that aren't finite; its first row has the number `start`."""
        if math.isfinite(x.sum().item()):
            return
        for kind, is_bad in (("missing", x.isnan() & (not self.may_miss)), ("infinite", x.isinf())):
            for column in is_bad.any(0).nonzero()[:, 0].tolist():
                rows = is_bad[:, column].nonzero()[:, 0]
                for row in rows[:_MAX_PLACES].tolist():
                    self.add(names[column], kind, start + row)
                self._found[names[column], kind].count += max(0, len(rows) - _MAX_PLACES)

    def error(self, what: str, reason: str = "it holds cells that aren't numbers") -> TableError:
        """Return the error that names every column, its bad cells and the arguments that help; the reason if none was seen."""
        if not self:  # the fault lies beyond the cells that were looked at, or in a type alone
            return TableError.of(f"read {what}", reason + self.reach, {}, "write numbers there, or leave that column out")
        order = {column: i for i, column in enumerate(self.cells)}
        found = sorted(self._found, key=lambda one: order.get(one[0], 0))
        because = "; ".join(self._said(*one, self._found[one]) for one in found[:_MAX_FAULTS_SHOWN])
        because += f"; and {len(found) - _MAX_FAULTS_SHOWN} more like these" if len(found) > _MAX_FAULTS_SHOWN else ""
        kinds: dict[str, set[str]] = {}
        for column, kind in found:
            kinds.setdefault(column, set()).add(kind)
        categories = [column for column in kinds if self._is_category(column)]
        dropped = [column for column, found in kinds.items() if column not in categories and found & {"text", "date", "complex"}]
        empty = [column for column in kinds if self._is_empty(column)]
        rest = {kind for column, found in kinds.items() if column not in (*dropped, *empty) for kind in found}
        keywords: dict[str, Any] = {"categories": categories, "drop": [*dropped, *empty]}
        keywords["missing"] = "drop" if "missing" in rest else None
        keywords["thousands"] = self.marks.most_common(1)[0][0] if "thousands" in rest else None
        keywords = {name: value for name, value in keywords.items() if value}
        dates = [f"`{column}`" for column in dropped if "date" in kinds[column]]
        odd = [f"`{column}`" for column in dropped if not self._is_text(column)]
        has_complex = any("complex" in found for found in kinds.values())
        others = [f"write {', '.join(dates)} as numbers, such as days since the first"] * bool(dates)
        others += [f"correct these cells of {', '.join(odd)}"] * bool(odd and not dates and not has_complex)
        others += ["give real and imaginary parts as columns"] * has_complex
        others += ["write numbers with a decimal point"] * ("decimal comma" in rest)
        others += ["drop or repair the rows with infinite cells"] * ("infinite" in rest)
        return TableError.of(f"read {what}", because + self.reach, keywords, ", or ".join(others))

    def _is_category(self, column: str) -> bool:
        """Whether most cells of a column are text, with few labels that repeat."""
        labels = self._found.get((column, "text"), _Fault()).labels
        has_dates = (column, "date") in self._found
        return self._is_text(column) and not has_dates and len(labels) <= min(_MAX_LABELS, labels.total() // 2)

    def _is_empty(self, column: str) -> bool:
        """Whether every cell of a column is missing, so that to leave out rows would leave none."""
        return (column, "missing") in self._found and self._found[column, "missing"].count == self.cells.get(column)

    def _is_text(self, column: str) -> bool:
        """Whether most cells of a column are text."""
        count = self._found.get((column, "text"), _Fault()).count
        return 2 * count > self.cells.get(column, count)

    def _said(self, column: str, kind: str, fault: _Fault) -> str:
        shown = [str(place) if self.unit == "line" else f"{place:,}" for place in fault.places]
        shown += ["…"] * (fault.count > len(shown))
        plural = "s" * (fault.count > 1)
        lead = ", such as" if fault.count > 1 else ","
        example = f"{lead} `{fault.example[:40]}`" if fault.example else ""
        where = f"{self.unit}{plural} {', '.join(shown)}{example}"
        return f"column `{column}` {_WORDS[kind]} in {fault.count:,} cell{plural} ({where})"


def kind_of(cell: str, thousands: str = "") -> str | None:
    """Return what is wrong with the text of a cell; None if it's a finite number, or true or false.

    >>> [kind_of(cell, ",") for cell in ("1,234.5", "12,5", "2026-01-31", "Rome", " 7 ", "NA")]
    [None, 'decimal comma', 'date', 'text', None, 'missing']
    """
    cell = cell.strip()
    if cell in MISSING_WORDS:
        return "missing"
    if is_number(cell):
        return None if math.isfinite(float(cell)) else "infinite"
    if cell in TRUTH_WORDS:
        return None
    for mark in SEPARATORS:
        if re.fullmatch(grouped(mark), cell):
            return None if mark == thousands else "thousands"
    if re.fullmatch(r"[+-]?[\d.]*\d,\d+", cell):
        return "decimal comma"
    return "date" if _DATE.fullmatch(cell) else "complex" if _COMPLEX.fullmatch(cell) else "text"


def grouped(mark: str) -> str:
    """Return the regular expression of numbers with this character between groups of three digits."""
    return rf"[+-]?\d{{1,3}}({re.escape(mark)}\d{{3}})+(\.\d*)?"


def is_number(cell: str) -> bool:
    """Whether the text of a cell is a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def unreadable(path: Any, because: str, instead: str) -> InputError:
    """Return the error for a file that can't be read."""
    return InputError(cannot(f"read `{path}`", because, instead))
