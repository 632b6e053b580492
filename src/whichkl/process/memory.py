"""Memory: how much can still be allocated, the refusals before and after it runs out, and freed memory that is kept for reuse."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from whichkl._checks import ResourceError, cannot

STREAM_BYTES = 2**23
"""Bytes to keep for the blocks of a stream."""
LOG_DENSITY_BYTES = 31 * 2**20
"""Bytes to keep for a log density: its largest intermediate results that glibc still keeps."""
_OUT_OF_MEMORY_TEXTS = (
    *("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc"),
    *("failed to map segment", "can't start new thread", "resource_exhausted", "unable to allocate"),
)
"""Texts by which errors of torch, its libraries, JAX and the dynamic linker report that memory ran out."""
_OUT_OF_MEMORY_ERRORS = ("OutOfMemoryError", "ArrowMemoryError", "_ArrayMemoryError")
_SMALLER = "Use fewer samples, a smaller family or fewer dimensions, or free some memory"


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or an error that caused it, reports that memory ran out.

    >>> ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory")), ran_out(RuntimeError("singular matrix"))
    (True, False)
    """
    while error is not None:
        says = str(error).lower() if isinstance(error, (RuntimeError, ImportError, OSError)) else ""
        by_name = isinstance(error, MemoryError) or type(error).__name__ in _OUT_OF_MEMORY_ERRORS
        if by_name or getattr(error, "errno", None) == errno.ENOMEM or any(one in says for one in _OUT_OF_MEMORY_TEXTS):
            return True
        error = error.__cause__
    return False


def refuse_if_ran_out(error: BaseException, do: str = "go on") -> None:
    """Raise a `ResourceError` if an error reports that memory ran out; do nothing for any other error."""
    if ran_out(error):
        raise ResourceError(memory_message(do)) from error


def memory_message(do: str = "go on") -> str:
    """Return the sentence for memory that ran out."""
    because = "memory ran out"
    with contextlib.suppress(MemoryError):
        because = f"memory ran out, and {shown_bytes(available_memory())} are free"
    return cannot(do, because, _SMALLER)


def check_memory(needed: float, do: str, instead: str = _SMALLER, *, free: float | None = None) -> None:
    """Refuse work that allocates at least `needed` bytes, more than are available, before it starts.

    `do` names the work, such as ``"fit `Gaussian()` in 30,000 dimensions"``; `free` is what is available on another device.
    """
    free = available_memory() if free is None else free
    if needed > free:
        because = f"it takes at least {shown_bytes(needed)} of memory, and {shown_bytes(free)} are free"
        raise ResourceError(cannot(do, because, instead))


def available_memory() -> float:
    """Return the bytes that this process can still allocate; infinity if the system doesn't report it.

    It is the minimum of the machine's free memory and swap, of what the limits of the process leave, and of what the limits of
    its control group leave.
    """
    return max(0.0, min(_of_machine(), _of_process(), _of_group(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))))


def shown_bytes(count: float) -> str:
    """Write a number of bytes with at least two digits.

    >>> shown_bytes(7_200_000_000), shown_bytes(150_000_000), shown_bytes(512)
    ('7.2 GB', '150 MB', '512 bytes')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"


@lru_cache(maxsize=4)
def keep_memory(size: int) -> None:
    """Have the C library keep up to twice `size` bytes for reuse: memory from the system costs a page fault per 4 kB.

    glibc keeps twice the size of the largest chunk that it was ever given back, up to 64 MB (mallopt(3)). With other C libraries
    this function has no effect.
    """
    import torch  # not above: the command line reads this module before torch is loaded

    torch.empty(size, dtype=torch.uint8, device="cpu")


def _of_machine() -> float:
    with contextlib.suppress(OSError, ValueError, LookupError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * sum(int(size.split()[0]) for size in (fields["MemAvailable"], fields.get("SwapFree", "0 kB")))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def _of_process() -> float:
    """Return what the limits of address space and of data leave."""
    try:
        import resource

        used = [int(one) * resource.getpagesize() for one in Path("/proc/self/statm").read_text().split()]
    except (ImportError, OSError, ValueError):
        return math.inf
    left = math.inf
    for limit, taken in ((resource.RLIMIT_AS, used[0]), (resource.RLIMIT_DATA, used[5])):
        most, _ = resource.getrlimit(limit)
        left = left if most == resource.RLIM_INFINITY else min(left, most - taken)
    return left


def _of_group(mine: Path, root: Path) -> float:
    """Return what the control groups (v2 or v1) of this process leave; cached files that can be dropped don't count."""
    left = math.inf
    for folder in _groups(mine, root):
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left = min(left, most - used + int(stat.get(cache, 0)))
    return left


def _groups(mine: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups, and of the groups above them."""
    try:
        lines = [line.split(":", 2) for line in mine.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        inner = top / path.lstrip("/")
        yield inner
        yield from (one for one in inner.parents if one == top or top in one.parents)
