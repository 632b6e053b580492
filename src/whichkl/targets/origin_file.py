"""Origin file: what `whichkl convert` writes next to samples: their origin, and which columns are weights and data x of pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from whichkl._checks import IntegrityError, cannot, plain
from whichkl.files.writing import origin_file
from whichkl.targets.origin import Origin

_WEIGHTS, _GIVEN = "weights", "given"
"""The keys of the columns' names, next to the fields of the origin."""


class Written(NamedTuple):
    """What is written next to a file of samples."""

    origin: Origin | None = None
    weights: str | None = None
    """The column of weights, if there is one."""
    given: tuple[str, ...] = ()
    """The columns of x, if the rows are pairs (x, y)."""


def origin_bytes(origin: Origin, weights: str | None, given: Sequence[str] = ()) -> bytes:
    """Return what an origin file holds.

    Args:
        origin: where the samples come from.
        weights: the name of their column of weights, if there is one.
        given: the names of their columns of x, if they are pairs (x, y).
    """
    fields = plain({**origin.to_dict(), _WEIGHTS: weights, **({_GIVEN: list(given)} if given else {})})
    return json.dumps(fields, indent=1, ensure_ascii=False).encode() + b"\n"


def read_origin(samples: Path) -> Written:
    """Return what was written next to a file of samples.

    Raises:
        IntegrityError: the file isn't what was written.
    """
    path = origin_file(samples)
    if not path.is_file():
        return Written()
    try:
        fields = json.loads(path.read_text("utf-8"))
        fields |= {name: tuple(map(str, fields[name])) for name in ("assumed", "unknown", "left_out")}
        column, given = fields.pop(_WEIGHTS, None), [*fields.pop(_GIVEN, [])]
        return Written(Origin(**fields), None if column is None else str(column), tuple(map(str, given)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(cannot(f"read `{path}`", "it isn't an origin that whichkl wrote", "Convert again")) from error
