"""Origin file: what `whichkl convert` writes next to samples: their origin, and which column holds the weights of the rows."""

from __future__ import annotations

import json
from pathlib import Path

from whichkl._checks import IntegrityError, cannot, plain
from whichkl.files.writing import origin_file
from whichkl.targets.origin import Origin

_WEIGHTS = "weights"
"""The key of the column's name, next to the fields of the origin."""


def origin_bytes(origin: Origin, weights: str | None) -> bytes:
    """Return what an origin file holds.

    Args:
        origin: where the samples come from.
        weights: the name of their column of weights, if there is one.
    """
    return json.dumps(plain({**origin.to_dict(), _WEIGHTS: weights}), indent=1, ensure_ascii=False).encode() + b"\n"


def read_origin(samples: Path) -> tuple[Origin | None, str | None]:
    """Return the origin that was written next to a file of samples, and their column of weights; None for what there isn't.

    Raises:
        IntegrityError: the file isn't what was written.
    """
    path = origin_file(samples)
    if not path.is_file():
        return None, None
    try:
        fields = json.loads(path.read_text("utf-8"))
        fields |= {name: tuple(map(str, fields[name])) for name in ("assumed", "unknown", "left_out")}
        column = fields.pop(_WEIGHTS, None)
        return Origin(**fields), None if column is None else str(column)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(cannot(f"read `{path}`", "it isn't an origin that whichkl wrote", "Convert again")) from error
