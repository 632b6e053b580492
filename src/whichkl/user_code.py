"""User code: a function out of a file of the user's own, named FILE.py:FUNCTION, which is imported and so run."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot


def looks_like_code(text: str) -> bool:
    """Whether a text has the form FILE.py:FUNCTION.

    >>> looks_like_code("model.py:log_prob"), looks_like_code("model.py")
    (True, False)
    """
    path, colon, name = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def load_function(place: str, said: str, folder: Path | None = None) -> Callable[..., Any]:
    """Import FILE.py and return FUNCTION from it.

    Args:
        place: FILE.py:FUNCTION.
        said: what the user wrote, for messages, such as ``--log-prob model.py:f``.
        folder: where a relative path starts; the working directory unless said.

    Raises:
        InputError: it isn't of that form, there is no such file or function, or importing it raises.
    """
    if not looks_like_code(place):
        raise InputError(cannot(f"read `{said}`", "it isn't of the form FILE.py:FUNCTION", "Write, say, model.py:log_prob"))
    path, _, name = place.rpartition(":")
    file = (folder or Path()) / path
    if not file.is_file():
        raise InputError(cannot(f"read `{path}`", "there is no such file", "Correct the path"))
    spec = importlib.util.spec_from_file_location(f"whichkl_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(cannot(f"read `{path}`", "Python can't import it", "Give a .py file"))
    module = importlib.util.module_from_spec(spec)
    parent = str(file.resolve().parent)
    sys.path.insert(0, parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        because = f"it raised {type(error).__name__}: {error}"
        raise InputError(cannot(f"import `{path}`", because, "Mend the file")) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have changed the path itself
            sys.path.remove(parent)
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_")))
        raise InputError(cannot(f"find `{name}` in `{path}`", f"its functions are {there or 'none'}", "Name one of them"))
    return function  # type: ignore[no-any-return]
