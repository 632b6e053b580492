"""Converted file: the samples of a converted target, with their weights, and its origin next to them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from whichkl._checks import InputError, cannot, require
from whichkl.files.writing import origin_file, refuse_existing, written_new

if TYPE_CHECKING:
    from whichkl.targets import Target

_SUFFIXES = (".csv", ".parquet")
WEIGHT = "weight"
"""The name of the column of weights."""


def check_output(out: Path | None) -> None:
    """Refuse, before the work, a file that can't be written."""
    if out is None:
        return
    if out.suffix.lower() not in _SUFFIXES:
        because = f"its suffix is `{out.suffix}`"
        raise InputError(cannot(f"write samples to `{out}`", because, f"Use one of {', '.join(_SUFFIXES)}"))
    refuse_existing(out)
    refuse_existing(origin_file(out))


class Written(NamedTuple):
    """What a file of converted samples holds, and the command that fits them."""

    columns: tuple[str, ...]
    following: str


def write_converted(target: Target, out: Path | None) -> Written | None:
    """Write a target's samples and its origin; None if there is nothing to write."""
    from whichkl.targets.origin_file import origin_bytes

    if out is None or target.samples is None:
        return None
    columns: dict[str, Any] = dict(zip(target.names, target.samples.double().cpu().numpy().T, strict=True))
    given = [] if target.context is None else list(target.context_names)
    if target.context is not None:
        columns = dict(zip(given, target.context.double().cpu().numpy().T, strict=True)) | columns
    if target.weights is not None:
        if WEIGHT in columns:
            because = f"a column of the samples has the name `{WEIGHT}`"
            raise InputError(cannot("write weights next to the samples", because, "Rename that column"))
        columns[WEIGHT] = target.weights.double().cpu().numpy()
    arrow = require("pyarrow", "app")
    table = arrow.table(columns)
    with written_new(out) as stream:
        if out.suffix.lower() == ".csv":
            require("pyarrow.csv", "app").write_csv(table, stream)
        else:
            require("pyarrow.parquet", "app").write_table(table, stream)
    origin: Any = target.origin
    with written_new(origin_file(out)) as stream:
        stream.write(origin_bytes(origin, None if target.weights is None else WEIGHT, given))
    more = [*(["--weights", WEIGHT] if target.weights is not None else []), *(["--given", ",".join(given)] if given else [])]
    if given:
        words = target.bijection.describe()
        words = words * target.dim if len(words) == 1 else words
        for name, word in zip(target.names, words, strict=True):
            more += [] if word == "real" else ["--support", f"{name}={word}"]
    following = ["whichkl", "fit", str(out), *more, *(["--family", "flow"] if given else [])]
    return Written(tuple(columns), shlex.join(following))
