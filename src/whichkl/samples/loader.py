"""Loader: a torch `DataLoader` or `Dataset` as a stream, in its own order, the same each time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.sampler import BatchSampler

from whichkl._checks import InputError, cannot, check_finite
from whichkl.arrays import default_names, tensor_of
from whichkl.process.seeds import seeded
from whichkl.samples.stream import BLOCK, Block, Part, Stream
from whichkl.user_code import call_user

_END = object()
"""Marks the end of the batches."""
_KEPT = ("batch_size", "num_workers", "collate_fn", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
"""Settings of a DataLoader that are kept when it is read in order."""


@dataclass(frozen=True)
class LoaderPart(Part):
    """All batches of a loader; one part, since a data set may not allow two readers at once."""

    loader: DataLoader[Any] = field(repr=False)
    names: tuple[str, ...] = ()
    context_names: tuple[str, ...] = ()
    digest: str = ""
    """Fingerprint of the first batch: every reading must begin with it."""
    count: int | None = None
    """The number of items, where it's known."""

    @property
    def label(self) -> str:
        """The class of the data set."""
        return f"the {type(self.loader.dataset).__name__}"

    def blocks(self) -> Iterator[Block]:
        """Yield one block per batch."""
        start, found = 0, self.digest
        for number, batch in enumerate(_batches(self.loader)):
            block = _block(batch, f"batch {number} of {self.label}")
            if number == 0 and self.digest:
                found = digest_of(block)
            if self.digest and found != self.digest:
                break
            self._check(block, number, start)
            start += len(block)
            yield block
        if self.digest and (found != self.digest or start == 0):
            because = f"{self.label} gives other rows when it is read again, and a fit reads it several times"
            instead = "Make its rows the same each time (no shuffling inside, no iterator that is used up)"
            raise _unusable(because, instead)

    def _check(self, block: Block, number: int, start: int) -> None:
        for values, names in ((block.x, self.names), (block.context, self.context_names)):
            if values is None or not names:
                continue
            if values.shape[1] != len(names):
                because = f"batch {number} of {self.label} has {values.shape[1]} columns, and the first one {len(names)}"
                raise _unusable(because, "Give every row the same columns")
            if not math.isfinite(values.sum().item()):
                check_finite(values, names, f"samples (batch {number} of {self.label}, rows from {start:,})")
        if self.names and (block.context is None) == bool(self.context_names):
            because = f"batch {number} of {self.label} and the first one differ in form: one is a pair"
            raise _unusable(because, "Give all batches one form")


class Loaded(Stream):
    """A DataLoader or Dataset, read batch by batch, without shuffling; a batch (x, y) is y given x.

    Args:
        data: a DataLoader, whose collate function, batch size and worker processes are used; or a Dataset, which is read in
            batches of `BLOCK` items.

    Raises:
        InputError: its sampler chooses rows, it is empty, or its batches aren't numbers.
    """

    def __init__(self, data: DataLoader[Any] | Dataset[Any]) -> None:
        """Read the first batch, which determines the columns."""
        loader = _in_order(data) if isinstance(data, DataLoader) else DataLoader(data, BLOCK, generator=torch.Generator())
        bare = LoaderPart(loader)
        first = next((block for block in bare.blocks() if len(block)), None)
        if first is None:
            raise _unusable(f"{bare.label} gives no rows", "Give at least one")
        self.names = default_names(first.x.shape[1])
        self.context_names = default_names(0 if first.context is None else first.context.shape[1])
        has_length = hasattr(loader.dataset, "__len__") and not isinstance(loader.dataset, IterableDataset)
        length = len(loader.dataset) if has_length else None  # type: ignore[arg-type]
        self._part = LoaderPart(loader, self.names, self.context_names, digest_of(first), length)

    @property
    def parts(self) -> Sequence[Part]:
        """The one part."""
        return (self._part,)

    @property
    def rows(self) -> int | None:
        """The length of the data set, where it has one and its items are rows."""
        return None if self._part.loader.batch_size is None else self._part.count


def digest_of(block: Block) -> str:
    """Return a fingerprint of a block's numbers."""
    whole = hashlib.sha256(block.x.contiguous().cpu().numpy().tobytes())
    if block.context is not None:
        whole.update(block.context.contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()


def _in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of the same batches, unshuffled, with the last, smaller batch."""
    if type(loader.sampler) not in (SequentialSampler, RandomSampler) and not isinstance(loader.dataset, IterableDataset):
        chosen = type(loader.sampler).__name__
    elif loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        chosen = type(loader.batch_sampler).__name__
    elif isinstance(loader.sampler, RandomSampler) and (loader.sampler.replacement or loader.sampler._num_samples is not None):
        chosen = "RandomSampler with replacement or num_samples"
    else:
        kept = {name: getattr(loader, name) for name in _KEPT}
        return DataLoader(loader.dataset, shuffle=False, generator=torch.Generator(), **kept)
    because = f"its sampler, {chosen}, chooses rows, and all rows are read, in order"
    raise _unusable(because, "Leave the sampler out; torch.utils.data.Subset chooses rows")


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches; each is made under its own seeds, so that a random data set gives the same rows each time."""
    if loader.generator is not None:
        loader.generator.manual_seed(0)
    do, instead = "read this DataLoader", "Correct its data set"
    with torch.device("cpu"):  # where it draws the seed of its workers
        iterator = call_user(lambda: iter(loader), do, instead)
    for number in count():
        with seeded(number):
            batch = call_user(lambda: next(iterator, _END), do, instead)
        if batch is _END:
            return
        yield batch


def _block(batch: Any, where: str) -> Block:
    """Read a batch: rows, a list of one tensor, or a pair (x, y)."""
    is_sequence = isinstance(batch, (list, tuple)) and len(batch) in (1, 2)
    values = [_rows(one, where) for one in (batch if is_sequence else [batch])]
    if len({len(one) for one in values}) > 1:
        raise _unusable(f"{where} pairs {len(values[0])} rows of x with {len(values[1])} of y", "Give each row of x its row of y")
    x = values[-1]
    return Block(x, torch.ones(len(x), dtype=torch.float64, device="cpu"), values[0] if len(values) == 2 else None)


def _unusable(because: str, instead: str) -> InputError:
    return InputError(cannot("use this DataLoader", because, instead))


def _rows(values: Any, where: str) -> Float[Tensor, "m d"]:
    if not isinstance(values, (Tensor, np.ndarray)):
        raise _unusable(f"{where} is a `{type(values).__name__}`", "Let it give tensors (m, d), or pairs (x, y) of them")
    tensor = tensor_of(values)
    if tensor.is_complex() or tensor.ndim not in (1, 2) or (tensor.ndim == 2 and tensor.shape[1] == 0):
        raise _unusable(f"{where} has shape {tuple(tensor.shape)} and type {tensor.dtype}", "Flatten its rows to real (m, d)")
    return (tensor if tensor.ndim == 2 else tensor[:, None]).detach().to("cpu", torch.float64)
