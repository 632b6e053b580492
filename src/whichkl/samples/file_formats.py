"""File formats: the reader of each suffix, and what a file must be before it is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from whichkl.samples.arrow import open_arrow
from whichkl.samples.csv import open_csv
from whichkl.samples.npy import open_npy
from whichkl.samples.parquet import open_parquet
from whichkl.samples.shard import Shard, unreadable

_OPENERS: dict[str, Callable[[str], Shard]] = {
    ".csv": open_csv,
    ".parquet": open_parquet,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".npy": open_npy,
}
FORMATS = tuple(_OPENERS)


def open_file(path: str | os.PathLike[str]) -> Shard:
    """Read a file's metadata, or its first lines."""
    return _OPENERS[check_file(Path(path))](os.path.abspath(path))


def check_file(file: Path) -> str:
    """Return the suffix of a file that exists, can be read and isn't empty."""
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise unreadable(file, f"its suffix is `{suffix}`" if suffix else "it has no suffix", f"Use one of {', '.join(FORMATS)}")
    try:
        status = file.stat()
        if stat.S_ISREG(status.st_mode):
            file.open("rb").close()
    except FileNotFoundError as error:
        raise unreadable(file, "there is no such file", "Correct the path") from error
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the path
        because = (getattr(error, "strerror", None) or str(error)).lower()
        raise unreadable(file, because, "Correct the path or its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        because = "it is a folder" if stat.S_ISDIR(status.st_mode) else "it isn't a regular file"
        raise unreadable(file, because, "Correct the path")
    if status.st_size == 0:
        raise unreadable(file, "the file is empty", "Write at least one row")
    return suffix
