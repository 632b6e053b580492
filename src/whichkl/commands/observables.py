"""Observables: a text such as `x1, x1^2, x1*x2` → columns of numbers; nothing in the text is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from whichkl._checks import InputError, cannot, quoted

if TYPE_CHECKING:
    import numpy as np

_POWER = re.compile(r"(.+?)\s*(?:\^|\*\*)\s*(\d+)")


def observables(texts: Sequence[str], values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the products of powers of columns that texts name, (n, k).

    Args:
        texts: one per observable: names of columns, each with a power of a whole number, joined by ``*``.
        values: the columns, (n, d).
        names: their d names; a text that is a name stands for its column, whatever characters are in it.

    Raises:
        InputError: a text names no column.

    >>> import numpy as np
    >>> observables(["a", "a^2*b"], np.array([[2.0, 5.0]]), ["a", "b"]).tolist()
    [[2.0, 20.0]]
    """
    import numpy as np

    return np.stack([_one(text, values, names) for text in texts], 1)


def _one(text: str, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    found = values[:, :1].ravel() * 0 + 1
    for part in [text] if text in names else re.split(r"(?<!\*)\*(?!\*)", text):
        name, power = part.strip(), 1
        if name not in names and (match := _POWER.fullmatch(name)):
            name, power = match[1], int(match[2])
        if name not in names:
            because = f"there is no column `{name}`, but {quoted(names)}"
            instead = "Write products of powers of columns, such as 'x1, x1^2, x1*x2', or FILE.py:FUNCTION"
            raise InputError(cannot(f"read the observable `{text}`", because, instead))
        found = found * values[:, list(names).index(name)] ** power
    return found
