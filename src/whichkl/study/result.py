"""Study: the result of a comparison: its rows, the details behind each, and the fits themselves."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, IntegrityError, cannot
from whichkl.families import Family
from whichkl.files.writing import write_whole
from whichkl.fitting import Fit
from whichkl.printable import HTML, WIDTH, as_sentence, wrapped
from whichkl.process.torch_modes import plain_modes
from whichkl.study.arms import mean_and_error, rows_by_arm
from whichkl.study.ledger import Ledger, Stored, read_config
from whichkl.study.measures import COST, NEEDS, NEEDS_OF_STUDENTS, Need, columns_in, columns_with, constants_of
from whichkl.study.verdict import Verdict, decide
from whichkl.targets import Target

_MAX_LINES = 40
"""Largest number of printed lines, of which each part of the table has at least `_MIN_ARMS` arms."""
_MIN_ARMS = 5
_MAX_NOTES = 6
_BOUND = re.compile(r"\w+_kl is a lower bound")
"""A note on a value that is one."""
_SPLITS = (
    "All seeds split one set of samples, so that their parts overlap: intervals and p-values tell which arm is better on these "
    "samples, and would be wider for other samples from the same source (Nadeau & Bengio, 2003)."
)
_KINDS_OF_STUDENTS = {"distillation": "Distillation", "language model": "LanguageDistillation"}
"""The class of a cell's result, by the source of the target, where it is no fit."""


@dataclass(frozen=True)
class Study(HTML):
    """The result of `compare`; `Study.load` reads it back from its folder."""

    cells: tuple[Stored, ...]
    """Every finished cell, seed by seed, in the order of families and objectives."""
    config: dict[str, Any]
    """Everything on which a number depends: what was compared, and the versions of code and data."""
    folder: Path | None = None
    dropped: tuple[tuple[str, int], ...] = field(default=())
    """Arms that a pilot dropped, and after how many seeds."""
    target: Target | None = field(default=None, compare=False, repr=False)
    """The target; None after `Study.load`."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dict for each cell, its fields in the order of the table."""
        names = self.columns
        return [{name: cell.row.get(name) for name in names} for cell in self.cells]

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns."""
        known = set(columns_with([]))
        own = list(dict.fromkeys(name for cell in self.cells for name in cell.row if name not in known))
        return columns_with(own)

    @cached_property
    def table(self) -> dict[str, list[Any]]:
        """The rows as columns, such as ``pandas.DataFrame(study.table)`` takes."""
        return {name: [cell.row.get(name) for cell in self.cells] for name in self.columns}

    @property
    def failed(self) -> tuple[Stored, ...]:
        """The cells that failed."""
        return tuple(cell for cell in self.cells if cell.row["status"] == "failed")

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict: which arm is better for which need, if any."""
        found = decide(self.rows, self._needs)
        splits = [_SPLITS] if found.comparisons and self.config["target"].get("rows") else []
        return replace(found, notes=(*found.notes, *self._bounds(), *splits))

    @property
    def _needs(self) -> tuple[Need, ...]:
        return NEEDS_OF_STUDENTS.get(str(self.config["target"].get("source")), NEEDS)

    def _bounds(self) -> list[str]:
        """Return which columns are lower bounds whatever the draws, a sentence each."""
        notes = (note for cell in self.cells for note in str(cell.row.get("notes") or "").split("; "))
        return [as_sentence(note) for note in dict.fromkeys(notes) if _BOUND.match(note)]

    @plain_modes()
    def fit(self, cell: Stored | str | int, family: Family | None = None) -> Fit:
        """Return the fit of a cell.

        Args:
            cell: one of `cells`, its key or the beginning of it, or its number.
            family: the family, where it's a module of your own.

        Raises:
            InputError: there is no such cell, it failed, or it holds a student, which is no fit.
        """
        one = self._cell(cell)
        if (kind := _KINDS_OF_STUDENTS.get(str(self.config["target"].get("source")))) is not None:
            instead = "Run `compare` with `out=`, which keeps students"
            if one.folder is not None and (one.folder / "fit").is_dir():
                instead = f"Use whichkl.distillation.{kind}.load({str(one.folder / 'fit')!r})"
            raise InputError(cannot(f"load the fit of cell {one.key[:8]}", "it holds a student, which is no fit", instead))
        if one.row["status"] == "failed":
            raise InputError(cannot(f"load the fit of cell {one.key[:8]}", f"it failed: {one.row['error']}", "Choose another"))
        if one.folder is not None:
            return Fit.load(one.folder / "fit", family)
        with tempfile.TemporaryDirectory() as folder:
            for name, data in (one.files or {}).items():
                if name.startswith("fit/"):
                    write_whole(Path(folder) / name, data)
            return Fit.load(Path(folder) / "fit", family)

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """Read a study from its folder, also one that isn't finished.

        Raises:
            InputError: there is none.
            IntegrityError: a file isn't what was written.
        """
        path = Path(folder)
        config, ledger = read_config(path), Ledger(path)
        ledger.load()
        return cls(ordered(list(ledger.cells.values()), config), config, path)

    def _cell(self, cell: Stored | str | int) -> Stored:
        if isinstance(cell, Stored):
            return cell
        if isinstance(cell, int):
            if not -len(self.cells) <= cell < len(self.cells):
                raise InputError(cannot(f"find cell {cell}", f"there are {len(self.cells)}", "Give a number below that"))
            return self.cells[cell]
        found = [one for one in self.cells if one.key.startswith(cell)]
        if len(found) != 1:
            because = f"{len(found)} of {len(self.cells)} keys begin with it"
            raise InputError(cannot(f"find cell `{cell}`", because, "Give a key out of `table['cell']`"))
        return found[0]

    def __repr__(self) -> str:
        arms, cells = len(rows_by_arm([cell.row for cell in self.cells])), len(self.cells)
        return f"Study({arms} arm{'s' * (arms != 1)}, {cells:,} cells, {len(self.failed):,} failed; {self.verdict.outcome})"

    def __str__(self) -> str:
        """An arm a line: means over the seeds with their standard errors, and how many cells failed; at most 40 lines."""
        rows = self.rows
        judged = [name for need in self._needs if (name := need.stand_in(rows)) is not None]
        summary = [one.name for one in columns_in("summary") if any(row.get(one.name) is not None for row in rows)]
        shown = list(dict.fromkeys([*judged, *summary]))
        lines = [["", *shown, "failed"]]
        for j, name in enumerate(shown, 1):
            lines[0][j] = f"{name} {constants_of(rows, name)}".rstrip()
        for arm, mine in rows_by_arm(rows).items():
            bad = sum(row["status"] == "failed" for row in mine)
            lines.append([arm, *(mean_text(mine, name) for name in shown), f"{bad} of {len(mine)}"])
        said = [f"{arm} was dropped by the pilot after {count} seeds" for arm, count in self.dropped]
        said += [*self._bounds(), *self._failed_measures()]
        below = [line for one in said[:_MAX_NOTES] for line in wrapped(one)]
        parts = _parts(lines)
        most = max(_MIN_ARMS, (_MAX_LINES - len(below) - 1) // len(parts) - 1)
        text = [line for part in parts for line in part[: most + 1]]
        more = len(lines) - 1 - most
        return "\n".join([*text, *([f"… {more:,} more arms: `study.table` has all"] if more > 0 else []), *below])

    def _failed_measures(self) -> list[str]:
        """Return a line for each measure that raised, with the number of cells and the first reason."""
        reasons: dict[str, list[str]] = {}
        for cell in self.cells:
            for note in str(cell.row.get("notes") or "").split("; "):
                name, said, reason = note.partition(" wasn't measured (")
                if said:
                    reasons.setdefault(name, []).append(reason.removesuffix(")"))
        count = len(self.cells)
        return [f"{name} wasn't measured in {len(why)} of {count} cells: {why[0]}" for name, why in reasons.items()]


def _parts(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return an aligned table as lines; a table that is wider than a line is cut into several, each with the first column."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    groups: list[list[int]] = [[]]
    for j, width in enumerate(widths[1:], 1):
        if groups[-1] and widths[0] + sum(2 + widths[k] for k in groups[-1]) + 2 + width > WIDTH:
            groups.append([])
        groups[-1].append(j)
    shown = [[[line[k].ljust(widths[k]) for k in (0, *group)] for line in table] for group in groups]
    return [["  ".join(cells).rstrip() for cells in part] for part in shown]


def mean_text(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Write the mean of a column over the cells that have it, with its standard error over seeds."""
    found = mean_and_error(rows, name)
    if found is None:
        return "–"
    mean, error = found
    if not math.isfinite(mean):
        return "∞" if mean > 0 else str(mean)
    if name == COST.name:
        return f"{mean:,.0f}"
    return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.1g}"


def ordered(cells: list[Stored], config: dict[str, Any]) -> tuple[Stored, ...]:
    """Sort cells by seed, family and objective, as the study names them."""
    families, objectives, seeds = config["families"], config["objectives"], config["seeds"]

    def place(cell: Stored) -> tuple[int, int, int]:
        c = cell.config
        try:
            return seeds.index(c["seed"]), families.index(c["family"]), objectives.index(c["objective"])
        except ValueError as error:
            because = f"the cell {cell.key[:16]}… isn't one of this study: its seed, family or objective isn't"
            instead = "Move it away, or restore the study's own `study.json`"
            raise IntegrityError(cannot("trust this study", because, instead)) from error

    return tuple(sorted(cells, key=place))
