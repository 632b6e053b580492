"""Free memory: what needs more than there is gets refused with both numbers, before the system ends the process."""

from __future__ import annotations

import math
from pathlib import Path

from whichkl._checks import ResourceError, cannot

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def check_free_memory(do: str, size: float, instead: str) -> None:
    """Refuse what needs more memory than is free.

    Args:
        do: what is to be done, for the message.
        size: bytes that it needs.
        instead: what to do in its place, for the message.

    Raises:
        ResourceError: the system, or the control group of a container, has less.
    """
    free = free_bytes()
    if size > free:
        raise ResourceError(cannot(do, f"it needs {size / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free", instead))


def free_bytes() -> float:
    """Return the bytes that this process can still take; infinity where neither Linux nor a control group tells."""
    free = math.inf
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024.0 * int(line.split()[1])
    bound, used = _text(_CONTROL_GROUP / "memory.max").strip(), _text(_CONTROL_GROUP / "memory.stat")
    if bound.isdecimal() and used.startswith("anon "):  # pages of files can be given back, and don't count
        free = min(free, int(bound) - int(used.split()[1]))
    return free


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
