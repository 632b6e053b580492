"""Row weights: which column of a table holds the weights of its rows, so that it isn't data; and those of x by an origin file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from whichkl._checks import InputError, cannot
from whichkl.files.writing import origin_file
from whichkl.samples import Reading, Table, TableError, open_samples
from whichkl.samples.table import as_frame, is_frame
from whichkl.targets.origin import Origin
from whichkl.targets.origin_file import Written, read_origin
from whichkl.targets.rows import table_in_memory

_SOUNDS_LIKE_WEIGHTS = re.compile(r"(?:(log|sample|importance|survey|case|row)[ _.-]?)?weights?", re.IGNORECASE)


class RowWeights(NamedTuple):
    """The weights of samples, or their logs, how the other columns of their table are read, and which of them are x."""

    weights: Any
    log_weights: Any
    reading: Reading
    origin: Origin | None = None
    """That of a file which `whichkl convert` wrote."""
    given: Any = None
    """The columns of x that were given, or else those that such a file has."""

    @classmethod
    def of(
        cls, samples: Any, names: Sequence[str] | None, weights: Any, log_weights: Any, reading: Reading, given: Any
    ) -> RowWeights:
        """Read the column of weights that was named, or else the one that the origin of a file names; find those of x likewise.

        Raises:
            InputError: there is no such column, it is named as data, or the rows aren't in memory.
            IntegrityError: the origin of the file is damaged.
        """
        origin, own, x = _written_next_to(samples)
        x = tuple(name for name in x if name not in reading.drop and (reading.columns is None or name in reading.columns))
        x = () if reading.columns is not None and set(reading.columns) <= set(x) else x
        given = (x or None) if given is None else given
        if own is not None and own in reading.drop:  # then the rows aren't draws of what the origin describes
            origin, own = None, None
        found = cls(weights, log_weights, reading, origin, given)
        if isinstance(log_weights, str):
            found = found._taking(samples, names, log_weights, is_log=True)
        if isinstance(weights, str):
            found = found._taking(samples, names, weights)
        if own is None or own in found.reading.drop:
            return found
        if weights is None and log_weights is None:
            return found._taking(samples, names, own, said_by=origin_file(Path(samples)))
        return found._without(own)

    def _taking(
        self, samples: Any, names: Sequence[str] | None, column: str, *, is_log: bool = False, said_by: Path | None = None
    ) -> RowWeights:
        """Return these with the values of a column, which isn't data any more."""
        name = "log_weights" if is_log else "weights"
        do = f"use `{name}={column!r}`" if said_by is None else f"use the weights of `{samples}`"
        values = _column(samples, names, column, self.reading.thousands, do, said_by)
        return self._without(column)._replace(**{name: values})

    def _without(self, column: str) -> RowWeights:
        if self.reading.columns is None:
            return self._replace(reading=replace(self.reading, drop=(*self.reading.drop, column)))
        if column in self.reading.columns:
            because = "it holds the weights of the rows"
            raise InputError(cannot(f"use the column `{column}` as data", because, "Leave it out of `columns=`"))
        return self


def doubtful_columns(names: Sequence[str]) -> tuple[str, ...]:
    """Return a note for each column of data that sounds like weights of the rows.

    >>> doubtful_columns(["height", "weight"])[0].partition(" If")[0]
    'the column `weight` is data here.'
    """
    sounding = [name for name in names if len(names) > 1 and _SOUNDS_LIKE_WEIGHTS.fullmatch(name)]
    call = "`Target(samples=…, {}={!r})`"
    return tuple(
        f"the column `{name}` is data here. If it holds the weights of the rows, pass "
        f"{call.format('log_' * name.lower().startswith('log') + 'weights', name)}; if it is neither, {call.format('drop', name)}"
        for name in sounding
    )


def _written_next_to(samples: Any) -> Written:
    if not isinstance(samples, (str, os.PathLike)) or not os.path.isfile(samples):
        return Written()
    return read_origin(Path(samples))


def _column(samples: Any, names: Sequence[str] | None, column: str, thousands: str, do: str, said_by: Path | None) -> Any:
    """Return the values of a column of a file, a DataFrame or an array with names.

    Raises:
        InputError: there is none, it lacks a number, or the rows are read in parts.
    """
    is_path = isinstance(samples, (str, os.PathLike))
    if is_path and os.path.isdir(samples):
        because = "a folder is read in parts, and weights need all rows in memory"
        raise InputError(cannot(do, because, "Name one file"))
    samples = as_frame(samples)
    if isinstance(samples, tuple) or not (is_path or is_frame(samples) or names is not None):
        because = "the samples are neither a file nor a DataFrame, whose columns have names"
        raise InputError(cannot(do, because, "Give one number per row"))
    one = Reading(columns=(column,), thousands=thousands)
    try:
        found = open_samples(samples, is_whole=True, reading=one)
        found = table_in_memory(samples, names, one) if found is None else found
    except TableError as error:
        raise InputError(cannot(do, error.because, "Write one number per row")) from error
    except InputError as error:
        if said_by is None:
            raise
        because = f"`{said_by}` says that they are in the column `{column}`, which can't be read"
        instead = "Convert again, or remove that file if it belongs to other samples"
        raise InputError(cannot(do, because, instead)) from error
    if not isinstance(found, Table):
        because = "these samples are read in parts, and weights need all rows in memory"
        raise InputError(cannot(do, because, "Give one file or DataFrame"))
    return found.values[:, 0]
