"""Simulation table: a file with parameters and the data made of them, in which rows with missing data are failed simulations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from whichkl._checks import InputError, cannot
from whichkl.commands.options import read_table


@dataclass(frozen=True)
class SimulationTable:
    """The columns of a table, a row per simulation."""

    theta: Float[np.ndarray, "n d"]
    data: Float[np.ndarray, "n c"]
    """NaN in the rows of failed simulations."""
    data_names: tuple[str, ...]
    log_densities: Float[np.ndarray, " n"]
    """Those with which the parameters were drawn; no column of the file, if there is none."""


def read_simulations(
    path: Path, parameters: Iterable[str], proposal: str | None, missing: str = "refuse", **reading: Any
) -> SimulationTable:
    """Read parameters, which must be there, and data, which may be missing.

    Args:
        path: the file.
        parameters: the names of their columns.
        proposal: the column of its log densities, if there is one.
        missing: what to do with missing parameters.
        reading: `columns` and `drop`.

    Raises:
        InputError: a column isn't there, or has a cell that isn't a number.
    """
    whole = read_table(path, missing="drop", **reading)
    known = [*parameters, *([] if proposal is None else [proposal])]
    if proposal is not None and known.count(proposal) > 1:
        because = f"the column `{proposal}` is a parameter, and its law has the form LAW(NUMBERS)"
        instead = f"Write, say, `--proposal '{proposal}=Normal(0,2)'`, or name the column of the log densities"
        raise InputError(cannot(f"use `--proposal {proposal}`", because, instead))
    names = tuple(name for name in whole.names if name not in known)
    if (absent := [name for name in known if name not in whole.names]) or not names:
        because = f"there is no column `{absent[0]}`" if absent else "no column is left for the data"
        raise InputError(cannot("read these simulations", because, f"The columns are {', '.join(whole.names)}"))
    given = read_table(path, columns=known, missing=missing)
    rows = np.arange(len(given.values)) if given.numbers is None else given.numbers
    finished = np.arange(len(whole.values)) if whole.numbers is None else whole.numbers
    data = np.full((len(given.values), len(names)), np.nan)
    data[np.searchsorted(rows, finished)] = whole.values[:, [whole.names.index(name) for name in names]]
    is_parameter = [name != proposal for name in known]
    theta, others = given.values[:, is_parameter], given.values[:, np.logical_not(is_parameter)]
    return SimulationTable(theta, data, names, np.zeros(0) if proposal is None else others[:, 0])
