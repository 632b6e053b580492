"""Threads: how many threads torch uses in the calling thread; other threads are unaffected."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_WINDOWS_RUNTIME = "libiomp5md.dll"
"""The OpenMP library that torch loads on Windows, which doesn't search a library's dependencies for a symbol."""
_MANY_NUMBERS = 1 << 20
"""Numbers, computed by one call, from which on several threads are worth it on idle cores. Below, they mostly wait for each
other, and on busy cores for long."""
FLOPS_PER_NUMBER = 16
"""Multiplications of a matrix product that take as long as a number of another operation."""
_PRODUCTS = {"matmul", "mm", "mv", "bmm", "linear", "addmm", "addmv", "baddbmm", "einsum", "__matmul__", "__rmatmul__"}


class _Users(threading.local):
    """The calling thread's numbers of threads outside `few_threads`; empty inside `one_thread`, None outside both."""

    numbers: tuple[int, int] | tuple[()] | None = None


_USERS = _Users()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread inside the block, in the calling thread only.

    `torch.set_num_threads` is never called: it also sets the number for every later thread, and turns `mkl_dynamic` off for the
    process. Afterwards MKL's LU of a batch of matrices of more than 150 rows is wrong if torch uses several threads
    (https://github.com/pytorch/pytorch/issues/141358). OpenMP and MKL have a number per thread, which is set here.
    """
    before, users = use_one_thread(), _USERS.numbers
    _USERS.numbers = ()
    try:
        yield
    finally:
        _USERS.numbers = users
        _set_threads(before)


@contextlib.contextmanager
def few_threads() -> Iterator[None]:
    """Have torch use one thread inside the block, in the calling thread only, except in `threads_for` many numbers."""
    before, users = use_one_thread(), _USERS.numbers
    _USERS.numbers = before if users is None else users
    try:
        yield
    finally:
        _USERS.numbers = users
        _set_threads(before)


@contextlib.contextmanager
def threads_for(numbers: int) -> Iterator[None]:
    """Inside `few_threads`, have torch use the user's number of threads for a call that works on many numbers."""
    if not _USERS.numbers or numbers < _MANY_NUMBERS:
        yield
        return
    before = use_one_thread()
    _set_threads(_USERS.numbers)
    try:
        yield
    finally:
        _set_threads(before)


class Counted(TorchFunctionMode):
    """Counts the numbers that torch computes inside the block, which is the same on every machine, unlike the time."""

    numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not found._is_view():
            factors = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor) and one.ndim > 0]
            is_product = getattr(func, "__name__", "") in _PRODUCTS and factors
            self.numbers += found.numel() * (max(1, factors[0].shape[-1] // FLOPS_PER_NUMBER) if is_product else 1)
        return found


def use_one_thread() -> tuple[int, int] | None:
    """Have torch use one thread in the calling thread, and return the earlier numbers of OpenMP and of MKL.

    Without an OpenMP library that can be called, nothing changes, and None is returned.
    """
    found = _runtime()
    if found is None:
        return None
    torch.get_num_threads()  # the first call sets the thread's number; later it would overwrite this one
    get_threads, set_threads, set_mkl_threads = found
    before = get_threads()
    set_threads(1)
    return before, set_mkl_threads(1)


def _set_threads(numbers: tuple[int, int] | tuple[()] | None) -> None:
    """Set the numbers that `use_one_thread` returned."""
    found = _runtime()
    if numbers and found is not None:
        _, set_threads, set_mkl_threads = found
        set_threads(numbers[0])
        set_mkl_threads(numbers[1])


@lru_cache(maxsize=1)
def _runtime() -> tuple[Any, Any, Any] | None:
    """Return functions of the calling thread: OpenMP's number of threads is read, OpenMP's is set, MKL's is set."""
    for name in (None, torch._C.__file__, _WINDOWS_RUNTIME):  # None: what the process finds first, as torch does
        try:
            library = ctypes.CDLL(name)
            get_threads, set_threads = library.omp_get_max_threads, library.omp_set_num_threads
        except (OSError, AttributeError, TypeError):
            continue
        if get_threads() == torch.get_num_threads():  # else it is another OpenMP library than torch's
            return get_threads, set_threads, _mkl()
    return None


def _mkl() -> Any:
    """Return MKL's function, which returns the earlier number (0: that of OpenMP); without MKL, one without effect."""
    try:
        return ctypes.CDLL(torch._C.__file__).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return lambda number: 0
