"""Writing: the only module that writes, renames or removes files, so that the user's own files are never touched.

Nothing here imports torch, so that the command line can check a folder before torch is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from whichkl._checks import InputError, ResourceError, cannot

TEMPORARY = ".new-"
"""First characters of the name of every file and folder that isn't whole yet; a killed process leaves these behind."""
WRITTEN_BY = b"Written by whichkl"
"""Text in every report; a file without it was not written by whichkl, and is never replaced."""


def origin_file(samples: Path) -> Path:
    """Return the file of the origin of a file of samples, which `whichkl convert` writes.

    >>> origin_file(Path("out/weighted.csv")).as_posix()
    'out/weighted.csv.origin.json'
    """
    return samples.with_name(f"{samples.name}.origin.json")


def remove_own(path: Path, is_own: Callable[[str], bool]) -> bool:
    """Remove what whichkl itself wrote at a path. This is the only function of the library that removes anything.

    An entry is removed only if whichkl wrote it, which its name shows. A folder is removed only if nothing else is left in it.
    A link is never followed and never removed.

    Args:
        path: a file or a folder with a name that only whichkl gives; it may be missing.
        is_own: whether whichkl writes entries of this name: `path.name` for a file, the path inside the folder for an entry
            of a folder, such as ``"fit/fit.json"`` for a file and ``"fit/"`` for a folder.

    Returns:
        Whether nothing is left at `path`.
    """
    if path.is_symlink():
        return False
    if path.is_dir():
        return _remove_folder(path, path, is_own)
    if path.exists() and is_own(path.name):
        path.unlink(missing_ok=True)
    return not path.exists()


def foreign_entry(path: Path, is_own: Callable[[str], bool]) -> Path | None:
    """Return the first entry at or below a path that `remove_own` would leave, or None if it would leave nothing."""
    if path.is_symlink() or not path.is_dir():
        return path if path.is_symlink() or (path.exists() and not is_own(path.name)) else None
    for entry in sorted(path.rglob("*")):
        name = entry.relative_to(path).as_posix()
        is_kind = is_own(f"{name}/") if entry.is_dir() else entry.is_file() and is_own(name)
        if entry.is_symlink() or not is_kind:
            return entry
    return None


def _remove_folder(folder: Path, root: Path, is_own: Callable[[str], bool]) -> bool:
    """Remove own files and folders below a folder, and the folder if nothing else is left in it."""
    for entry in sorted(folder.iterdir()):
        name = entry.relative_to(root).as_posix()
        if entry.is_symlink():
            continue
        if entry.is_dir() and is_own(f"{name}/"):
            _remove_folder(entry, root, is_own)
        elif entry.is_file() and is_own(name):
            entry.unlink(missing_ok=True)
    if any(folder.iterdir()):
        return False
    folder.rmdir()
    return True


def _is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY)


def write_whole(path: Path, data: bytes, *, is_own: Callable[[bytes], bool] | None = None) -> None:
    """Write a temporary file, sync it and rename it, so that the file is never half written; a missing folder is made.

    `is_own` says by its content whether whichkl wrote an earlier file of this name; by default every file of this name counts as
    whichkl's own.
    """
    refuse_foreign(path, is_own)
    with _written(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def written_new(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream of bytes whose content gets the name `path` when the block ends; if the block raises, nothing is left.

    Raises:
        InputError: there is something of this name.
        ResourceError: it can't be written.
    """
    refuse_existing(path)
    with _written(path) as stream:
        yield stream
        refuse_existing(path)


def refuse_existing(path: Path) -> None:
    """Refuse to write a file where there is something."""
    if path.is_symlink() or path.exists():
        raise InputError(cannot(f"write `{path}`", "there is something of this name", "Name another file"))


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file; when the block ends, sync it and rename it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())  # before the new name: after a power cut the name must not stand for an empty file
            Path(name).chmod(0o644)  # `mkstemp` lets only the owner read
            Path(name).replace(path)
        finally:
            remove_own(Path(name), _is_temporary)
    except OSError as error:
        raise unwritable(path, error) from error


def refuse_foreign(path: Path, is_own: Callable[[bytes], bool] | None = None) -> None:
    """Refuse to write to a link, to what isn't a regular file, and to a file that whichkl didn't write, by its content."""
    if path.is_symlink():
        raise InputError(cannot(f"write `{path}`", "it is a link", "Name another place, or remove the link"))
    if path.exists() and not path.is_file():
        because = "it is a folder" if path.is_dir() else "it isn't a regular file"
        raise InputError(cannot(f"write `{path}`", because, "Name another place"))
    if is_own is None:
        return
    try:
        is_foreign = path.is_file() and not is_own(path.read_bytes())
    except OSError as error:
        raise unwritable(path, error) from error
    if is_foreign:
        because = "there is a file of this name that whichkl didn't write"
        raise InputError(cannot(f"write `{path}`", because, "Name another folder, or move it away"))


def is_report(content: bytes) -> bool:
    """Whether content is that of a report that whichkl wrote."""
    return WRITTEN_BY in content


def is_demo(content: bytes) -> bool:
    """Whether content is the numbers of a demo."""
    return all(name in content for name in (b'"units"', b'"textbook"', b'"log_density_only"'))


def write_new(path: Path, data: bytes) -> None:
    """Write and sync a file; an `OSError` if it exists or can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def rename_new(fresh: Path, final: Path) -> None:
    """Give a finished file or folder its final name, which must be free, and sync its folder."""
    if final.is_symlink() or final.exists():
        raise FileExistsError(errno.EEXIST, "there is something of this name", str(final))
    fresh.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk. Windows can't open a folder, and writes names on its own."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder if it doesn't exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder for a block. Afterwards it is removed if it was made here and is still empty, and so are its parents."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        make_folder(folder)
        yield
    finally:
        for one in made:
            remove_own(one, lambda name: False)


def check_writable(folder: Path) -> None:
    """Try to write in a folder, and refuse one that is or lies below a file or a link to nothing; nothing is left behind."""
    for one in (folder, *folder.parents):
        if one.is_symlink() and not one.exists():
            raise InputError(cannot(f"write to `{folder}`", f"`{one}` is a link to nothing", "Name another folder"))
        if one.exists() and not one.is_dir():
            raise InputError(cannot(f"write to `{folder}`", f"`{one}` is a file", "Name another folder"))
    with made_folder(folder):
        try:
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
            os.close(handle)
            remove_own(Path(name), _is_temporary)
        except OSError as error:
            raise unwritable(folder, error) from error


def unwritable(path: Path, error: OSError) -> ResourceError:
    """Return the error that says why a path can't be written."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    instead = "Free some space, and run the same command again" if is_full else "Name another path"
    return ResourceError(cannot(f"write `{path}`", error.strerror or str(error), instead))
