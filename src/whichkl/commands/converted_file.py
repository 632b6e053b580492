"""Converted file: the samples of a converted target, with their weights, and its origin next to them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whichkl._checks import InputError, IntegrityError, cannot, plain, require
from whichkl.files.writing import refuse_existing, written_new

if TYPE_CHECKING:
    from whichkl.targets import Target
    from whichkl.targets.origin import Origin

_SUFFIXES = (".csv", ".parquet")
WEIGHT = "weight"
"""The name of the column of weights."""
_COLUMN = "weights"
"""The origin file's key for that name."""


def origin_file(samples: Path) -> Path:
    """Return the file of the origin of a file of samples.

    >>> origin_file(Path("out/weighted.csv")).as_posix()
    'out/weighted.csv.origin.json'
    """
    return samples.with_name(f"{samples.name}.origin.json")


def check_output(out: Path | None) -> None:
    """Refuse, before the work, a file that can't be written."""
    if out is None:
        return
    if out.suffix.lower() not in _SUFFIXES:
        because = f"its suffix is `{out.suffix}`"
        raise InputError(cannot(f"write samples to `{out}`", because, f"Use one of {', '.join(_SUFFIXES)}"))
    refuse_existing(out)
    refuse_existing(origin_file(out))


def write_converted(target: Target, out: Path | None) -> str:
    """Write a target's samples and its origin, and return the command that fits them."""
    if out is None or target.samples is None:
        return ""
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
        fields = {**origin.to_dict(), _COLUMN: None if target.weights is None else WEIGHT}
        stream.write(json.dumps(plain(fields), indent=1, ensure_ascii=False).encode() + b"\n")
    more = [*(["--weights", WEIGHT] if target.weights is not None else []), *(["--given", ",".join(given)] if given else [])]
    if given:
        words = target.bijection.describe()
        words = words * target.dim if len(words) == 1 else words
        for name, word in zip(target.names, words, strict=True):
            more += [] if word == "real" else ["--support", f"{name}={word}"]
    return shlex.join(["whichkl", "fit", str(out), *more, *(["--family", "flow"] if given else [])])


def own_weights(samples: Path) -> str | None:
    """Return the column of weights of a file that `write_converted` wrote; None if it has none, or isn't such a file."""
    path = origin_file(samples)
    try:
        column = json.loads(path.read_text("utf-8")).get(_COLUMN)
    except (OSError, ValueError, AttributeError):  # `read_origin` refuses a damaged file
        return None
    return None if column is None else str(column)


def read_origin(samples: Path) -> Origin | None:
    """Return the origin that was written next to a file of samples; None if there is none.

    Raises:
        IntegrityError: the file isn't what was written.
    """
    from whichkl.targets.origin import Origin

    path = origin_file(samples)
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text("utf-8"))
        fields |= {name: tuple(map(str, fields[name])) for name in ("assumed", "unknown", "left_out")}
        fields.pop(_COLUMN, None)
        return Origin(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(cannot(f"read `{path}`", "it isn't an origin that whichkl wrote", "Convert again")) from error
