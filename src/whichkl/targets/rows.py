"""Rows: what `Target` gets as samples (arrays, pairs, files, streams), brought to tensors or to a stream, with its names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot, check_finite
from whichkl.arrays import default_names, read_matrix, read_names, read_weights, widened
from whichkl.chains import chain_ids
from whichkl.samples import Stream, Table, open_samples
from whichkl.targets.pairing import has_flat_response, split_columns
from whichkl.targets.supports import Bijection

_MAX_DIM = 1_000_000
"""Largest number of coordinates of a target without samples: even a factorised fit of this many takes 16 GB of memory."""


@dataclass(frozen=True)
class Rows:
    """Samples of p, in memory or streamed; all None where there are none."""

    samples: Float[Tensor, "n d"] | None
    context: Float[Tensor, "n c"] | None
    """x of pairs (x, y), in memory."""
    stream: Stream | None
    width: int | None
    """The number of columns that are modelled."""
    names: Sequence[str] | None
    """Those given, else those of a file or a stream."""
    context_names: tuple[str, ...]
    is_scalar: bool
    """Whether y came as (n,), or as the only column besides `given=`: an event of no axes."""
    source: Any
    """The samples before they became a tensor; a DataFrame has names."""

    def column_names(self, dim: int) -> tuple[str, ...]:
        """Return the names of the d columns that are modelled, default ones if there are none."""
        return read_names(self.names, self.source, dim, is_response=self.context is not None)


def read_rows(
    samples: Any,
    *,
    names: Sequence[str] | None,
    given: str | Sequence[str] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    is_whole: bool,
) -> Rows:
    """Read samples: an array, a pair (x, y), a path, a loader or a stream.

    Args:
        samples: see `Target`.
        names: the names of the columns.
        given: the names of the columns that are x.
        dtype: of the tensors; by default that of the samples, or float64 where it can't hold their squares.
        device: of the tensors.
        is_whole: whether the rows are needed in memory.
    """
    found = open_samples(samples, is_whole=is_whole)
    if isinstance(found, Table):
        samples, names = found.values, found.names if names is None else names
    x_names: Sequence[str] | None = None
    if given is not None:
        found, samples, names, x_names = split_columns(found, samples, names, given)
    if isinstance(found, Stream):
        if names is None:  # batches of pairs have no names: those of y differ from those of x
            is_unnamed = bool(found.context_names) and tuple(found.names) == default_names(len(found.names))
            names = default_names(len(found.names), "y") if is_unnamed else found.names
        return Rows(None, None, found, len(found.names), names, found.context_names, has_flat_response(found), None)
    x = None
    if isinstance(samples, tuple):
        if len(samples) != 2:
            because = f"a tuple of {len(samples)} was given, and a pair is (x, y)"
            raise InputError(cannot("use these samples", because, "Give one (n, d) array, or a pair of arrays"))
        x, samples = samples
    if samples is None:
        return Rows(None, None, None, None, names, (), False, None)
    y = read_matrix(samples, dtype, device)
    y = y if dtype is not None else widened(y)
    context = None if x is None else read_matrix(x, dtype, device, "x")
    context_names = () if context is None else read_names(x_names, x, context.shape[1])
    return Rows(y, context, None, y.shape[1], names, context_names, context is not None and np.ndim(samples) == 1, samples)


def read_dim(dim: Any, width: int | None, *, has_functions: bool) -> int:
    """Return the number of coordinates of a target.

    Args:
        dim: what the user passed.
        width: the number of columns of the samples.
        has_functions: whether there are functions of p.
    """
    if dim is None:
        if width is None and has_functions:
            because = "there are no samples to read the dimension from"
            raise InputError(cannot("make a target of functions alone", because, "Pass `dim=`"))
        return width or 1
    if isinstance(dim, bool) or not isinstance(dim, Integral) or int(dim) < 1:
        because = "it must be a whole number of at least 1"
    elif width is not None and width != int(dim):
        because = f"the samples have {width} columns"
    elif int(dim) > _MAX_DIM:
        because = f"it is more than {_MAX_DIM:,}, the largest number of coordinates of a log density"
    else:
        return width or int(dim)
    raise InputError(cannot(f"use `dim={dim!r}`", because, "Give the number of coordinates of one point"))


def check_rows(rows: Rows, names: Sequence[str], bijection: Bijection) -> None:
    """Refuse samples that are empty, not finite or outside the support, and pairs of unequal length."""
    x = rows.samples
    if x is None:
        return
    if rows.context is not None:
        check_finite(rows.context, rows.context_names, "x")
        if len(rows.context) != len(x):
            because = f"x has {len(rows.context)} rows and y has {len(x)}"
            raise InputError(cannot("use these pairs", because, "Give one row of x per row of y"))
    if x.numel() == 0:
        raise InputError(cannot("use these samples", f"they are empty, shape {tuple(x.shape)}", "Give at least one row"))
    check_finite(x, names)
    outside = ~bijection.contains(x)
    if bool(outside.any()):
        where = ", ".join(str(int(i)) for i in outside.nonzero()[:5, 0])
        because = f"{int(outside.sum())} of {len(outside)} rows lie outside the support, first rows {where}"
        raise InputError(cannot("use these samples", because, "Correct `support=`, or drop those rows"))


def check_alone(rows: Rows, others: dict[str, Any]) -> None:
    """Refuse functions of p with pairs, and everything else with streamed samples.

    Args:
        rows: the samples.
        others: the other arguments of `Target` by name; None is an argument that wasn't given.
    """
    extra = [name for name, value in others.items() if value is not None]
    if rows.context is not None and any(name not in ("weights", "chains") for name in extra):
        because = "a conditional target is known by its pairs alone"
        raise InputError(cannot("use functions of p with pairs (x, y)", because, "Leave them out"))
    if rows.stream is not None and extra:
        because = "streamed samples are read in parts, and can't be combined with other arguments"
        raise InputError(cannot(f"use `{extra[0]}=` here", because, "Leave it out, or read the samples into memory"))


def read_row_weights(weights: Any, rows: Rows) -> Float[Tensor, " n"] | None:
    """Bring `weights=` to one number per row."""
    if weights is None:
        return None
    if rows.samples is None:
        raise InputError(cannot("use `weights=`", "there are no samples to weight", "Pass `samples=`"))
    return read_weights(weights, rows.samples)


def read_chains(chains: Any, rows: Rows, weights: Tensor | None, device: torch.device) -> Tensor | None:
    """Bring `chains=` to the number of its chain per row."""
    if chains is None:
        return None
    if rows.samples is None or weights is not None:
        because = "there are no samples" if rows.samples is None else "the samples are weighted"
        raise InputError(cannot("use `chains=`", because, "Pass `samples=` of equal weight"))
    return chain_ids(chains, len(rows.samples), device)
