"""Checks: the errors, the grammar of their messages, and the checks of shape and finiteness that every room uses.

Nothing here imports torch, so that the command line can name an error before torch is loaded.
"""

from __future__ import annotations

import importlib
import math
import re
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_MAX_QUOTED = 160
"""Largest number of characters of a quoted value that a message shows in full; most paths are shorter."""
_MAX_COLUMNS_SHOWN, _MAX_ROWS_SHOWN = 20, 3
"""Largest numbers of columns, and of rows per column, that a message about their cells names."""
_QUOTED = re.compile("`([^`]*)`")
LARGEST = 1e145
"""Largest size of a number in a column, and inverse of the smallest width: float64 can sum the squares of 10¹⁸ such rows."""
_MAX_ROWS_FOR_QUICK_CHECK = 1_000
"""Number of first rows whose range usually shows that a column varies enough."""


class WhichklError(ValueError):
    """Base of every error that whichkl raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(WhichklError):
    """Samples, a file or an argument can't be used (exit code 2)."""

    exit_code = 2


class RowError(InputError):
    """One row of samples can't be used; its message names it as "row 7", which counts from 0."""

    row = 0

    def at(self, place: str) -> InputError:
        """Return the same error with another name of the row, such as the line of a file."""
        return InputError(str(self).replace(f"row {self.row}", place, 1))


class TargetError(WhichklError):
    """The target can't do what is requested, or its log density is broken (exit code 3)."""

    exit_code = 3


class NotANumberError(TargetError):
    """A log density is NaN somewhere; this is harmless where p has no mass, for example where an integrator diverges."""


class DeadDensityError(TargetError):
    """A log density gives no number any more, not even where it once did, so that no search treats this as a bad point."""


class ResourceError(WhichklError):
    """Disk, memory or permission is missing (exit code 4)."""

    exit_code = 4


class IntegrityError(WhichklError):
    """A stored result isn't what was written (exit code 5)."""

    exit_code = 5


def cannot(do: str, because: str, instead: str) -> str:
    """Return an error message: what can't be done, why, and what to do.

    >>> cannot("use `ReverseKL` with this target", "it has only samples", "Use `ForwardKL`, or pass `log_prob=`")
    'Cannot use `ReverseKL` with this target: it has only samples. Use `ForwardKL`, or pass `log_prob=`.'
    """
    return _QUOTED.sub(_shortened, f"Cannot {do}: {because}. {instead}.")


def _shortened(quoted: re.Match[str]) -> str:
    """Shorten a quoted value to one line: values from files have any length and any characters."""
    text = quoted[1] if quoted[1].isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in quoted[1])
    return f"`{text}`" if len(text) <= _MAX_QUOTED else f"`{text[: _MAX_QUOTED // 2]} … {text[-_MAX_QUOTED // 4 :]}`"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or raise an `InputError` that says which extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise InputError(missing_extra(module, extra)) from error


def missing_extra(module: str, extra: str) -> str:
    """Return the sentence that names the install line for the packages of an extra; it needs no release of this library."""
    name = module.split(".")[0]
    try:
        needed = requires("whichkl") or []
    except PackageNotFoundError:
        needed = []
    packages = [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in needed if re.search(rf"extra == ['\"]{extra}['\"]", one)]
    line = " ".join(packages) or f"'.[{extra}]'"
    return cannot(f"import `{name}`", f"it comes with the `{extra}` extra", f"Run: pip install {line}")


def as_int(value: Any) -> Any:
    """Return a whole number of NumPy, or of an array or tensor without axes, as an int; anything else unchanged.

    >>> import numpy as np
    >>> as_int(np.int64(3)), as_int(2.0), as_int(True)
    (3, 2.0, True)
    """
    kind = _kind(value)
    if isinstance(value, int) or kind not in ("i", "u"):
        return value
    return int(value)


def as_number(value: Any) -> Any:
    """Return a real number of NumPy, or of an array or tensor without axes, as an int or a float; anything else unchanged.

    >>> import numpy as np
    >>> as_number(np.float32(0.5)), as_number(np.array(2)), as_number("2")
    (0.5, 2, '2')
    """
    if _kind(value) != "f" or isinstance(value, float):
        return as_int(value)
    return float(value.detach() if hasattr(value, "detach") else value)  # a tensor that is learnt warns when it is read


def _kind(value: Any) -> str:
    """Return NumPy's letter for the type of a scalar; ``""`` for what has axes, or no such type."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(value, type) or getattr(value, "ndim", 1) != 0:
        return ""
    if (kind := getattr(dtype, "kind", None)) is not None:
        return str(kind)
    name = str(dtype).removeprefix("torch.")
    return "f" if dtype.is_floating_point else name[0] if name.startswith(("int", "uint")) else ""


def check_seed(seed: Any, below: int = 2**63) -> int:
    """Return a seed as an int; refuse anything but a whole number of at least 0."""
    number = as_int(seed)
    is_whole = isinstance(number, int) and not isinstance(number, bool) and number >= 0
    if not is_whole or number >= below:
        because = f"seeds are below {below:,}" if is_whole else "it isn't a whole number of at least 0"
        raise InputError(cannot(f"use `seed={seed!r}`", because, "Give, say, seed=0"))
    return int(number)


def quoted(names: Sequence[str], most: int = 20) -> str:
    """Return the first names in backquotes, for a message.

    >>> quoted(["a", "b", "c"], 2)
    '`a`, `b`, …'
    """
    return ", ".join(f"`{name}`" for name in names[:most]) + (", …" if len(names) > most else "")


def check_finite(
    x: Tensor, names: Sequence[str], what: str = "samples", instead: str = "Drop or repair those rows first"
) -> None:
    """Refuse NaN and infinities in an (n, d) matrix, with the count and the first rows of each column that has any."""
    if math.isfinite(x.sum().item()):  # fast: a sum over NaN or an infinity is never finite
        return
    bad = (~x.isfinite()).nonzero()
    if len(bad) == 0:  # finite numbers can have an infinite sum
        return
    columns = bad[:, 1].unique().tolist()
    cells = ", ".join(_cells(names[column], bad[bad[:, 1] == column, 0].tolist()) for column in columns[:_MAX_COLUMNS_SHOWN])
    cells += ", …" if len(columns) > _MAX_COLUMNS_SHOWN else ""
    rows = f"in {len(bad[:, 0].unique())} of {len(x)} rows"
    count = f"1 cell {rows} is" if len(bad) == 1 else f"{len(bad)} cells {rows} are"
    raise InputError(cannot(f"use these {what}", f"{count} NaN or infinite: {cells}", instead))


def _cells(name: str, rows: list[int]) -> str:
    """Name the rows of a column, which count from 0."""
    if len(rows) == 1:
        return f"`{name}` in row {rows[0]}"
    shown = ", ".join(map(str, rows[:_MAX_ROWS_SHOWN])) + (", …" if len(rows) > _MAX_ROWS_SHOWN else "")
    return f"`{name}` in {len(rows)} rows ({shown})"


def check_scales(x: Tensor, names: Sequence[str], what: str = "samples") -> None:
    """Refuse columns of an (n, d) matrix whose squares, or sums of squares, would be infinite, 0 or NaN in float64."""
    x = x.detach()
    few, ends = x[:_MAX_ROWS_FOR_QUICK_CHECK], [float(end) for end in x.aminmax()]
    if max(-ends[0], ends[1]) <= LARGEST and float((few.amax(0) - few.amin(0)).amin()) >= 1 / LARGEST:
        return  # the usual case, ten times as fast as what follows
    low, high = x.amin(0).double(), x.amax(0).double()
    size, width = high.abs().maximum(low.abs()), high - low
    wrong = (size > LARGEST) | ((width > 0) & (width < 1 / LARGEST))
    if not bool(wrong.any()):
        return
    i = int(wrong.int().argmax())
    unit = float(size[i])
    because = f"column `{names[i]}` reaches {unit:.3g}, and numbers that are squared must stay below {LARGEST:g}"
    if unit <= LARGEST:
        unit = float(width[i])
        because = f"column `{names[i]}` varies by {unit:.3g} in total, and squares vanish below {1 / LARGEST:g}"
    instead = f"Divide that column by {unit:.0e}, and subtract the log of it, {math.log(unit):.5g}, from log densities"
    raise InputError(cannot(f"use these {what}", because, instead))


def one_per_row(value: Tensor, x: Tensor, who: str = "log_prob") -> Tensor:
    """Return a batch of log densities as (n,), where it is a column, (n, 1), or a number, (), for one row.

    Raises:
        TargetError: it has any other shape.
    """
    n = len(x)
    if tuple(value.shape) == (n,):
        return value
    if tuple(value.shape) == (n, 1) or (n == 1 and value.ndim == 0):
        return value.reshape(n)
    because = f"`{who}` returned shape {tuple(value.shape)} for {n} points of dimension {x.shape[-1]}, not ({n},)"
    hint = "Return one log density per row (sum over the last axis), or pass `batched=False` for a function of one point"
    raise TargetError(cannot("use this target", because, hint))


def check_log_prob(value: Tensor, x: Tensor, who: str = "log_prob", raised: str = "") -> Tensor:
    """Return a batch of log densities if it has shape (n,) and neither NaN nor +inf in it.

    `raised` is what the function raised at some points, which count as NaN.

    Raises:
        NotANumberError: values are NaN, and none is +inf (the first such point is named).
        TargetError: the shape is wrong, or a value is +inf (likewise).
    """
    n, value = len(x), one_per_row(value, x, who)
    wrong = value.isnan() | (value == float("inf"))
    if bool(wrong.any()):
        first = x[wrong][0]
        shown = ", ".join(f"{v:.4g}" for v in first[:8].tolist()) + (", …" if len(first) > 8 else "")
        kind = "NaN" if bool(value[wrong][0].isnan()) else "+inf"
        because = f"`{who}` is {kind} at {int(wrong.sum())} of {n} points, first at ({shown})"
        because += f"; at such a point {raised}" if raised and kind == "NaN" else ""
        error = NotANumberError if bool(value[wrong].isnan().all()) else TargetError
        instead = "Return a number, or -inf where the density is zero; where x is bounded, pass `support=`"
        raise error(cannot("use this target", because, instead))
    return value


def plain(value: Any) -> Any:
    """Write infinities and NaN in nested dicts and lists as text, since JSON has neither."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
