"""Rows: what `Target` gets as samples (arrays, pairs, files, streams), brought to tensors or to a stream, with its names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import IterableDataset

from whichkl._checks import InputError, as_int, cannot, check_finite, quoted
from whichkl.arrays import default_names, read_log_weights, read_matrix, read_names, read_weights, tensor_of, widened
from whichkl.chains import chain_ids
from whichkl.process.seeds import seeded
from whichkl.samples import Block, Loaded, Part, Reading, Stream, Table, open_samples
from whichkl.samples.loader import LoaderPart
from whichkl.samples.table import as_frame, column_names, is_frame, is_plain, places_of_rows, read_array, read_frame, renamed
from whichkl.targets.supports import Bijection

_MAX_LABELS_SHOWN = 20
_MAX_DIM = 1_000_000
"""Largest number of coordinates of a target without samples: even a factorised fit of this many takes 16 GB of memory."""


@dataclass(frozen=True)
class _PairedPart(Part):
    """A part of another stream, as pairs."""

    part: Part
    x: tuple[int, ...]
    y: tuple[int, ...]

    @property
    def label(self) -> str:
        return self.part.label

    def blocks(self) -> Iterator[Block]:
        for block in self.part.blocks():
            yield replace(block, x=block.x[:, list(self.y)], context=block.x[:, list(self.x)])

    def place(self, row: int) -> str:
        return self.part.place(row)


class _Paired(Stream):
    """A stream of pairs (x, y): x are the columns of another stream that `given` names, y are its other columns."""

    def __init__(self, stream: Stream, given: str | Sequence[str]) -> None:
        if stream.context_names:
            raise InputError(cannot("use `given=` here", "the samples are pairs (x, y) already", "Leave it out"))
        x, y = _columns_of(given, stream.names)
        self._stream, self._x, self._y = stream, tuple(x), tuple(y)
        self.names, self.reading = tuple(stream.names[i] for i in y), stream.reading
        self.context_names = tuple(stream.names[i] for i in x)

    @property
    def parts(self) -> Sequence[Part]:
        return [_PairedPart(part, self._x, self._y) for part in self._stream.parts]

    @property
    def rows(self) -> int | None:
        return self._stream.rows

    @property
    def left_out(self) -> int:
        return self._stream.left_out

    @property
    def bytes_in_memory(self) -> int:
        return self._stream.bytes_in_memory


@dataclass(frozen=True)
class Rows:
    """Samples of p, in memory or streamed; all None where there are none."""

    samples: Float[Tensor, "n d"] | None = None
    context: Float[Tensor, "n c"] | None = None
    """x of pairs (x, y), in memory."""
    stream: Stream | None = None
    width: int | None = None
    """The number of columns that are modelled."""
    names: Sequence[str] | None = None
    """Those given, else those of a file or a stream."""
    context_names: tuple[str, ...] = ()
    is_scalar: bool = False
    """Whether y came as (n,), or as the only column besides `given=`: an event of no axes."""
    source: Any = None
    """The samples before they became a tensor; a DataFrame has names."""
    table: Table | None = None
    """The file, or the DataFrame or matrix of which some columns or rows were chosen, in memory."""

    @property
    def reading(self) -> Reading:
        """How a table was read, with the labels of its categories."""
        read = self.table or self.stream
        return Reading() if read is None else read.reading

    @property
    def left_out(self) -> int:
        """The number of rows that were left out, since a cell is missing."""
        read = self.table or self.stream
        return 0 if read is None else read.left_out

    @property
    def notes(self) -> tuple[str, ...]:
        """How many rows were left out, if any, and the codes of the categories."""
        of_all = "" if self.samples is None else f" of {self.left_out + len(self.samples):,}"
        rows = (f"rows left out, since a cell is missing: {self.left_out:,}{of_all}",) if self.left_out else ()
        return (*rows, *(_codes(name, labels) for name, labels in self.reading.categories.items()))

    def column_names(self, dim: int) -> tuple[str, ...]:
        """Return the names of the d columns that are modelled, default ones if there are none."""
        return read_names(self.names, self.source, dim, is_response=self.context is not None)

    def check(self, names: Sequence[str], bijection: Bijection, others: dict[str, Any]) -> None:
        """Refuse samples that are empty, not finite or outside the support, and what can't be combined with them."""
        extra = [name for name, value in others.items() if value is not None]
        if self.context is not None and any(name not in ("weights", "log_weights", "chains") for name in extra):
            because = "a conditional target is known by its pairs alone"
            raise InputError(cannot("use functions of p with pairs (x, y)", because, "Leave them out"))
        if self.stream is not None and extra:
            because = "streamed samples are read in parts, and can't be combined with other arguments"
            raise InputError(cannot(f"use `{extra[0]}=` here", because, "Leave it out, or read the samples into memory"))
        x = self.samples
        if x is None:
            return
        if self.context is not None:
            check_finite(self.context, self.context_names, "x")
            if len(self.context) != len(x):
                because = f"x has {len(self.context)} rows and y has {len(x)}"
                raise InputError(cannot("use these pairs", because, "Give one row of x per row of y"))
        if x.numel() == 0:
            because = f"they are empty, shape {tuple(x.shape)}"
            raise InputError(cannot("use these samples", because, "Give at least one row"))
        instead = "Drop or repair those rows first"
        if self.context is None and math.isnan(x.sum()) and bool(x.isnan().any()):  # two infinities have the sum NaN, too
            empty = [names[i] for i in x[0].isnan().nonzero()[:, 0].tolist() if bool(x[:, i].isnan().all())]
            options = f"drop={empty}, " * bool(empty) + "missing='drop'"
            instead = f"{instead}, or pass `Target(samples=…, {options})`"
        check_finite(x, names, instead=instead)
        outside = ~bijection.contains(x)
        if bool(outside.any()):
            where = places_of_rows(self.table, outside.nonzero()[:5, 0].tolist())
            because = f"{int(outside.sum())} of {len(outside)} rows lie outside the support, first {where}"
            raise InputError(cannot("use these samples", because, "Correct `support=`, or drop those rows"))

    def weights(self, given: Any, log_given: Any = None) -> Float[Tensor, " n"] | None:
        """Bring `weights=` or `log_weights=` to one number per row."""
        if given is not None and log_given is not None:
            raise InputError(
                cannot("use `weights=` with `log_weights=`", "each gives the weights of all rows", "Pass one of them")
            )
        name, values, read = (
            ("weights", given, read_weights) if log_given is None else ("log_weights", log_given, read_log_weights)
        )
        if values is None:
            return None
        if self.samples is None:
            raise InputError(cannot(f"use `{name}=`", "there are no samples to weight", "Pass `samples=`"))
        kept = None if self.table is None else self.table.numbers
        if kept is not None and np.ndim(values) == 1 and len(values) > kept[-1]:
            values = tensor_of(values)[torch.from_numpy(kept)]
        return (read_weights if log_given is None else read_log_weights)(values, self.samples)

    def chains(self, given: Any, weights: Tensor | None, device: torch.device) -> Tensor | None:
        """Bring `chains=` to the number of its chain per row."""
        if given is None:
            return None
        if self.samples is None or weights is not None or self.left_out:
            because = "there are no samples" if self.samples is None else "the samples are weighted"
            because = "rows are left out, and the others are in no order of time" if self.left_out else because
            raise InputError(cannot("use `chains=`", because, "Pass `samples=` of equal weight"))
        return chain_ids(given, len(self.samples), device)


def read_rows(
    samples: Any,
    *,
    names: Sequence[str] | None,
    given: str | Sequence[str] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    is_whole: bool,
    reading: Reading,
) -> Rows:
    """Read samples: an array, a pair (x, y), a path, a loader or a stream.

    Args:
        samples: see `Target`.
        names: the names of the columns.
        given: the names of the columns that are x.
        dtype: of the tensors; by default that of the samples, or float64 where it can't hold their squares.
        device: of the tensors.
        is_whole: whether the rows are needed in memory.
        reading: how a table is read.
    """
    samples = as_frame(samples)
    if reading.categories and names is not None and not is_frame(samples):
        raise InputError(cannot("use `names=` with `categories=`", "these are the names in the file", "Leave `names=` out"))
    found = open_samples(samples, is_whole=is_whole, reading=reading)
    found = table_in_memory(samples, names, reading) if found is None else found
    table = None
    if isinstance(found, Table):
        table = replace(found, values=np.empty((0, 0)))  # the tensor of the samples holds them
        names = table.names if names is None or table.part is None else names
        samples = found.values
    x_names: Sequence[str] | None = None
    if given is not None and isinstance(found, Stream):
        found = _Paired(found, given)
        names = found.names
    elif given is not None:
        samples, names, x_names = _split_columns(samples, names, given)
    if isinstance(found, Stream):
        return _streamed(found, names)
    x = None
    if isinstance(samples, tuple):
        if len(samples) != 2:
            because = f"a tuple of {len(samples)} was given, and a pair is (x, y)"
            raise InputError(cannot("use these samples", because, "Give one (n, d) array, or a pair of arrays"))
        x, samples = samples
        x_table, y_table = (read_frame(one, Reading()) if is_frame(one) and not is_plain(one) else None for one in (x, samples))
        if x_table is not None:
            x, x_names = x_table.values, x_table.names
        if y_table is not None:
            samples, names = y_table.values, y_table.names if names is None else names
    if samples is None:
        return Rows(names=names)
    y = read_matrix(samples, dtype, device) if dtype is not None else widened(read_matrix(samples, dtype, device))
    context = None if x is None else read_matrix(x, dtype, device, "x")
    context_names = () if context is None else read_names(x_names, x, context.shape[1])
    is_scalar = context is not None and np.ndim(samples) == 1
    return Rows(y, context, None, y.shape[1], names, context_names, is_scalar, samples, table)


def _streamed(stream: Stream, names: Sequence[str] | None) -> Rows:
    if names is None:  # batches of pairs have no names: those of y differ from those of x
        is_unnamed = bool(stream.context_names) and tuple(stream.names) == default_names(len(stream.names))
        names = default_names(len(stream.names), "y") if is_unnamed else stream.names
    return Rows(None, None, stream, len(stream.names), names, stream.context_names, _has_flat_response(stream))


def _renamed(frame: Any, names: Sequence[str]) -> Any:
    """Return a table with these names, if there is one for each column."""
    if len(names) != len(column_names(frame)):
        because = f"{len(names)} names were given for {len(column_names(frame))} columns"
        raise InputError(cannot("use these `names`", because, "Give each column its own name"))
    return renamed(frame, names)


def _codes(name: str, labels: Sequence[str]) -> str:
    """Write the code of each label, or of the first ones.

    >>> _codes("city", ["Lima", "Oslo"])
    'the codes of `city` are 0 Lima, 1 Oslo'
    """
    shown = ", ".join(f"{code} {label[:40]}" for code, label in enumerate(labels[:_MAX_LABELS_SHOWN]))
    return f"the codes of `{name}` are {shown}" + (", …" if len(labels) > _MAX_LABELS_SHOWN else "")


def table_in_memory(samples: Any, names: Sequence[str] | None, reading: Reading) -> Table | None:
    """Read a DataFrame, or choose columns and rows of a matrix; None where nothing is to be chosen or converted."""
    if is_frame(samples) and not (reading.is_default and is_plain(samples)):
        return read_frame(samples if names is None else _renamed(samples, names), reading)
    if reading.is_default:
        return None
    if samples is None or isinstance(samples, tuple):
        because = "there are no samples" if samples is None else "the samples are pairs (x, y)"
        raise InputError(cannot("choose how columns are read", because, "Pass one table, and name the columns of x by `given=`"))
    if reading.categories or reading.thousands:
        because = "an array holds numbers, and categories and separators are of text"
        raise InputError(cannot("read these samples", because, "Pass a DataFrame or a file"))
    x = read_matrix(samples)
    return read_array(x, read_names(names, samples, x.shape[1]), reading)


def _split_columns(
    samples: Any, names: Sequence[str] | None, given: str | Sequence[str]
) -> tuple[tuple[Tensor, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Return the pair (x, y) of a table in memory, and the names of y and of x; a single column y is (n,)."""
    if samples is None or isinstance(samples, tuple):
        because = "there are no samples" if samples is None else "the samples are pairs (x, y) already"
        raise InputError(cannot("use `given=` here", because, "Leave it out, or pass one table of samples"))
    table = read_matrix(samples)
    known = read_names(names, samples, table.shape[1])
    x, y = _columns_of(given, known)
    of_y = table[:, y[0]] if len(y) == 1 else table[:, y]
    return (table[:, x], of_y), tuple(known[i] for i in y), tuple(known[i] for i in x)


def _columns_of(given: str | Sequence[str], names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the numbers of the columns of x, in the given order, and of the remaining columns, y.

    >>> _columns_of(["dose"], ["visits", "dose"])
    ([1], [0])
    """
    wanted = [given] if isinstance(given, str) else [str(name) for name in given]
    do = f"use `given={wanted}`"
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        because = f"there is no column `{missing[0]}`, but {quoted(names)}" if missing else "it names no column"
        raise InputError(cannot(do, because, "Name the columns of x"))
    if len(set(wanted)) < len(wanted):
        raise InputError(cannot(do, "a column appears twice", "Name each column once"))
    x = [list(names).index(name) for name in wanted]
    y = [i for i in range(len(names)) if i not in x]
    if not y:
        raise InputError(cannot(do, "no column is left for y", "Name fewer columns"))
    return x, y


def _has_flat_response(stream: Stream) -> bool:
    """Whether y is a scalar: a loader gives it as (n,), or it is the only column besides those of x.

    The blocks of a stream are matrices, so the first item of a loader is read to see its shape.
    """
    if not isinstance(stream, Loaded):
        return isinstance(stream, _Paired) and len(stream.names) == 1
    (part,) = stream.parts
    if not stream.context_names or not isinstance(part, LoaderPart):
        return False
    with seeded(0):
        data: Any = part.loader.dataset
        is_whole = part.loader.batch_size is None or isinstance(data, IterableDataset)
        batch = next(iter(part.loader)) if is_whole else part.loader.collate_fn([data[0]])
    return bool(np.ndim(batch[1]) == 1)


def read_dim(dim: Any, width: int | None, *, has_functions: bool) -> int:
    """Return the number of coordinates of a target."""
    if dim is None:
        if width is None and has_functions:
            because = "there are no samples to read the dimension from"
            raise InputError(cannot("make a target of functions alone", because, "Pass `dim=`"))
        return width or 1
    dim = as_int(dim)
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        because = "it must be a whole number of at least 1"
    elif width is not None and width != dim:
        because = f"the samples have {width} columns"
    elif dim > _MAX_DIM:
        because = f"it is more than {_MAX_DIM:,}, the largest number of coordinates of a log density"
    else:
        return width or dim
    raise InputError(cannot(f"use `dim={dim!r}`", because, "Give the number of coordinates of one point"))
