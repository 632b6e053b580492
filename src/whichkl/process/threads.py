"""Threads: how many threads torch uses in the calling thread; other threads are unaffected."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

_WINDOWS_RUNTIME = "libiomp5md.dll"
"""The OpenMP library that torch loads on Windows, which doesn't search a library's dependencies for a symbol."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread inside the block, in the calling thread only.

    `torch.set_num_threads` is never called: it also sets the number for every later thread, and turns `mkl_dynamic` off for the
    process. Afterwards MKL's LU of a batch of matrices of more than 150 rows is wrong if torch uses several threads
    (https://github.com/pytorch/pytorch/issues/141358). OpenMP and MKL have a number per thread, which is set here.
    """
    before, found = use_one_thread(), _runtime()
    try:
        yield
    finally:
        if before is not None and found is not None:
            _, set_threads, set_mkl_threads = found
            set_threads(before[0])
            set_mkl_threads(before[1])


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
