"""Arrays: samples, pairs, weights and column names are read from tensors, arrays and DataFrames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date, timedelta
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, check_finite, quoted
from whichkl.process.torch_modes import normal

_INSTEAD = {
    "V": "Give one column of numbers per field",
    "c": "Give real and imaginary parts as columns",
    "M": "Give times as numbers, such as days since the first",
    "m": "Give times as numbers, such as seconds",
    "O": "Drop these rows, or put numbers there",
    "S": "Drop the text, or encode it as numbers",
    "U": "Drop the text, or encode it as numbers",
}
"""What to do with arrays that hold no numbers, by the kind of their dtype."""


def tensor_of(values: Any) -> Tensor:
    """Return a tensor unchanged; an array, or numbers, as a tensor on the CPU of the type that NumPy gives them.

    Raises:
        InputError: it holds anything but numbers.

    >>> tensor_of([1.0, 2.0])
    tensor([1., 2.], dtype=torch.float64)
    """
    _check_dense(values, "read numbers")
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        return torch.from_numpy(array if array.flags.writeable else array.copy())  # pandas gives views that can't be written
    except (TypeError, ValueError, RuntimeError) as error:
        because = f"a `{type(values).__name__}` holds something else"
        raise InputError(cannot("read numbers", because, "Give a tensor or an array of numbers")) from error


_LARGEST_WHOLE = 2**53
"""Largest integer up to which float64 holds every integer."""
_SAFETY_FACTOR = 10.0
"""Samples stay below the square root of the largest number of their precision, divided by this factor."""


def read_matrix(
    values: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None, what: str = "samples"
) -> Float[Tensor, "n d"]:
    """Return samples as a floating-point (n, d) tensor; other numbers become float64.

    Raises:
        InputError: they hold anything but real numbers, or their shape is neither (n,) nor (n, d).
    """
    do = f"use these {what}"
    if isinstance(values, type):
        raise InputError(cannot(do, f"`{values.__name__}` is a class", "Give an array of numbers, not its class"))
    if hasattr(values, "select_dtypes"):
        text = values.columns.difference(numeric_columns(values).columns)
        if len(text):
            raise InputError(cannot(do, f"column {quoted(text, len(text))} isn't numeric", "Drop or encode it"))
        check_whole(values.select_dtypes("integer").to_numpy(), what)
        values = values.to_numpy(dtype=np.float64)
    if not isinstance(values, Tensor) and np.ma.is_masked(values):  # NumPy loads `ma` when it is first asked for
        because = f"{int(np.ma.count_masked(values)):,} of their numbers are masked"
        raise InputError(cannot(do, because, "Drop these rows, or fill in the numbers"))
    _check_dense(values, do)
    if not isinstance(values, Tensor):
        array = _array_of(values, do)
        check_whole(array, what)
        values = torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype == np.float32 else np.float64))
    elif not values.is_floating_point() and not values.is_complex():
        check_whole(values.detach().cpu().numpy(), what)
    if values.is_complex():
        raise InputError(cannot(do, "they are complex", "Give real and imaginary parts as columns"))
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        because = f"they have shape {tuple(values.shape)}, not (n, d)"
        raise InputError(cannot(do, because, _as_rows(tuple(values.shape)) if what == "samples" else "Give one row per draw"))
    wide = values.dtype if values.dtype in (torch.float32, torch.float64) else torch.float64
    x: Tensor = normal(values.detach()).to(device=device, dtype=dtype or wide)
    return x


def _as_rows(shape: tuple[int, ...]) -> str:
    """Return how samples of another shape become rows: chains, the shorter axis of (chains, draws, d) first, or events."""
    if len(shape) < 2:
        return "Give one row per draw"
    rows = "one row per draw, `x.reshape(len(x), -1)`"
    if len(shape) > 3:
        return f"Give {rows}"
    is_stacked = shape[0] < shape[1]
    chains, x = (shape[0], "x") if is_stacked else (shape[1], "x.swapaxes(0, 1)")
    as_chains = f"Target(samples={x}.reshape(-1, {shape[2]}), chains={chains})"
    return f"If they are {chains} Markov chains, pass `{as_chains}`, else {rows}"


def or_transposed(rows: int, columns: int) -> str:
    """Return what else to try where an array has fewer rows than columns, as the end of a sentence.

    >>> or_transposed(3, 10_000), or_transposed(10_000, 3)
    (', or `x.T` if its columns are the draws', '')
    """
    return ", or `x.T` if its columns are the draws" if 1 < rows < columns else ""


def _check_dense(values: Any, do: str) -> None:
    """Refuse a sparse tensor, and one that holds no numbers."""
    if isinstance(values, Tensor) and (values.layout != torch.strided or values.device.type == "meta"):
        because = "the tensor is sparse" if values.layout != torch.strided else "a tensor on the meta device holds no numbers"
        raise InputError(cannot(do, because, "Give a dense tensor with numbers, such as `x.to_dense()`"))


def numeric_columns(frame: Any) -> Any:
    """Return the columns of a DataFrame that hold real numbers; pandas counts complex ones and time differences, too."""
    return frame.select_dtypes(["number", "bool"], exclude=["timedelta", "complexfloating"])


def _array_of(values: Any, do: str) -> np.ndarray:
    """Return an array of real numbers; refuse anything else, with what it holds."""
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O" and getattr(getattr(values, "dtype", None), "kind", "O") in "biuf":
            array = values.to_numpy(dtype=np.float64, na_value=np.nan)  # a column of pandas with missing cells
    except (TypeError, ValueError, RuntimeError) as error:
        because, instead = "their rows have different lengths", "Give one row of d numbers per draw"
        if not isinstance(values, (list, tuple)):
            because, instead = f"a `{type(values).__name__}` can't be read as an array", "Give a tensor or an array of numbers"
        elif any(np.ndim(one) > 1 for one in values):
            instead = "For pairs of x and y, give a tuple (x, y), or else one array"
        raise InputError(cannot(do, because, instead)) from error
    if array.dtype.kind in "biuf":
        return array
    because, instead = f"their type is `{array.dtype}`, not a number", _INSTEAD.get(array.dtype.kind, _INSTEAD["U"])
    if array.dtype.kind == "O" and array.ndim == 0:
        because, instead = f"a `{type(values).__name__}` is no array of numbers", "Give a tensor, an array or a DataFrame"
    elif array.dtype.kind == "O":
        because, instead = _first_object(array)
    raise InputError(cannot(do, because, instead))


def _first_object(array: np.ndarray) -> tuple[str, str]:
    """Return why an array of objects can't be read, by its first cell that isn't a number, and what to do."""
    for place, cell in np.ndenumerate(array):
        kind = "M" if isinstance(cell, date) else "m" if isinstance(cell, timedelta) else np.asarray(cell).dtype.kind
        if not isinstance(cell, (Real, Decimal)) or kind == "m":
            instead = _INSTEAD.get(kind, _INSTEAD["O"])
            return f"row {place[0]} holds a `{type(cell).__name__}`, {cell!r:.40}, not a number", instead
    return "they are objects, not numbers of one type", "Convert them by `np.array(x, dtype=float)`"


def check_tensor_options(dtype: Any, device: Any) -> None:
    """Refuse a `dtype` that isn't one of torch's floating types, and a `device` that torch can't use here."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        because = "it isn't one of torch's floating types"
        raise InputError(cannot(f"use `dtype={dtype!r}`", because, "Give torch.float64 or torch.float32"))
    try:
        torch.empty(0, dtype=torch.float64 if dtype is None else dtype, device=device)
    except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        because = f"torch refuses it: {str(error).splitlines()[0][:160]}"
        raise InputError(cannot(f"use `device={device!r}`", because, "Leave it out, for the CPU")) from error


def check_whole(values: np.ndarray, what: str) -> None:
    """Refuse integers that float64 can't hold, which would lose their last digits."""
    if values.dtype.kind not in "iu" or values.size == 0:
        return
    if max(abs(int(values.min())), abs(int(values.max()))) <= _LARGEST_WHOLE:
        return
    with np.errstate(all="ignore"):
        lost = values != values.astype(np.float64).astype(values.dtype)
    if lost.any():
        because = f"they hold integers that float64 can't hold, such as {values[lost].flat[0]}"
        raise InputError(cannot(f"use these {what}", because, "Subtract an offset from them first"))


def widened(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return samples in float64 if their squares would overflow or vanish in their own precision, else unchanged.

    >>> [widened(torch.tensor([[0.0], [size]])).dtype for size in (1.0, 1e30, 1e-30)]
    [torch.float32, torch.float64, torch.float64]
    """
    if x.dtype == torch.float64 or x.numel() == 0:
        return x
    low, high = x.amin(0), x.amax(0)
    size, width = high.abs().maximum(low.abs()), high - low
    most = math.sqrt(torch.finfo(x.dtype).max) / _SAFETY_FACTOR
    return x.double() if bool(((size > most) | ((width > 0) & (width < 1 / most))).any()) else x


def read_context(x: Any, columns: int, like: Tensor) -> Float[Tensor, "n c"]:
    """Return the x that a model of y given x is called with as a tensor of the dtype and device of the model's weights.

    Args:
        x: a tensor, an array or a DataFrame, (n, c); one column may be (n,).
        columns: the number of columns that the model was fitted on.
        like: one of its weights.

    Raises:
        InputError: they aren't (n, c) finite numbers.
    """
    rows = x.to(like) if isinstance(x, Tensor) and not x.is_complex() else read_matrix(x, what="x").to(like)
    if rows.ndim == 1 and columns == 1:
        rows = rows[:, None]
    if rows.ndim != 2 or rows.shape[1] != columns:
        because = f"they have shape {tuple(rows.shape)}, and the model was fitted on {columns} column{'s' * (columns != 1)}"
        raise InputError(cannot("predict at these x", because, f"Give (n, {columns}) rows"))
    check_finite(rows.detach(), default_names(columns), "x")
    return rows


def read_names(names: Sequence[str] | None, samples: Any, dim: int, *, is_response: bool = False) -> tuple[str, ...]:
    """Return the names of d columns: those given, those of a DataFrame or a Series, else the default ones.

    Raises:
        InputError: they aren't d different names.
    """
    if names is None and hasattr(samples, "select_dtypes"):
        names = [str(column) for column in samples.columns]
    if names is None and hasattr(samples, "to_numpy") and isinstance(getattr(samples, "name", None), str):
        names = [str(samples.name)]
    if names is None:
        return default_names(dim, "y" if is_response else "x")
    if len(names) != dim or len(set(names)) != dim:
        twice = sorted({str(name) for name in names if list(names).count(name) > 1})
        because = f"`{twice[0]}` appears twice" if twice else f"the names given are {len(names)}, and the coordinates {dim}"
        raise InputError(cannot("use these `names`", because, "Give each coordinate its own name"))
    return tuple(str(name) for name in names)


def default_names(dim: int, letter: str = "x") -> tuple[str, ...]:
    """Return x1, x2, …; for y given x the names y1, y2, …, or y for one column.

    >>> default_names(2), default_names(1, "y")
    (('x1', 'x2'), ('y',))
    """
    return ("y",) if letter == "y" and dim == 1 else tuple(f"{letter}{i + 1}" for i in range(dim))


def _within_reach(w: Tensor) -> Tensor:
    """Divide weights by the largest if their sums would overflow or vanish in single precision."""
    most = float(w.double().abs().max()) if w.numel() else 1.0
    is_usual = not math.isfinite(most) or most == 0 or 1e-20 < most < 1e20
    return w if is_usual else w.double() / most


def read_weights(weights: Any, samples: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return the weights of n rows as a tensor of the rows' dtype and device.

    Raises:
        InputError: they aren't (n,) finite, non-negative numbers with a positive sum.
    """
    do = "use these `weights`"
    wanted = f"they must be ({len(samples)},) finite, non-negative numbers with a positive sum"
    w = _within_reach(_one_per_row(weights, len(samples), do, wanted)).to(samples)
    if not bool(w.isfinite().all()) or bool((w < 0).any()) or float(w.sum()) <= 0:
        bad = (~w.isfinite() | (w < 0)).nonzero()[:5, 0].tolist()
        found = f"rows {', '.join(map(str, bad))} don't" if bad else "all are 0"
        instead = "Correct them, or pass logarithms as `log_weights=`" if bool((w < 0).any()) else "Correct them"
        raise InputError(cannot(do, f"{wanted}, and {found}", instead))
    return w


def read_log_weights(log_weights: Any, samples: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return the weights of n rows, the largest of them 1, from their natural logs up to one constant.

    Raises:
        InputError: they aren't (n,) numbers or −inf, or all are −inf.

    >>> read_log_weights([1000.0, -math.inf, 1000.0], torch.zeros(3, 1))
    tensor([1., 0., 1.])
    """
    do = "use these `log_weights`"
    wanted = f"they must be ({len(samples)},) numbers, or -inf for a weight of 0"
    logs = _one_per_row(log_weights, len(samples), do, wanted).to(samples.device, torch.float64)
    bad = (logs.isnan() | (logs == math.inf)).nonzero()[:5, 0].tolist()
    if bad or not bool(logs.isfinite().any()):
        found = f"rows {', '.join(map(str, bad))} aren't" if bad else "all are -inf"
        raise InputError(cannot(do, f"{wanted}, and {found}", "Correct them"))
    return (logs - logs.max()).exp().to(samples.dtype)


def _one_per_row(values: Any, n: int, do: str, wanted: str) -> Tensor:
    instead = "Give one number per row of `samples`"
    try:
        given = tensor_of(values)
    except (TypeError, ValueError) as error:
        because = f"{wanted}, and they are a `{type(values).__name__}`, not numbers"
        raise InputError(cannot(do, because, instead)) from error
    if given.is_complex():
        because = f"{wanted}, and they are complex, of shape {tuple(given.shape)}"
        raise InputError(cannot(do, because, "Give one real number per row of `samples`"))
    if tuple(given.shape) != (n,):
        raise InputError(cannot(do, f"{wanted}, and their shape is {tuple(given.shape)}", instead))
    return normal(given.detach())
