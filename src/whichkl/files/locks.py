"""Locks: one process at a time works in a folder, on Linux, macOS and Windows."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from whichkl._checks import ResourceError, cannot
from whichkl.files.writing import made_folder, refuse_foreign, remove_own, unwritable

LOCK = ".whichkl-lock"
"""Name of the file that marks a folder as used. It holds the number of the process."""
_SECONDS_BETWEEN_TRIES = 0.02
_MAX_SECONDS_WITHOUT_NUMBER = 10.0
"""Age after which a lock file without a number is treated as that of a killed process."""
_HELD_ERRORS = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
"""Errors of a lock that another process holds."""
_NO_LOCK_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of disks that don't support locks."""
_LOCKED_BYTE = 2**30
"""The locked byte lies behind the number: on Windows a locked byte can't be read."""
_Release = Callable[[], None]


@contextlib.contextmanager
def locked(folder: Path, do: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder. The lock is released when this process ends, however it ends.

    The folder is made if it doesn't exist, and removed if it is still empty at the end. After `wait` seconds of another process's
    work, a `ResourceError` states that what `do` names can't be done.
    """
    path, give_up = folder / LOCK, time.monotonic() + wait
    with made_folder(folder):
        refuse_foreign(path)
        try:
            while (release := _take(path)) is None:
                if time.monotonic() >= give_up:
                    because = f"another run is working in `{folder}` (process {_holder(path)})"
                    raise ResourceError(cannot(do, because, "Wait for it, or name another folder"))
                time.sleep(_SECONDS_BETWEEN_TRIES)
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            yield
        finally:
            release()


def _take(path: Path) -> _Release | None:
    """Return a function that releases the lock, or None if another process holds it."""
    lock = _system_lock()
    if lock is not None:
        try:
            return _take_handle(path, lock)
        except OSError as error:
            if error.errno not in _NO_LOCK_ERRORS:
                raise
    return _take_name(path)


def _take_handle(path: Path, lock: Callable[[int], None]) -> _Release | None:
    """Lock through the operating system, which unlocks when the process ends."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _can_lock(handle, lock):
                os.close(handle)
                return None
            if _is_at(handle, path):  # else the process that held it has removed it
                os.write(handle, _number())
                return lambda: _end(path, handle)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _take_name(path: Path) -> _Release | None:
    """Lock by the existence of a file, if the system or the disk doesn't support locks."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        if _is_left_over(path):
            _remove(path)
        return None
    os.write(handle, _number())
    return lambda: _end(path, handle)


def _end(path: Path, handle: int) -> None:
    """Remove a lock file while it is held, so that no other process's file is removed, and release it."""
    if os.name == "nt":  # Windows can't remove an open file
        os.close(handle)
        _remove(path)
    else:
        _remove(path)
        os.close(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another process is about to lock it
        remove_own(path, lambda name: name == LOCK)


def _number() -> bytes:
    return f"{os.getpid():<20}\n".encode()


def _holder(path: Path) -> str:
    """Return the number of the process that holds a lock, or a question mark."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace").strip() or "?"
    return "?"


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the file of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _is_left_over(path: Path) -> bool:
    """Whether the process that made a lock file has ended without removing it."""
    try:
        text, age = path.read_text(encoding="ascii", errors="replace").strip(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if not text.isdigit():
        return age > _MAX_SECONDS_WITHOUT_NUMBER
    if os.name == "nt":  # on Windows `os.kill` ends the process
        return False
    try:
        os.kill(int(text), 0)  # sends nothing
    except (OSError, OverflowError) as error:  # a process of another user exists too
        return isinstance(error, ProcessLookupError)
    return False


def _can_lock(handle: int, lock: Callable[[int], None]) -> bool:
    try:
        lock(handle)
    except OSError as error:
        if error.errno in _HELD_ERRORS:
            return False
        raise
    return True


def _system_lock() -> Callable[[int], None] | None:
    """Return a function that locks an open file, or raises an `OSError`; None if the system has no locks."""
    with contextlib.suppress(ImportError):
        import fcntl

        return lambda handle: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.suppress(ImportError):
        import msvcrt

        def lock_byte(handle: int) -> None:
            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            os.lseek(handle, 0, os.SEEK_SET)

        return lock_byte
    return None
