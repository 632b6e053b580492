"""Examples: what a student learns from, in memory or by a `DataLoader`, in batches that a seed determines."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset, TensorDataset, default_collate

from whichkl._checks import InputError, cannot, check_finite
from whichkl.arrays import tensor_of
from whichkl.distillation.networks import Teacher, digest
from whichkl.process.seeds import seeded
from whichkl.process.torch_modes import normal
from whichkl.user_code import call_user

_MAX_BYTES_OF_LOGITS = 2**30
"""Largest size of a teacher's logits that is kept in memory; larger ones are recomputed per batch."""

_READ_LOADER = ("read this DataLoader", "Correct its data set")


class Batch(NamedTuple):
    """Inputs, labels where there are any, and the teacher's logits."""

    x: Any
    labels: Int[Tensor, " n"] | None
    teacher: Float[Tensor, "n c"]


class Examples(ABC):
    """Examples that can be gone through as often as needed."""

    @property
    @abstractmethod
    def count(self) -> int | None:
        """Batches of one pass; None where it is unknown."""

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of examples; None where they can't be taken by their numbers."""

    @abstractmethod
    def batches(self, teacher: Teacher, seed: int | None = None) -> Iterator[Batch]:
        """Go through all examples once: in an order that the seed fixes, or, without a seed, in their own order."""

    @abstractmethod
    def take(self, rows: Int[Tensor, " m"], *, shuffle: bool) -> Examples:
        """Return some of the examples; those to train on are shuffled in each pass."""

    @property
    @abstractmethod
    def identity(self) -> Any:
        """What distinguishes these examples from others, as far as it is known."""


@dataclass
class InMemory(Examples):
    """Examples in tensors, shuffled fully; the teacher sees each once, if its logits fit into memory."""

    x: Tensor
    labels: Int[Tensor, " n"] | None
    batch: int
    kept: Tensor | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """Batches, nearly equal in size."""
        return math.ceil(len(self.x) / self.batch)

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.x)

    def batches(self, teacher: Teacher, seed: int | None = None) -> Iterator[Batch]:
        """Go through the rows; without a seed in their order."""
        order = torch.arange(self.size, device="cpu")
        if seed is not None:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed), device="cpu")
        kept = self.seen_by(teacher)
        for rows in order.tensor_split(self.count):
            x = self.x[rows]
            yield Batch(x, None if self.labels is None else self.labels[rows], teacher(x) if kept is None else kept[rows])

    def take(self, rows: Int[Tensor, " m"], *, shuffle: bool) -> InMemory:
        """Return some of the rows; the order of `batches` is random in any case."""
        kept = None if self.kept is None else self.kept[rows]
        return InMemory(self.x[rows], None if self.labels is None else self.labels[rows], self.batch, kept)

    @property
    def identity(self) -> str:
        """A hash of the content."""
        return digest({"x": self.x} | ({} if self.labels is None else {"labels": self.labels}))

    def seen_by(self, teacher: Teacher) -> Tensor | None:
        """Return the teacher's logits, computed at the first call; None where they would take more than a gigabyte."""
        if self.kept is None:
            first = teacher(self.x[:1])
            if first.numel() * first.element_size() * len(self.x) > _MAX_BYTES_OF_LOGITS:
                return None
            self.kept = torch.cat([teacher(x) for x in self.x.split(max(self.batch, 512))])
        return self.kept


@dataclass
class Loaded(Examples):
    """Examples of a `DataLoader`, which may differ in each pass (augmentation): the teacher sees what the student sees."""

    loader: DataLoader[Any]

    @property
    def count(self) -> int | None:
        """Batches, where the loader knows."""
        return None if isinstance(self.loader.dataset, IterableDataset) else len(self.loader)

    @property
    def size(self) -> int | None:
        """Number of examples, where the loader goes through a dataset in a standard way."""
        return len(self.loader.dataset) if _is_standard(self.loader) and isinstance(self.loader.dataset, Sized) else None

    def batches(self, teacher: Teacher, seed: int | None = None) -> Iterator[Batch]:
        """Go through the loader under a seed, also of the generators that it brings."""
        found = 0
        with _reseeded(self.loader, 0 if seed is None else seed):
            with torch.device("cpu"):  # where it draws the seed of its workers
                reader = call_user(lambda: iter(self.loader), *_READ_LOADER)
            state = torch.random.get_rng_state()
            while True:
                # the data and the student have separate random states, so that neither depends on the other
                with torch.random.fork_rng(devices=[]):
                    torch.random.set_rng_state(state)
                    one = call_user(lambda: next(reader, None), *_READ_LOADER)
                    state = torch.random.get_rng_state()
                if one is None:
                    break
                x, labels = _pair(one)
                found += 1
                yield Batch(x, labels, teacher(x))
        if not found:
            raise InputError(cannot("distill on this loader", "it gives no batch", "Give it examples"))

    def take(self, rows: Int[Tensor, " m"], *, shuffle: bool) -> Loaded:
        """Return a loader like this one of some of the examples."""
        loader, generator = self.loader, torch.Generator()
        part, size = Subset(loader.dataset, rows.tolist()), loader.batch_size or 1
        return Loaded(
            DataLoader(
                part,
                batch_size=size,
                sampler=_AnyOrder(part, generator=generator) if shuffle else None,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                worker_init_fn=loader.worker_init_fn,
                drop_last=shuffle and len(rows) > size > 1 and len(rows) % size == 1,  # one row has no batch statistics
                generator=generator,
            )
        )

    @property
    def identity(self) -> Any:
        """Its types and sizes: the content of the examples isn't known without reading them."""
        dataset: Any = self.loader.dataset
        size = len(dataset) if isinstance(dataset, Sized) else None
        return [type(dataset).__qualname__, size, self.loader.batch_size]


def examples_of(data: Any, batch: int | None, what: str = "data") -> Examples:
    """Read tensors or arrays, x or (x, labels), a `DataLoader`, or a `Dataset`."""
    if isinstance(data, Examples):
        return data
    if isinstance(data, torch.utils.data.Dataset):
        data = DataLoader(data, batch_size=batch or 64)
    if isinstance(data, DataLoader):
        if not (type(data.dataset) is TensorDataset and data.collate_fn is default_collate and _is_standard(data)):
            return Loaded(data)
        batch, data = batch or data.batch_size, data.dataset.tensors
    pair = data if isinstance(data, (tuple, list)) else (data,)
    if not 1 <= len(pair) <= 2 or any(not isinstance(one, (Tensor, np.ndarray)) for one in pair):
        because = f"it is a `{type(data).__name__}`" + (f" of {len(pair)}" if isinstance(data, (tuple, list)) else "")
        raise InputError(cannot(f"read `{what}`", because, "Pass a DataLoader, tensors (x, labels), or x alone"))
    tensors = [tensor_of(one) for one in pair]
    x = normal(tensors[0].detach())
    if x.ndim == 0 or len(x) == 0:
        raise InputError(cannot(f"distill on `{what}`", "it has no examples", "Give it some"))
    if x.is_floating_point():
        flat = x.reshape(len(x), -1)
        check_finite(flat, [f"element {i}" for i in range(flat.shape[1])], "inputs")
    labels = labels_of(tensors[1], len(x)) if len(tensors) == 2 else None
    return InMemory(x, labels, batch or 64)


def divided(examples: Examples, shares: tuple[float | None, float | None], seed: int) -> list[Examples | None]:
    """Split examples at random into those to train on, to stop by and to report on; a share of None takes none."""
    n = examples.size
    if shares == (None, None):
        if isinstance(examples, Loaded) and n is not None:
            examples = examples.take(torch.arange(n, device="cpu"), shuffle=True)
        return [examples, None, None]
    if n is None:
        because = "it draws its examples by a sampler or a stream of its own"
        raise InputError(cannot("split this loader", because, "Pass other data as both `stopping=` and `held_out=`"))
    sizes = [0 if share is None else max(1, round(share * n)) for share in shares]
    if n - sum(sizes) < 1:
        because = f"{n} examples don't divide into parts to train on, to stop by and to report on"
        raise InputError(cannot("distill on these data", because, "Give more examples"))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
    train, *others = (rows.sort().values for rows in order.split([n - sum(sizes), *sizes]))
    parts = [examples.take(rows, shuffle=False) if len(rows) else None for rows in others]
    return [examples.take(train, shuffle=True), *parts]


def labels_of(labels: Any, n: int) -> Int[Tensor, " n"]:
    """Check labels, one whole number per example, from 0."""
    if not isinstance(labels, Tensor) or labels.shape != (n,) or labels.is_floating_point() or labels.is_complex():
        what = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        because = f"they are {what} for {n} examples"
        raise InputError(cannot("use these labels", because, "Pass whole numbers from 0, one per example"))
    if bool((labels < 0).any()):
        because = f"one is {int(labels.min())}"
        raise InputError(cannot("use these labels", because, "Number the classes from 0, and leave the rest out"))
    return labels.detach().long()


def _is_standard(loader: DataLoader[Any]) -> bool:
    """Whether a loader goes through a dataset in order or at random, each example once, in batches."""
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    return plain and loader.batch_size is not None and not isinstance(loader.dataset, IterableDataset)


def _pair(one: Any) -> tuple[Any, Tensor | None]:
    if isinstance(one, (tuple, list)) and len(one) == 2:
        return one[0], labels_of(one[1], len(one[1]) if isinstance(one[1], Tensor) and one[1].ndim else 0)
    return (one[0], None) if isinstance(one, (tuple, list)) and len(one) == 1 else (one, None)


class _AnyOrder(RandomSampler):
    """Torch's random order, drawn on the CPU, where the generator is, whatever the default device."""

    def __iter__(self) -> Iterator[int]:
        with torch.device("cpu"):
            return iter(list(super().__iter__()))


@contextlib.contextmanager
def _reseeded(loader: DataLoader[Any], seed: int) -> Iterator[None]:
    """Seed everything that a loader draws from, and put the states of its own generators back."""
    own = [loader.generator, getattr(loader.sampler, "generator", None), getattr(loader.batch_sampler, "generator", None)]
    generators = {id(one): one for one in own if isinstance(one, torch.Generator)}.values()
    states = [one.get_state() for one in generators]
    with seeded(seed):
        for one in generators:
            one.manual_seed(seed)
        try:
            yield
        finally:
            for one, state in zip(generators, states, strict=True):
                one.set_state(state)
