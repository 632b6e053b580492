"""Threads of torch: how many one thread of this process uses, without a change for any other."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

_WINDOWS_RUNTIME = "libiomp5md.dll"
"""The OpenMP library that torch loads on Windows, where a symbol isn't looked up in the libraries that a library needs."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread inside the block, in the calling thread alone.

    `torch.set_num_threads` isn't called, whatever the number and the thread: it also sets the number of every thread that
    is born later, and it turns off `mkl_dynamic` for the process. Afterwards MKL's LU of a batch of matrices of more than
    150 rows is wrong wherever torch uses several threads (https://github.com/pytorch/pytorch/issues/141358). OpenMP and MKL have
    numbers of their own for each thread, which are set here.
    """
    before = use_one_thread()
    try:
        yield
    finally:
        _restore(before)


def use_one_thread() -> tuple[int, int] | None:
    """Have torch use one thread in the calling thread, and return its two earlier numbers, of OpenMP and of MKL.

    Returns:
        None where torch has no OpenMP library that can be called, and nothing was done.
    """
    found = _runtime()
    if found is None:
        return None
    torch.get_num_threads()  # torch sets a thread's number when it's first asked for; later it would overwrite this one
    get_threads, set_threads, set_mkl_threads = found
    before = get_threads()
    set_threads(1)
    return before, set_mkl_threads(1)


def _restore(before: tuple[int, int] | None) -> None:
    found = _runtime()
    if before is not None and found is not None:
        found[1](before[0])
        found[2](before[1])


@lru_cache(maxsize=1)
def _runtime() -> tuple[Any, Any, Any] | None:
    """Return the functions that get and set OpenMP's number of threads, and set MKL's, of the calling thread alone."""
    for name in (None, torch._C.__file__, _WINDOWS_RUNTIME):  # None: what the whole process sees first, as torch does
        try:
            library = ctypes.CDLL(name)
            get_threads, set_threads = library.omp_get_max_threads, library.omp_set_num_threads
        except (OSError, AttributeError, TypeError):
            continue
        if get_threads() == torch.get_num_threads():  # else another OpenMP library of the process than torch's
            return get_threads, set_threads, _mkl()
    return None


def _mkl() -> Any:
    """Return MKL's function, which returns the earlier number: 0 for that of OpenMP. Without MKL, one that does nothing."""
    try:
        return ctypes.CDLL(torch._C.__file__).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return lambda number: 0
